"""Rows of packed arrays."""

from __future__ import annotations

import numpy as np


def positions(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], ..., begins[0] + lengths[0] - 1, begins[1], ...: where the elements of these rows lie."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(begins - ends + lengths, lengths)


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin, and where the last one ends: int64 [N+1]."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
