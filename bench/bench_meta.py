"""The outer step, and one domain's training step, against padded batches with dense logits and a loop over sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.peers import padded_meta_step
from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.data.domain import Sequences
from metarec_fast.meta import Source, outer_step
from metarec_fast.models.recommender import Recommender
from metarec_fast.sampling.sampler import Sampler

LRUREC_BEAUTY = (52204, 57289, 398_000)  # users, items and events, as in the beauty domain of LRURec's paper

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
    model.init_codebook(names, seed=0)
    batches = {n: Sampler(sequences(*SHAPES[n], seed=i), batch_size=batch_size).batch(0) for i, n in enumerate(names)}
    shared = leaves(model.shared_parameters())
    private = {n: leaves(model.private_parameters(n)) for n in names}
    return model, shared, private, batches, names


def leaves(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.detach().requires_grad_() for k, v in parameters.items()}


def same(a: object, b: object) -> None:
    """Every tensor within 1e-5 of its largest element: float32 sums in another order."""
    ours, theirs = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("valid_only", [False, True], ids=["dense", "valid"])
@pytest.mark.parametrize("order", [1, 2])
def bench_outer_step(compare, order, valid_only):
    model, shared, private, batches, names = world(4)
    meta = MetaConfig(similarity_decay=0.0, order=order)
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
            order=order,
            valid_only=valid_only,
        )

    compare(
        ours,
        public,
        subject=f"outer step, order {order}",
        shape="4 sources, 128 windows each",
        against=f"padded loop with dense logits{' of valid positions' if valid_only else ''}",
        check=same,
        rounds=5,
    )


def bench_training_step(compare):
    """Loss and every gradient of one domain, as LRURec trains it; the optimizer's part is the same for both."""
    users, items, events = LRUREC_BEAUTY
    torch.manual_seed(0)
    model = Recommender(ModelConfig(dropout=0.0), {"beauty": items})
    model.init_codebook(["beauty"], seed=0)
    batch = Sampler(sequences(users, items, events, seed=0), batch_size=128).batch(0)
    shared, private = leaves(model.shared_parameters()), leaves(model.private_parameters("beauty"))
    padded = padded_meta_step.pad_left(batch.items, batch.targets, batch.offsets, 64)

    def step(value):
        return value.detach(), torch.autograd.grad(value, [*shared.values(), *private.values()])

    compare(
        lambda: step(model.loss(shared, private, batch)),
        lambda: step(
            padded_meta_step.loss(
                shared, private, padded, layers=model.config.layers, beta=model.config.commitment_weight
            )
        ),
        subject="training step",
        shape="57289 items, 128 windows",
        against="padded, dense logits",
        check=same,
        rounds=5,
    )
