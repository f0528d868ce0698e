"""The same batch by NumPy over all positions at once: the strongest simple form without a compiled extension."""

from __future__ import annotations

import numpy as np

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class NumpySampler:
    """Packed last windows of random users with one unseen negative a position.

    offsets [U+1], items [E] in [0, num_items). Users of fewer than two events are never drawn. What users have seen is
    one sorted array of user * num_items + item, so that a batch's negatives are checked by one search.
    """

    def __init__(self, offsets: np.ndarray, items: np.ndarray, *, num_items: int) -> None:
        self.offsets, self.items, self.num_items = offsets, items, num_items
        self.able = np.flatnonzero(np.diff(offsets) >= 2)
        users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        self.pairs = np.sort(users * num_items + items)

    def batch(self, *, batch_size: int, max_length: int, rng: np.random.Generator) -> Packed:
        """users [B], offsets [B+1], items [T], targets [T], negatives [T]."""
        users = self.able[rng.integers(0, len(self.able), batch_size)]
        ends = self.offsets[users + 1] - 1
        lengths = np.minimum(ends - self.offsets[users], max_length)
        packed = np.concatenate(([0], np.cumsum(lengths)))
        at = np.arange(packed[-1]) + np.repeat(ends - lengths - packed[:-1], lengths)
        first = np.repeat(users * self.num_items, lengths)
        negatives = rng.integers(0, self.num_items, packed[-1])
        again = np.flatnonzero(self._seen(first + negatives))
        while len(again):
            negatives[again] = rng.integers(0, self.num_items, len(again))
            again = again[self._seen(first[again] + negatives[again])]
        return users, packed, self.items[at].astype(np.int64), self.items[at + 1].astype(np.int64), negatives

    def _seen(self, pairs: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self.pairs, pairs), len(self.pairs) - 1)
        return self.pairs[place] == pairs
