"""A batch with negatives against the Python loop over users that public SASRec code uses.

Shape: a mid-sized Amazon domain, 22,363 users of five events or more and 12,101 items. Both draw 128 windows of up to
50 targets, each with one negative the user has not seen; the loop pads them and draws users with replacement.
"""

import itertools

import numpy as np
import torch

from bench.peers.python_sampler import python_loop_sampler
from metarec_fast.data import Sampler, Sequences

USERS, ITEMS, EVENTS, BATCH, LENGTH = 22_363, 12_101, 198_502, 128, 50


def sequences():
    rng = np.random.default_rng(0)
    lengths = 4 + rng.geometric(1 / (EVENTS / USERS - 4), USERS)
    popularity = 1 / np.arange(1, ITEMS + 1) ** 0.8
    items = rng.choice(ITEMS, lengths.sum(), p=popularity / popularity.sum()).astype(np.int32)
    return Sequences(np.concatenate(([0], np.cumsum(lengths))), items, ITEMS)


def check_windows(data, users, windows):
    """windows: (items, targets, negatives) of each user."""
    for u, (items, targets, negatives) in zip(users, windows, strict=True):
        history = data[u]
        count = min(LENGTH, len(history) - 1)
        assert np.array_equal(items, history[-count - 1 : -1]) and np.array_equal(targets, history[-count:])
        assert len(negatives) == count and not np.isin(negatives, history).any()
        assert negatives.min() >= 0 and negatives.max() < ITEMS


def bench_batch(compare):
    data = sequences()
    sampler = Sampler(data, batch_size=BATCH, max_length=LENGTH, negatives=1)
    lists = [(data[u] + 1).tolist() for u in range(USERS)]
    steps, rng = itertools.count(), np.random.RandomState(0)

    def check(ours, theirs):
        bounds = ours.offsets[1:-1]
        parts = [torch.tensor_split(part, bounds) for part in (ours.items, ours.targets, ours.negatives[:, 0])]
        check_windows(data, ours.users.tolist(), [tuple(p.numpy() for p in w) for w in zip(*parts, strict=True)])
        users, *padded = theirs
        real = padded[1] > 0
        check_windows(data, users, [tuple(p[b][real[b]] - 1 for p in padded) for b in range(BATCH)])

    compare(
        lambda: sampler.batch(next(steps)),
        lambda: python_loop_sampler(lists, num_items=ITEMS, batch_size=BATCH, max_length=LENGTH, rng=rng),
        subject="Sampler.batch, one negative a position",
        shape=f"{BATCH}x{LENGTH}",
        against="Python loop over users",
        dtype="int64",
        check=check,
    )
