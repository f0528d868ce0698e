"""The sampler that public SASRec code uses, for comparison: a Python loop over users, left-padded NumPy rows."""

from __future__ import annotations

import numpy as np

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def python_loop_sampler(
    sequences: list[list[int]], *, num_items: int, batch_size: int, max_length: int, rng: np.random.RandomState
) -> Batch:
    """A batch of random users of two events or more: users [B]; inputs, targets, negatives [B, L] with 0 in front.

    sequences: items of each user, oldest first, in [1, num_items]: 0 is the padding. Each position with a target has
    one negative, drawn again until the user has not seen it.
    """
    users = np.zeros(batch_size, np.int64)
    rows = np.zeros((3, batch_size, max_length), np.int32)
    inputs, targets, negatives = rows
    for b in range(batch_size):
        user = rng.randint(0, len(sequences))
        while len(sequences[user]) < 2:
            user = rng.randint(0, len(sequences))
        users[b] = user
        events = sequences[user]
        seen = set(events)
        following, place = events[-1], max_length - 1
        for item in reversed(events[:-1]):
            inputs[b, place] = item
            targets[b, place] = following
            negative = rng.randint(1, num_items + 1)
            while negative in seen:
                negative = rng.randint(1, num_items + 1)
            negatives[b, place] = negative
            following, place = item, place - 1
            if place < 0:
                break
    return users, inputs, targets, negatives
