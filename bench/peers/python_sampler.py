"""Samplers as public code writes them, a Python function for each user: stacked by hand, or by a DataLoader."""

from __future__ import annotations

import numpy as np
import torch

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def sample_user(
    user: int, sequences: list[list[int]], *, num_items: int, max_length: int, rng: np.random.RandomState
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """The user, and inputs, targets and negatives [max_length], left-padded with 0.

    sequences: items of each user, oldest first, in [1, num_items]: 0 is the padding. Each position with a target has
    one negative, drawn again until the user has not seen it.
    """
    inputs, targets, negatives = (np.zeros([max_length], dtype=np.int32) for _ in range(3))
    events = sequences[user]
    seen = set(events)
    following, place = events[-1], max_length - 1
    for item in reversed(events[:-1]):
        inputs[place] = item
        targets[place] = following
        negative = rng.randint(1, num_items + 1)
        while negative in seen:
            negative = rng.randint(1, num_items + 1)
        negatives[place] = negative
        following, place = item, place - 1
        if place == -1:
            break
    return user, inputs, targets, negatives


def python_loop_sampler(
    sequences: list[list[int]], *, num_items: int, batch_size: int, max_length: int, rng: np.random.RandomState
) -> Batch:
    """A batch of random users of two events or more: users [B]; inputs, targets, negatives [B, L]."""
    rows = []
    for _ in range(batch_size):
        user = rng.randint(0, len(sequences))
        while len(sequences[user]) < 2:
            user = rng.randint(0, len(sequences))
        rows.append(sample_user(user, sequences, num_items=num_items, max_length=max_length, rng=rng))
    users, inputs, targets, negatives = zip(*rows, strict=True)
    return np.array(users), np.array(inputs), np.array(targets), np.array(negatives)


class UserWindows(torch.utils.data.Dataset):
    """``sample_user`` of each user of two events or more, for a DataLoader with its default collation."""

    def __init__(
        self, sequences: list[list[int]], *, num_items: int, max_length: int, rng: np.random.RandomState
    ) -> None:
        self.users = [u for u, events in enumerate(sequences) if len(events) >= 2]
        self.sequences = sequences
        self.options = {"num_items": num_items, "max_length": max_length, "rng": rng}

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        return sample_user(self.users[index], self.sequences, **self.options)
