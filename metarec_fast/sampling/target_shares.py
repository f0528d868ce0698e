"""How often each item is a target: what a draw from a batch's own targets has to be corrected by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from metarec_fast.data.csr import positions
from metarec_fast.ops.pack_windows import Window

if TYPE_CHECKING:
    from metarec_fast.data.domain import Sequences


def target_shares(
    sequences: Sequences,
    begins: np.ndarray,
    ends: np.ndarray,
    per_user: np.ndarray,
    *,
    max_length: int,
    window: Window,
    stride: int,
    targets: Literal["every", "last"],
) -> np.ndarray:
    """The share of each item among the targets of an epoch, on average over its crops: float64 [num_items].

    begins, ends, per_user: the events that each user's windows show, and how many windows there are.
    """
    shares = np.zeros(sequences.num_items)
    U = len(begins)
    for users in np.array_split(np.arange(U), max(1, sequences.num_events // 2**22)):  # keeps temporaries small
        users = users[per_user[users] > 0]
        m = ends[users] - begins[users] - 1  # a user's last event, and the number of inputs
        t = positions(np.ones(len(users), np.int64), m)  # which event of its user a target is
        m, count = np.repeat(m, m), np.repeat(per_user[users], m)
        reach = 1 if targets == "last" else max_length  # targets of a window, the last one included
        if window == "sliding":  # windows end at m - j * stride
            newest = np.minimum((m - t) // stride, count - 1)
            oldest = np.maximum(-((reach - 1 - (m - t)) // stride), 0)
            weights = np.maximum(newest - oldest + 1, 0).astype(np.float64)
        elif window == "crop":  # windows end anywhere from max_length to m
            first, last = np.maximum(t, max_length), np.minimum(t + reach - 1, m)
            few = m <= max_length
            weights = np.where(few, t + reach > m, np.maximum(last - first + 1, 0) / np.maximum(m - max_length + 1, 1))
        else:
            weights = (t + reach > m).astype(np.float64)
        items = sequences.items[np.repeat(begins[users], ends[users] - begins[users] - 1) + t]
        shares += np.bincount(items, weights, minlength=sequences.num_items)
    return shares / shares.sum()
