"""The outer step against the loop over sources on padded batches with dense logits."""

from __future__ import annotations

import numpy as np
import torch

from bench.peers import padded_meta_step
from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.data.domain import Sequences
from metarec_fast.data.sampler import Sampler
from metarec_fast.meta import Source, outer_step
from metarec_fast.models.recommender import Recommender

# users, items and events of four source domains and a target, as in 5-core Amazon toys, video games, health,
# clothing and beauty
SHAPES = {
    "toys": (19412, 11924, 167597),
    "video_games": (24303, 10672, 231780),
    "health": (38609, 18534, 346355),
    "clothing": (39387, 23033, 278677),
    "beauty": (22363, 12101, 198502),
}


def sequences(users: int, items: int, events: int, seed: int) -> Sequences:
    """Random events with lengths of at least five, as 5-core data has."""
    rng = np.random.default_rng(seed)
    lengths = 5 + rng.geometric(1 / (events / users - 4), users) - 1
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return Sequences(offsets, rng.integers(items, size=offsets[-1]).astype(np.int32), items)


def world(sources: int, *, batch_size: int = 128) -> tuple:
    names = [*list(SHAPES)[:sources], "beauty"]
    torch.manual_seed(0)
    config = ModelConfig(dropout=0.0)
    model = Recommender(config, {n: SHAPES[n][1] for n in names})
    model.start_codebook(names, seed=0)
    batches = {n: Sampler(sequences(*SHAPES[n], seed=i), batch_size=batch_size).batch(0) for i, n in enumerate(names)}
    shared = {k: v.detach().requires_grad_() for k, v in model.shared_parameters().items()}
    private = {n: {k: v.detach().requires_grad_() for k, v in model.private_parameters(n).items()} for n in names}
    return model, shared, private, batches, names


def bench_outer_step(compare):
    model, shared, private, batches, names = world(4)
    meta = MetaConfig(similarity_decay=0.0)
    ours_sources = [Source(n, private[n], [batches[n]]) for n in names[:-1]]

    def ours():
        step = outer_step(model.loss, shared, ours_sources, private["beauty"], batches["beauty"], config=meta)
        return step.shared_grad, step.target_grad, list(step.source_grads.values()), step.weights

    padded = {n: padded_meta_step.pad_left(b.items, b.targets, b.offsets, 64) for n, b in batches.items()}

    def public():
        return padded_meta_step.outer_step(
            shared,
            [(private[n], padded[n]) for n in names[:-1]],
            private["beauty"],
            padded["beauty"],
            layers=model.config.layers,
            beta=model.config.commitment_weight,
            inner_lr=meta.inner_lr,
            temperature=meta.temperature,
            source_loss_weight=meta.source_loss_weight,
        )

    def same(a, b):
        """Every tensor within 1e-5 of its largest element: float32 sums in another order."""
        ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))

    compare(
        ours,
        public,
        subject="outer step, first order",
        shape="4 sources, 128 windows each",
        against="padded loop with dense logits",
        check=same,
        rounds=5,
    )
