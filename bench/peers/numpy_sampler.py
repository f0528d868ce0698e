"""The same batch by NumPy over all positions at once: the strongest simple form without a compiled extension."""

from __future__ import annotations

import numpy as np


class NumpySampler:
    """Last windows of random users with one negative a position that the user has not seen.

    offsets [U+1], items [E] in [0, num_items). Users of fewer than two events are never drawn. What users have seen is
    one sorted array of user * num_items + item, so that all negatives are checked by one search.
    """

    def __init__(
        self, offsets: np.ndarray, items: np.ndarray, *, num_items: int, max_length: int, rng: np.random.Generator
    ) -> None:
        self.offsets, self.items, self.num_items = offsets, items.astype(np.int64), num_items
        self.max_length, self.rng = max_length, rng
        self.able = np.flatnonzero(np.diff(offsets) >= 2)
        users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self.pairs = np.sort(users * num_items + items)

    def padded(self, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """users [B]; inputs, targets, negatives and whether each is valid [B, L], left-padded."""
        users = self._users(batch_size)
        at = self.offsets[users + 1][:, None] - 1 - self.max_length + np.arange(self.max_length)
        valid = at >= self.offsets[users][:, None]
        at = np.where(valid, at, 0)
        negatives = self._unseen(np.broadcast_to(users[:, None], at.shape)[valid])
        out = np.zeros(at.shape, np.int64)
        out[valid] = negatives
        return users, np.where(valid, self.items[at], 0), np.where(valid, self.items[at + 1], 0), out, valid

    def packed(self, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """users [B], offsets [B+1], inputs [T], targets [T], negatives [T]."""
        users = self._users(batch_size)
        ends = self.offsets[users + 1] - 1
        lengths = np.minimum(ends - self.offsets[users], self.max_length)
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        at = np.arange(offsets[-1]) + np.repeat(ends - lengths - offsets[:-1], lengths)
        return users, offsets, self.items[at], self.items[at + 1], self._unseen(np.repeat(users, lengths))

    def _users(self, count: int) -> np.ndarray:
        return self.able[self.rng.integers(0, len(self.able), count)]

    def _unseen(self, users: np.ndarray) -> np.ndarray:
        first = users * self.num_items
        negatives = self.rng.integers(0, self.num_items, len(users))
        again = np.flatnonzero(self._seen(first + negatives))
        while len(again):
            negatives[again] = self.rng.integers(0, self.num_items, len(again))
            again = again[self._seen(first[again] + negatives[again])]
        return negatives

    def _seen(self, pairs: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        return self.pairs[place] == pairs
