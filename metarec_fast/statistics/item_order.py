"""Where items stand in a domain's course of time, found from the order within users' sequences alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from metarec_fast.data.domain import Sequences
from metarec_fast.statistics.transitions import TransitionKernel


def item_order(train: Sequences, *, window: int = 10, decay: float = 0.8, ridge: float = 0.3) -> np.ndarray:
    """A position for each item, such that followers stand as much later as there are events between.

    Items come and go, and each user's events show a piece of that course: pieces that share items fit together to one
    line. Minimises, over pairs of events (a, b) at most ``window`` apart, the sum of
    decay**(lag - 1) (t[b] - t[a] - lag)**2, plus ridge |t|**2: least squares on a graph, as in HodgeRank (Jiang, Lim,
    Yao and Ye 2011). Time and memory are of the order of window x events.

    Returns float64 [V], mean 0 and deviation 1 over events, 0 for items without any. No times are read, so that it
    means the same in domains with and without them. Raises ValueError for a window below 1, a decay outside (0, 1] or
    a ridge that is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    V = train.num_items
    flow = np.zeros(V)
    for lag in range(1, window + 1):
        earlier, later = train.pairs(lag)
        flow += lag * decay ** (lag - 1) * (np.bincount(later, minlength=V) - np.bincount(earlier, minlength=V))
    kernel = TransitionKernel.fit(train, window=window, decay=decay).symmetric()
    rows, columns, weights = kernel.rows_of_entries, kernel.columns, kernel.weights.astype(np.float64)
    diagonal = np.bincount(rows, weights, V) + ridge
    order = _conjugate_gradients(lambda t: diagonal * t - np.bincount(rows, weights * t[columns], V), flow, diagonal)
    events = np.bincount(train.items, minlength=V)
    share = events / max(events.sum(), 1)
    order -= share @ order
    return np.where(events > 0, order / (np.sqrt(share @ order**2) + 1e-9), 0.0)


def _conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    right: np.ndarray,
    diagonal: np.ndarray,
    *,
    tolerance: float = 1e-4,
    steps: int = 300,
) -> np.ndarray:
    """x with |product(x) - right| <= tolerance |right|, by at most ``steps`` products; scaled by the diagonal."""
    x, residual = np.zeros_like(right), right.copy()
    scaled = residual / diagonal
    direction, size = scaled, residual @ scaled
    enough = tolerance * np.linalg.norm(right)
    for _ in range(steps):
        if np.linalg.norm(residual) <= enough:
            break
        moved = product(direction)
        length = size / (direction @ moved)
        x += length * direction
        residual -= length * moved
        scaled = residual / diagonal
        before, size = size, residual @ scaled
        direction = scaled + size / before * direction
    return x
