"""A small recommender with sources and a target to take outer steps of."""

import numpy as np
import torch

from metarec_fast import reference
from metarec_fast.config import MetaConfig, ModelConfig
from metarec_fast.data import Sequences
from metarec_fast.meta import Source, outer_step
from metarec_fast.models.recommender import Recommender
from metarec_fast.sampling import Sampler

SMALL = ModelConfig(dim=8, codebook_heads=2, codebook_size=16, dropout=0.0, max_length=6, layers=1)
CATALOGUES = {"a": 30, "b": 40, "c": 50, "d": 35, "e": 45, "t": 37}
META = MetaConfig(similarity_decay=0.0)


def sequences(items, seed):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(rng.integers(2, 9, 20))))
    return Sequences(offsets, rng.integers(items, size=offsets[-1]).astype(np.int32), items)


class World:
    """A recommender, and five sources with three batches each."""

    def __init__(self, config=SMALL, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = Recommender(config, CATALOGUES)
        self.model.init_codebook(list(CATALOGUES), seed=0)
        with torch.no_grad():
            # at the small numbers that training starts from, gradients of the recurrence are rounding of larger ones
            for p in self.model.shared.encoder.parameters():
                p += 0.2 * torch.randn_like(p)
        self.model.to(dtype)
        samplers = {
            n: Sampler(sequences(v, i), batch_size=4, max_length=6) for i, (n, v) in enumerate(CATALOGUES.items())
        }
        self.batches = {n: [sampler.batch(k) for k in range(3)] for n, sampler in samplers.items()}
        self.shared = {k: v.detach() for k, v in self.model.shared_parameters().items()}
        self.private = {n: {k: v.detach() for k, v in self.model.private_parameters(n).items()} for n in CATALOGUES}

    def sources(self, names="abcde"):
        return [Source(n, self.private[n], self.batches[n]) for n in names]

    def step(self, config=META, names="abcde", **options):
        target = self.private["t"], self.batches["t"][0]
        return outer_step(self.model.loss, self.shared, self.sources(names), *target, config=config, **options)

    def expected(self, config, names):
        return reference.meta_step(
            self.model.loss,
            self.shared,
            [(s.private, s.batches) for s in self.sources(names)],
            self.private["t"],
            self.batches["t"][0],
            order=config.order,
            inner_steps=config.inner_steps,
            inner_lr=config.inner_lr,
            temperature=config.temperature,
            source_loss_weight=config.source_loss_weight,
        )


def assert_same(got, expected, *, tolerance):
    """Every tensor within ``tolerance`` of its largest element; cosines and weights, whose scale is 1, within it."""
    pairs = [
        (got.similarities, expected["similarities"], 1.0),
        (got.weights, expected["weights"], 1.0),
        (got.source_losses, expected["source_losses"], None),
        (got.target_losses, expected["target_losses"], None),
    ]
    assert list(got.shared_grad) == list(expected["shared_grad"])
    grads = [(got.shared_grad, expected["shared_grad"]), (got.target_grad, expected["target_grad"])]
    grads += zip(got.source_grads.values(), expected["source_grads"], strict=True)
    pairs += [(ours[name], theirs[name], None) for ours, theirs in grads for name in theirs]
    for ours, theirs, scale in pairs:
        atol = tolerance * (float(theirs.abs().max()) if scale is None else scale)
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=atol)


def as_expected(step):
    return {**vars(step), "source_grads": list(step.source_grads.values())}
