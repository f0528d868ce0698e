"""What can be said of an item in words that every domain shares: how it is used, never which item it is."""

from __future__ import annotations

import numpy as np

from metarec_fast.data.domain import Sequences
from metarec_fast.statistics.item_order import item_order
from metarec_fast.statistics.transitions import TransitionKernel

NUM_DESCRIPTORS = 54  # nine, and the 45 products of two of them


def item_descriptors(train: Sequences) -> np.ndarray:
    """float32 [V, 54], mean 0 over items with events, and 0 for those without.

    An item's popularity, its place in time (`item_order`) and how often it ends a sequence; the means of these three
    over its followers, and over its predecessors; and the 45 products of two of the nine, squares included. The nine
    are standardised within the domain and squashed to (-1, 1), so that a small domain's numbers stand beside a large
    one's.
    """
    V = train.num_items
    counts = np.bincount(train.items, minlength=V)
    seen = counts > 0
    if not seen.any():
        return np.zeros((V, NUM_DESCRIPTORS), np.float32)
    newest = train.items[train.offsets[1:][train.lengths > 0] - 1]
    ends = np.bincount(newest, minlength=V) / np.maximum(counts, 1)
    own = _standardised(np.column_stack((np.log1p(counts), item_order(train), ends)), seen)
    near = TransitionKernel.fit(train, window=3, decay=0.6)
    columns = [own]
    for kernel in (near.normalised(), near.transposed().normalised()):
        entries = kernel.weights[:, None] * own[kernel.columns]
        columns.append(np.column_stack([np.bincount(kernel.rows_of_entries, x, V) for x in entries.T]))
    nine = np.tanh(_standardised(np.concatenate(columns, axis=1), seen) / 2)  # no item counts for a thousand others
    i, j = np.triu_indices(nine.shape[1])
    every = np.concatenate((nine, nine[:, i] * nine[:, j]), axis=1)
    return np.where(seen[:, None], every - every[seen].mean(0), 0).astype(np.float32)


def _standardised(x: np.ndarray, seen: np.ndarray) -> np.ndarray:
    known = x[seen]
    return np.where(seen[:, None], np.clip((x - known.mean(0)) / (known.std(0) + 1e-6), -4, 4), 0)
