"""sample_negatives: items that a user has not seen, with the log of the probability of drawing them.

Runs on the CPU, where the sequences lie (perhaps memory-mapped), ahead of any traced graph: plain functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import (
    INT64,
    INTEGERS,
    Array,
    arange,
    as_array,
    check_integer,
    check_offsets,
    check_randomness,
    span,
)
from metarec_fast.ops.register import empty

Distribution = Literal["uniform", "popularity", "mixed"]
DISTRIBUTIONS = ("uniform", "popularity", "mixed")
CAPACITY = 2**32  # weight of one cell of an alias table; a catalogue of V items weighs V * CAPACITY
CELL = np.dtype([("threshold", "<u4"), ("alias", "<u4"), ("log_p", "<f4"), ("log_p_alias", "<f4")])
NARROW = 2**31  # catalogues up to here use 32-bit random words and 32-bit ids inside


@dataclass(frozen=True, eq=False)
class PopularityTable:
    """A distribution over V items as an alias table, exact in integers: item i weighs ``weights[i]`` of V * 2**32.

    cells: [V] of threshold, alias and both logs of probability. cumulative: int64 [V+1], weight of the items before.
    24 bytes an item. Made by ``popularity_table``.
    """

    cells: np.ndarray
    cumulative: np.ndarray

    def __post_init__(self) -> None:
        V = len(self.cells)
        as_array(self.cells, "cells", dtypes=(CELL,))
        as_array(self.cumulative, "cumulative", size=V + 1)
        rising = self.cumulative[0] == 0 and (self.cumulative[1:] >= self.cumulative[:-1]).all()
        if not rising or self.cumulative[-1] != V * CAPACITY or self.cells["alias"].max(initial=0) >= V:
            raise ValueError(f"cells and cumulative do not describe a distribution over {V} items")

    @property
    def weights(self) -> np.ndarray:
        return np.diff(self.cumulative)

    @property
    def log_p(self) -> np.ndarray:
        """log of each item's probability, float32 [V]; -inf for an item that is never drawn."""
        return self.cells["log_p"]


def popularity_table(counts: Array, *, alpha: float = 0.75, uniform_share: float = 0.0) -> PopularityTable:
    """The distribution proportional to counts ** alpha, mixed with the uniform one.

    counts: int64 [V], V < 2**31. alpha: 0 is uniform over the items that occur, 1 is proportional to popularity.
    uniform_share: in [0, 1), how much of the probability is uniform over all V items; at 0, an item of count 0 is never
        drawn.
    Raises ValueError for negative counts, counts that are all 0, and options out of range.
    """
    counts = as_array(counts, "counts")
    V = len(counts)
    if V >= NARROW:
        raise ValueError(f"popularity needs fewer than 2**31 items, got {V}")
    if not np.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if not 0 <= uniform_share < 1:
        raise ValueError(f"uniform_share must be in [0, 1), got {uniform_share}")
    if V == 0 or counts.min() < 0 or counts.max() == 0:
        raise ValueError("counts must be non-negative and not all 0")
    weights = _integer_weights(counts, alpha=alpha, uniform_share=uniform_share)
    cells = np.zeros(V, CELL)
    _C.build_alias(span(weights), span(cells), size=V)
    log_p = np.full(V, -np.inf)
    np.log(weights / (V * float(CAPACITY)), out=log_p, where=weights > 0)
    cells["log_p"], cells["log_p_alias"] = log_p, log_p[cells["alias"]]
    return PopularityTable(cells, np.concatenate(([0], np.cumsum(weights))))


def _integer_weights(counts: np.ndarray, *, alpha: float, uniform_share: float) -> np.ndarray:
    """A distribution as integers that sum to len(counts) * CAPACITY: int64 [V], positive where it is.

    Integers, so that the alias table, the cumulative weights and the stated probabilities agree exactly.
    """
    V = len(counts)
    powers = np.power(counts, alpha, out=np.zeros(V), where=counts > 0, dtype=np.float64)
    p = powers / powers.sum()
    if uniform_share:
        p = (1 - uniform_share) * p + uniform_share / V
    drawn, total = p > 0, V * CAPACITY
    weights = (p * total).astype(np.int64)
    weights[drawn] = np.maximum(weights[drawn], 1)
    missing = total - int(weights.sum())
    if missing < 0:  # the heaviest item weighs at least CAPACITY, far more than rounding up took
        weights[np.argmax(weights)] += missing
    else:
        each, rest = divmod(missing, int(drawn.sum()))
        positive = np.flatnonzero(drawn)
        weights[positive] += each
        weights[positive[:rest]] += 1
    return weights


@dataclass(frozen=True, eq=False)
class SeenItems:
    """What each user's negatives must avoid: the distinct items in rising order, prepared once by ``seen_items``.

    Row u is ``items[offsets[u]:offsets[u] + counts[u]]``; weights[u] is its weight in ``table``, if there is one.
    """

    num_items: int
    offsets: Tensor  # int64 [U+1]
    counts: Tensor  # int64 [U]
    items: Tensor  # int32 [E], int64 if num_items > 2**31
    table: PopularityTable | None
    weights: Tensor | None  # int64 [U]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def exhausted(self) -> Tensor:
        """bool [U]: the user has seen every item that could be drawn."""
        if self.weights is None:
            return self.counts >= self.num_items
        return self.weights >= int(self.table.cumulative[-1])


def seen_items(
    offsets: Array, items: Array, rows: Array | None = None, *, num_items: int, table: PopularityTable | None = None
) -> SeenItems:
    """The distinct items of users ``rows`` (all if None), as ``sample_unseen`` needs them.

    Arguments as in ``sample_negatives``. Takes the memory of one sorted copy of the events. Raises ValueError for items
    outside [0, num_items).
    """
    offsets, items = check_offsets(offsets), as_array(items, "items", dtypes=INTEGERS)
    check_integer(num_items, "num_items", least=1, below=2**62)
    if table is not None and len(table.cells) != num_items:
        raise ValueError(f"table must be over num_items={num_items} items, got one over {len(table.cells)}")
    users = arange(len(offsets) - 1) if rows is None else as_array(rows, "rows")
    U, cpu, wide = len(users), torch.device("cpu"), num_items > NARROW
    seen_offsets, counts = (empty((n,), dtype=torch.int64, device=cpu) for n in (U + 1, U))
    E = _C.row_lengths(
        span(offsets),
        span(users),
        span(seen_offsets),
        num_users=len(offsets) - 1,
        events=len(items),
        rows=U,
    )
    seen = empty((E,), dtype=torch.int64 if wide else torch.int32, device=cpu)
    _C.sorted_items(
        span(offsets),
        span(items),
        span(users),
        span(seen_offsets),
        span(seen),
        span(counts),
        num_users=len(offsets) - 1,
        rows=U,
        num_items=num_items,
    )
    weights = None
    if table is not None:
        weights = empty((U,), dtype=torch.int64, device=cpu)
        _C.row_weights(
            span(seen_offsets),
            span(counts),
            span(seen),
            span(table.cumulative),
            span(weights),
            rows=U,
        )
    return SeenItems(num_items, seen_offsets, counts, seen, table, weights)


def sample_unseen(
    seen: SeenItems,
    rows: Array,
    *,
    count: int,
    segments: Array | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
    _users: Array | None = None,
    _shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """``sample_negatives`` from what was prepared: rows are rows of ``seen``, the distribution is its table.

    _users: what errors call the rows, if not by their own numbers. _shared: words of their own for shared negatives.
    """
    rows = as_array(rows, "rows")
    segments = arange(len(rows) + 1) if segments is None else as_array(segments, "segments", size=len(rows) + 1)
    check_integer(count, "count", least=0, below=2**33)
    random = check_randomness(seed, stream, step)
    T, cpu = max(int(segments[-1]), 0), torch.device("cpu")
    negatives = empty((T, count), dtype=torch.int64, device=cpu)
    logq = empty((T, count), dtype=torch.float32, device=cpu)
    _C.sample_negatives(
        span(rows),
        span(rows if _users is None else _users),
        span(segments),
        span(seen.offsets),
        span(seen.counts),
        span(seen.items),
        span(negatives),
        span(logq),
        None if seen.table is None else span(seen.table.cells),
        None if seen.table is None else span(seen.table.cumulative),
        None if seen.weights is None else span(seen.weights),
        rows=len(rows),
        num_users=len(seen),
        positions=T,
        first_row=check_integer(first_row, "first_row", least=0),
        count=count,
        num_items=seen.num_items,
        shared=_shared,
        **random,
    )
    return negatives, logq


def check_distribution(distribution: str) -> None:
    """Raise ValueError for a name that is none."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")


def distribution_table(
    distribution: Distribution, items: Array, *, num_items: int, alpha: float, uniform_share: float
) -> PopularityTable | None:
    """The table of a distribution by name, from the items of all sequences; None for the uniform one.

    Raises ValueError for a name that is none, and as ``popularity_table`` does.
    """
    check_distribution(distribution)
    if distribution == "uniform":
        return None
    check_integer(num_items, "num_items", least=1, below=NARROW)
    if distribution == "mixed" and not 0 < uniform_share < 1:
        raise ValueError(f"uniform_share must be in (0, 1) for distribution='mixed', got {uniform_share}")
    counts = item_counts(items, num_items=num_items)
    return popularity_table(counts, alpha=alpha, uniform_share=uniform_share if distribution == "mixed" else 0.0)


def _check_table(table: PopularityTable | None, distribution: str) -> None:
    check_distribution(distribution)
    if distribution == "uniform" and table is not None:
        raise ValueError("table belongs to distribution='popularity' and 'mixed', got it with 'uniform'")


def item_counts(items: Array, *, num_items: int) -> np.ndarray:
    """How often each item occurs: int64 [num_items]. Raises ValueError for items outside [0, num_items)."""
    items = as_array(items, "items", dtypes=INTEGERS)
    check_integer(num_items, "num_items", least=1, below=2**62)
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"items must be in [0, {num_items}), got {items.min()} to {items.max()}")
    counts = np.zeros(num_items, INT64[0])
    for part in np.array_split(items, range(2**22, len(items), 2**22)):  # bincount widens what it is given
        counts += np.bincount(part, minlength=num_items)
    return counts


def sample_negatives(
    offsets: Array,
    items: Array,
    rows: Array,
    *,
    num_items: int,
    count: int,
    distribution: Distribution = "uniform",
    alpha: float = 0.75,
    uniform_share: float = 0.5,
    table: PopularityTable | None = None,
    segments: Array | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Items that the row's user has never seen, with replacement, and the log of their probability.

    offsets: int64 [U+1], items: int32 or int64 [E], the users' sequences; NumPy (also memory-mapped) or CPU tensors.
    rows: int64 [B], the users of the batch.
    num_items: V, the size of the catalogue; also beyond 2**31 for "uniform".
    count: negatives of a row or, with ``segments``, of each of its positions.
    distribution: "uniform"; "popularity": proportional to (occurrences in items) ** alpha; "mixed": uniform with
        probability ``uniform_share``, else by popularity.
    table: what ``popularity_table`` made, for the last two; made from items, alpha and uniform_share at every call if
        None.
    segments: int64 [B+1] rising from 0 to T: row b draws for positions segments[b] to segments[b + 1] - 1.
    seed, stream, step: what every negative depends on, with the row's place ``first_row + b`` in the whole batch and
        its own place in the row: not on threads, instruction set or how a batch is split.

    Returns negatives int64 and logq float32, [B, count] or [T, count]. With S the distinct items of the user, logq is
    the log of the true probability: -log(V - |S|) for uniform, log(p_i / (1 - sum of p over S)) for the others.

    Uniform needs no rejection: the r-th unseen item for a uniform r. The others draw from the alias table until an
    unseen item comes, 16 times at most, and then inverts the cumulative weights of the unseen. Both are exact. The same
    items as ``reference.negatives``; logq within one float32 rounding.

    Raises ValueError where a user has seen every item that could be drawn, for rows or items out of range, and
    TypeError or ValueError for other dtypes or shapes.
    """
    rows = as_array(rows, "rows")
    _check_table(table, distribution)
    if table is None:
        table = distribution_table(distribution, items, num_items=num_items, alpha=alpha, uniform_share=uniform_share)
    seen = seen_items(offsets, items, rows, num_items=num_items, table=table)
    return sample_unseen(
        seen,
        arange(len(rows)),
        count=count,
        segments=segments,
        seed=seed,
        stream=stream,
        step=step,
        first_row=first_row,
        _users=rows,
    )


def sample_shared_negatives(
    *,
    num_items: int,
    count: int,
    distribution: Distribution = "uniform",
    table: PopularityTable | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One set of items for a whole batch, with replacement, whatever users have seen: for sampled softmax with logQ.

    Arguments as in ``sample_negatives``; "popularity" and "mixed" need ``table``. A draw may equal a target:
    the loss masks it.

    Returns negatives int64 [count] and logq float32 [count]: -log V, or log p_i.
    """
    _check_table(table, distribution)
    if distribution != "uniform" and table is None:
        raise ValueError(f"distribution={distribution!r} needs table, got None")
    check_integer(num_items, "num_items", least=1, below=2**62)
    if table is not None and len(table.cells) != num_items:
        raise ValueError(f"table must be over num_items={num_items} items, got one over {len(table.cells)}")
    none = torch.zeros(2, dtype=torch.int64)  # one user who has seen nothing
    items = torch.empty(0, dtype=torch.int64 if num_items > NARROW else torch.int32)
    seen = SeenItems(num_items, none, none[:1], items, table, None if table is None else none[:1])
    negatives, logq = sample_unseen(seen, none[:1], count=count, seed=seed, stream=stream, step=step, _shared=True)
    return negatives[0], logq[0]
