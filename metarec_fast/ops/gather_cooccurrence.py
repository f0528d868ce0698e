"""gather_cooccurrence: the items that co-occur with those of a history, and the summed values of each.

Runs on the CPU, where sequences and statistics lie: a plain function.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import Array, as_array, check_offsets, span
from metarec_fast.ops.register import empty

INT32 = (np.dtype(np.int32),)
MOST_ITEMS = 2**31  # whose ids int32 holds: one cast from a larger catalogue's would be another item's


class CooccurrenceGraph:
    """Which items co-occur with which, in several relations: a sparse matrix of items x items, checked once.

    offsets: int64 [V+1], items: int32 [E], values: float32 [E, R]: row v lists the items that go with v, ascending.
    Not copied, so they must not change.
    Raises TypeError or ValueError for other dtypes and shapes, more than 2**31 items, items out of range or falling
    offsets.
    """

    def __init__(self, offsets: Array, items: Array, values: np.ndarray) -> None:
        self.offsets, self.items = check_offsets(offsets), as_array(items, "graph items", dtypes=INT32)
        if self.num_items > MOST_ITEMS:
            raise ValueError(f"graph offsets must be of at most {MOST_ITEMS} items, got {self.num_items}")
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.ndim != 2:
            got = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            raise TypeError(f"graph values must be a float32 array [E, R], got {got}")
        if len(values) != len(self.items) or not values.flags.c_contiguous:
            raise ValueError(
                f"graph values must be contiguous with a row for each of the {len(self.items)} entries, got shape "
                f"{values.shape}"
            )
        self.values = values
        _ = self.handle

    @property
    def num_items(self) -> int:
        return len(self.offsets) - 1

    @property
    def relations(self) -> int:
        return self.values.shape[1]

    @cached_property
    def handle(self) -> _C.CooccurrenceGraph:
        return _C.CooccurrenceGraph(
            span(self.offsets),
            span(self.items),
            span(self.values),
            V=self.num_items,
            relations=self.relations,
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}  # holds addresses


def gather_cooccurrence(
    graph: CooccurrenceGraph, offsets: Array, items: Array, *, ages: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the events of each history have been seen together with, by the age of the event.

    offsets: int64 [B+1], items: int32 [T]: the histories, oldest event first; they may be empty.
    ages: rising from 0. The newest event has age 0; group g has the events of ages[g] <= age < ages[g + 1], and events
        from ages[-1] on say nothing.

    Returns CSR: offsets int64 [B+1], candidates int64 [N] rising in each case, and features float32 [N, G R + 1]: for
    each of the G groups the mean over its events of their R values for the candidate, and last whether the candidate
    itself is in the history. Costs time in proportion to the graph's entries that are read, memory of one word an item
    and thread. The same bits for any number of threads; equal to ``reference.gather_cooccurrence`` to
    float32's rounding.
    Raises TypeError or ValueError for other dtypes and shapes, items out of range, offsets or ages that fall.
    """
    offsets, items = check_offsets(offsets), as_array(items, "items", dtypes=INT32)
    if len(ages) < 2 or ages[0] != 0 or any(a >= b for a, b in pairwise(ages)):
        raise ValueError(f"ages must rise from 0 and name one group at least, got {tuple(ages)}")
    B, groups, cpu = len(offsets) - 1, len(ages) - 1, torch.device("cpu")
    plan = _C.CooccurrencePlan(graph.handle, span(offsets), span(items), ages=list(ages), B=B)
    packed = empty((B + 1,), dtype=torch.int64, device=cpu)
    candidates = empty((plan.candidates,), dtype=torch.int64, device=cpu)
    features = empty((plan.candidates, groups * graph.relations + 1), dtype=torch.float32, device=cpu)
    plan.gather(span(packed), span(candidates), span(features))
    return packed, candidates, features
