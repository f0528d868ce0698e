"""Definition of negative sampling: items drawn from a distribution restricted to what the user has not seen."""

from __future__ import annotations

import math

import numpy as np

from metarec_fast.reference.philox import NEGATIVE, SHARED, Randomness, bounded, derive_key, multiply_shift

CAPACITY = 2**32  # what one cell of an alias table holds; a catalogue of V items weighs V * CAPACITY
ATTEMPTS = 16  # draws from the alias table before the exact inverse of the cumulative weights
CELL = np.dtype([("threshold", "<u4"), ("alias", "<u4"), ("log_p", "<f4"), ("log_p_alias", "<f4")])


def integer_weights(counts: np.ndarray, *, alpha: float, uniform_share: float = 0.0) -> np.ndarray:
    """A distribution as integers that sum to len(counts) * CAPACITY: int64 [V], positive where it is.

    Proportional to counts ** alpha or, with probability ``uniform_share``, uniform over all items. Integers, so that
    the alias table, the cumulative weights and the stated probabilities agree exactly.
    """
    V = len(counts)
    p = np.zeros(V)
    p[counts > 0] = np.power(counts[counts > 0].astype(np.float64), alpha)
    p = (1 - uniform_share) * (p / p.sum()) + uniform_share / V
    weights = [max(1, int(mass * (V * CAPACITY))) if mass > 0 else 0 for mass in p.tolist()]
    missing = V * CAPACITY - sum(weights)
    if missing < 0:  # rounding up gave too much, which the heaviest item pays
        weights[weights.index(max(weights))] += missing
        return np.array(weights, np.int64)
    drawn = [i for i, weight in enumerate(weights) if weight > 0]
    for place, i in enumerate(drawn):  # rounding down left some: as much for every item, the rest to the first of them
        weights[i] += missing // len(drawn) + (place < missing % len(drawn))
    return np.array(weights, np.int64)


def alias_table(weights: np.ndarray) -> np.ndarray:
    """Cells [V] of CELL: item i with threshold/CAPACITY, else its alias (Vose 1991), in one sweep of two fingers.

    weights: int64 [V] that sum to V * CAPACITY. ``light`` runs over items that need at most one cell, ``heavy`` over
    the others; a heavy item fills the room that light ones leave until it is light itself.
    """
    V = len(weights)
    log_p = np.full(V, -np.inf)
    np.log(weights / (V * float(CAPACITY)), out=log_p, where=weights > 0)
    threshold, alias = [0] * V, list(range(V))
    light = iter([i for i in range(V) if weights[i] <= CAPACITY])
    heavy = iter([i for i in range(V) if weights[i] > CAPACITY])
    j = next(heavy, None)
    left = int(weights[j]) if j is not None else 0
    while j is not None:
        if left > CAPACITY:
            i = next(light)
            if weights[i] < CAPACITY:
                threshold[i], alias[i] = int(weights[i]), j
                left -= CAPACITY - int(weights[i])
        else:
            following = next(heavy, None)
            if left < CAPACITY:
                threshold[j], alias[j] = left, following
                left = int(weights[following]) - (CAPACITY - left)
            else:
                left = int(weights[following]) if following is not None else 0
            j = following
    cells = np.empty(V, CELL)
    cells["threshold"], cells["alias"] = threshold, alias
    cells["log_p"], cells["log_p_alias"] = log_p, log_p[alias]
    return cells


def sample_negatives(
    offsets: np.ndarray,
    items: np.ndarray,
    rows: np.ndarray,
    *,
    num_items: int,
    count: int,
    weights: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Same contract as ``metarec_fast.ops.sample_negatives``, one negative after the other.

    weights: int64 [V] of ``integer_weights`` for popularity, None for uniform.
    """
    segments = np.arange(len(rows) + 1) if segments is None else segments
    randomness = Randomness(derive_key(seed, stream), step, NEGATIVE)
    negatives = np.zeros((int(segments[-1]), count), np.int64)
    logq = np.zeros((int(segments[-1]), count), np.float32)
    for b, user in enumerate(rows):
        seen = np.unique(items[offsets[user] : offsets[user + 1]])
        part = slice(segments[b], segments[b + 1])
        shape = negatives[part].shape
        drawn = _draw(randomness, seen, num_items, first_row + b, math.prod(shape), weights)
        negatives[part], logq[part] = (np.reshape(d, shape) for d in drawn)
    return negatives, logq


def sample_shared_negatives(
    *, num_items: int, count: int, weights: np.ndarray | None = None, seed: int = 0, stream: int = 0, step: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Same contract as ``metarec_fast.ops.sample_shared_negatives``."""
    randomness = Randomness(derive_key(seed, stream), step, SHARED)
    negatives, logq = _draw(randomness, np.empty(0, np.int64), num_items, 0, count, weights)
    return np.array(negatives, np.int64), np.array(logq, np.float32)


def _draw(randomness, seen, num_items, row, count, weights) -> tuple[list[int], list[float]]:
    if count == 0:  # also for one who has seen everything
        return [], []
    if weights is None:
        draw, unseen = _uniform, num_items - len(seen)
        return [draw(randomness, seen, num_items, row, s) for s in range(count)], [-math.log(unseen)] * count
    cells = alias_table(weights)
    items = [_popular(randomness, seen, weights, cells, row, s) for s in range(count)]
    shift = math.log((int(weights.sum()) - int(weights[seen].sum())) / int(weights.sum()))
    return items, [float(cells["log_p"][i]) - shift for i in items]


def _uniform(randomness: Randomness, seen: np.ndarray, num_items: int, row: int, slot: int) -> int:
    """The r-th item among the unseen, r uniform: one word and no rejection."""
    bits, word = (32, randomness.word) if num_items <= 2**31 else (64, randomness.wide)
    rank = bounded(lambda a: word(slot, row, attempt=a), num_items - len(seen), bits)
    return rank + int(np.searchsorted(seen - np.arange(len(seen)), rank, side="right"))


def _popular(randomness: Randomness, seen: np.ndarray, weights: np.ndarray, cells, row: int, slot: int) -> int:
    """An item of the alias table that is unseen; after ATTEMPTS failures, by the cumulative weights of the unseen."""
    for attempt in range(ATTEMPTS):
        first, second = randomness.pair(slot, row, attempt=attempt)
        cell = multiply_shift(first, len(weights), 32)
        if cell is None:
            continue
        item = cell if second < cells["threshold"][cell] else int(cells["alias"][cell])
        if item not in seen:
            return item
    unseen = np.setdiff1d(np.arange(len(weights)), seen)
    cumulative = np.cumsum(weights[unseen])
    mass = bounded(lambda a: randomness.wide(slot, row, attempt=a), int(cumulative[-1]), 64, attempt=ATTEMPTS)
    return int(unseen[np.searchsorted(cumulative, mass, side="right")])
