"""Which items follow which: the statistic behind untrained baselines and structural scores."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data import csr
from metarec_fast.data.domain import Sequences

_PAIRS = 1 << 23  # counted at a time, where counts are whole numbers


@dataclass(frozen=True, eq=False)
class TransitionKernel:
    """How strongly each item was followed by each other: a sparse matrix of items x items, as CSR.

    Row a is ``columns[offsets[a]:offsets[a + 1]]``, ascending, with ``weights`` float32 > 0.
    offsets: int64 [V+1]. columns: the dtype of the items.
    """

    offsets: np.ndarray
    columns: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, train: Sequences, *, first: int = 1, window: int = 5, decay: float = 0.8) -> TransitionKernel:
        """Count every pair (item, later item) from ``first`` to ``window`` events apart, by decay**(lag - 1).

        Time is of the order of window x events, and so is memory; without decay that of the pairs that differ. No part
        of it is dense in the catalogue.
        """
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not 1 <= first <= window:
            raise ValueError(f"first must be in [1, window={window}], got {first}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        V = train.num_items
        if V * V * window >= 2**63:
            raise ValueError(f"num_items squared times window must stay below 2**63, got {V} items, window {window}")
        if decay == 1:
            pair, counts = _counts(train, first, window)
            offsets = np.searchsorted(pair, np.arange(V + 1) * V)
            return cls(offsets, (pair % V).astype(train.items.dtype), counts.astype(np.float32))
        # The lag rides in the low digits of the key, so that one sort of plain integers does for values and weights.
        keys = []
        for lag in range(first, window + 1):
            earlier, later = train.pairs(lag)
            keys.append((earlier.astype(np.int64) * V + later) * window + (lag - 1))
        key = np.sort(np.concatenate(keys))
        pair, lag = np.divmod(key, window)
        starts = np.flatnonzero(np.diff(pair, prepend=-1))
        pair = pair[starts]
        weights = np.add.reduceat((decay ** np.arange(window))[lag], starts)
        offsets = np.searchsorted(pair, np.arange(V + 1) * V)
        return cls(offsets, (pair % V).astype(train.items.dtype), weights.astype(np.float32))

    @property
    def num_items(self) -> int:
        return len(self.offsets) - 1

    def rows(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of ``items`` [N], in their order and with repeats, as CSR: offsets [N+1], columns, weights."""
        lengths = self.offsets[items + 1] - self.offsets[items]
        entries = csr.positions(self.offsets[items], lengths)
        return csr.offsets(lengths), self.columns[entries], self.weights[entries]

    def transposed(self) -> TransitionKernel:
        """How strongly each item was preceded by each other."""
        order = np.argsort(self.columns, kind="stable")
        offsets = csr.offsets(np.bincount(self.columns, minlength=self.num_items))
        return TransitionKernel(offsets, self.rows_of_entries[order].astype(self.columns.dtype), self.weights[order])

    def symmetric(self) -> TransitionKernel:
        """How strongly two items occurred together, in either order."""
        V, other = self.num_items, self.transposed()
        key = np.concatenate([k.rows_of_entries * V + k.columns for k in (self, other)])
        order = np.argsort(key, kind="stable")
        first = np.flatnonzero(np.diff(key[order], prepend=-1))
        weights = np.concatenate((self.weights, other.weights))[order]
        weights = np.add.reduceat(weights, first) if len(first) else weights
        key = key[order][first]
        return TransitionKernel(
            np.searchsorted(key, np.arange(V + 1) * V), (key % V).astype(self.columns.dtype), weights
        )

    def strongest(self, k: int) -> TransitionKernel:
        """The ``k`` largest weights of each row; of equal ones the first columns."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        rows, lengths = self.rows_of_entries, np.diff(self.offsets)
        # Weights are positive, so their bits rise as they do: one sort of plain integers ranks all rows.
        key = (rows.astype(np.int64) << 32) - self.weights.view(np.int32)
        taken = np.minimum(lengths, k)
        last = np.sort(key)[(self.offsets[:-1] + taken - 1)[rows]]
        above, level = key < last, key == last
        wanted = taken - np.bincount(rows[above], minlength=self.num_items)
        before = np.cumsum(level) - level
        kept = above | level & (before - before[self.offsets[rows]] < wanted[rows])
        offsets = csr.offsets(taken)
        return TransitionKernel(offsets, self.columns[kept], self.weights[kept])

    def normalised(self, *, row: float = 1.0, column: float = 0.0) -> TransitionKernel:
        """Weights over (sum of the row)**row (sum of the column)**column.

        row=1 gives the share of each follower, row=column=0.5 a cosine that holds popular followers back.
        """
        rows = self.rows_of_entries
        row_sums, column_sums = (
            np.bincount(index, weights=self.weights, minlength=self.num_items) for index in (rows, self.columns)
        )
        weights = self.weights / (row_sums[rows] ** row * column_sums[self.columns] ** column)
        return TransitionKernel(self.offsets, self.columns, weights.astype(np.float32))

    def without_diagonal(self) -> TransitionKernel:
        """The same without what an item says of itself."""
        rows = self.rows_of_entries
        kept = rows != self.columns
        offsets = csr.offsets(np.bincount(rows[kept], minlength=self.num_items))
        return TransitionKernel(offsets, self.columns[kept], self.weights[kept])

    def two_steps(self) -> TransitionKernel:
        """The product with itself: items two transitions away."""
        V = self.num_items
        entries = torch.from_numpy(np.stack((self.rows_of_entries, self.columns.astype(np.int64))))
        matrix = torch.sparse_coo_tensor(
            entries, torch.from_numpy(self.weights), (V, V), is_coalesced=True, check_invariants=True
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            product = torch.sparse.mm(matrix, matrix).coalesce()
        row, column = product.indices().numpy()
        offsets = csr.offsets(np.bincount(row, minlength=V))
        return TransitionKernel(offsets, column.astype(self.columns.dtype), product.values().numpy())

    def scores(self, histories: Sequences, *, last: int = 1, fade: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """What the last events of each history speak for: sum over age < last of fade**age * row of that event.

        The newest event has age 0. Sums are taken in float64, newest event first. Returns all that is not zero as CSR:
        offsets [B+1] int64, items int64 rising in each case, float32 values.
        """
        if last < 1:
            raise ValueError(f"last must be at least 1, got {last}")
        V, taken = self.num_items, np.minimum(histories.lengths, last)
        case = np.repeat(np.arange(len(histories)), taken)
        age = csr.positions(np.zeros_like(taken), taken)
        offsets, columns, weights = self.rows(histories.items[histories.offsets[1:][case] - 1 - age].astype(np.int64))
        lengths = np.diff(offsets)
        cells = columns + np.repeat(case * V, lengths)
        order = np.argsort(cells, kind="stable")  # of runs that rise: they are merged
        cells = cells[order]
        first = np.flatnonzero(np.diff(cells, prepend=-1))
        values = (weights * np.repeat(float(fade) ** age, lengths))[order]
        values = np.add.reduceat(values, first) if len(first) else values
        cells = cells[first]
        offsets = np.searchsorted(cells, np.arange(len(histories) + 1) * V)
        return torch.from_numpy(offsets), torch.from_numpy(cells % V), torch.from_numpy(values.astype(np.float32))

    @cached_property
    def rows_of_entries(self) -> np.ndarray:
        """The row of each column and weight."""
        return np.repeat(np.arange(self.num_items), np.diff(self.offsets))


def _counts(train: Sequences, first: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair ``first`` to ``window`` events apart, as earlier * V + later, rising, and how often it occurred."""
    pair = counts = np.zeros(0, np.int64)
    held: list[np.ndarray] = []
    for lag in range(first, window + 1):
        earlier, later = train.pairs(lag)
        held.append(earlier.astype(np.int64) * train.num_items + later)
        if lag == window or sum(map(len, held)) >= _PAIRS:
            found, times = np.unique(np.concatenate(held), return_counts=True)
            both, held = np.concatenate((pair, found)), []
            order = np.argsort(both, kind="stable")  # of two runs that rise: they are merged
            starts = np.flatnonzero(np.diff(both[order], prepend=-1))
            times = np.concatenate((counts, times))[order]
            pair, counts = both[order][starts], np.add.reduceat(times, starts) if len(starts) else times
    return pair, counts
