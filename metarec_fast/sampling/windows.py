"""Which events of each user make training windows, and how many windows."""

from __future__ import annotations

import numpy as np


def stretches(offsets: np.ndarray, *, part: str = "whole", query_share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Events begins[u] to ends[u] - 1 of each user that belong to ``part``: int64 [U] twice.

    "query" is the newest ceil(query_share * n) of a user's n events, "support" the ones before; both have two events at
    least, and users of fewer than four events have neither.
    """
    begins, ends = offsets[:-1], offsets[1:]
    if part == "whole":
        return begins, ends
    n = ends - begins
    cut = ends - np.clip(np.ceil(query_share * n).astype(np.int64), 2, np.maximum(n - 2, 2))
    begins, ends = (begins, cut) if part == "support" else (cut, ends)
    return np.where(n >= 4, begins, offsets[:-1]), np.where(n >= 4, ends, offsets[:-1])


def count_windows(lengths: np.ndarray, *, max_length: int, window: str, stride: int) -> np.ndarray:
    """Windows of users who have ``lengths`` events: none below two; one, or for "sliding" as many as reach the oldest.

    lengths: int64 [U]. Returns int64 [U].
    """
    inputs = lengths - 1
    if window != "sliding":
        return (inputs > 0).astype(np.int64)
    return np.where(inputs > 0, 1 + np.maximum(inputs - max_length + stride - 1, 0) // stride, 0)
