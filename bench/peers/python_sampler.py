"""The sampler that public SASRec code uses, for comparison: a Python function for each user, rows stacked afterwards."""

from __future__ import annotations

import numpy as np

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sample_user(user: int, sequences: list[list[int]], *, num_items: int, max_length: int) -> tuple:
    """The user, and inputs, targets and negatives [max_length], left-padded with 0."""
    inputs, targets, negatives = (np.zeros([max_length], dtype=np.int32) for _ in range(3))
    events = sequences[user]
    seen = set(events)
    following, place = events[-1], max_length - 1
    for item in reversed(events[:-1]):
        inputs[place] = item
        targets[place] = following
        negative = np.random.randint(1, num_items + 1)
        while negative in seen:
            negative = np.random.randint(1, num_items + 1)
        negatives[place] = negative
        following, place = item, place - 1
        if place == -1:
            break
    return user, inputs, targets, negatives


def python_loop_sampler(sequences: list[list[int]], *, num_items: int, batch_size: int, max_length: int) -> Batch:
    """A batch of random users of two events or more: users [B]; inputs, targets, negatives [B, L] with 0 in front.

    sequences: items of each user, oldest first, in [1, num_items]: 0 is the padding. Each position with a target has
    one negative, drawn again until the user has not seen it. Randomness is NumPy's global generator.
    """
    rows = []
    for _ in range(batch_size):
        user = np.random.randint(0, len(sequences))
        while len(sequences[user]) < 2:
            user = np.random.randint(0, len(sequences))
        rows.append(sample_user(user, sequences, num_items=num_items, max_length=max_length))
    users, inputs, targets, negatives = zip(*rows, strict=True)
    return np.array(users), np.array(inputs), np.array(targets), np.array(negatives)
