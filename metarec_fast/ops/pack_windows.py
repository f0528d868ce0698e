"""pack_windows: stretches of users' sequences as packed inputs and next-item targets.

Runs on the CPU, where the sequences lie (perhaps memory-mapped), ahead of any traced graph: a plain function.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import (
    INTEGERS,
    Array,
    as_array,
    check_integer,
    check_offsets,
    check_randomness,
    span,
)
from metarec_fast.ops.register import empty

Window = Literal["last", "sliding", "crop"]
WINDOWS = ("last", "sliding", "crop")


def check_window(window: str, max_length: int, stride: int | None) -> int:
    """The stride that holds: ``stride``, or ``max_length`` if it is None. Raises ValueError for what does not fit."""
    if window not in WINDOWS:
        raise ValueError(f"window must be one of {', '.join(WINDOWS)}, got {window!r}")
    check_integer(max_length, "max_length", least=1, below=2**62)
    if stride is None:
        return max_length
    if window != "sliding":
        raise ValueError(f"stride belongs to window='sliding', got stride={stride} with window={window!r}")
    # a longer stride would leave events between two windows out
    return check_integer(stride, "stride", least=1, below=max_length + 1)


def pack_windows(
    offsets: Array,
    items: Array,
    rows: Array,
    *,
    max_length: int,
    window: Window = "last",
    stride: int | None = None,
    window_index: Array | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One window of each row's events, packed: a window of m + 1 consecutive events gives m inputs and m targets.

    offsets: int64 [U+1], items: int32 or int64 [E]: sequence u is items[offsets[u]:offsets[u + 1]], oldest first.
        NumPy arrays (also memory-mapped) or CPU tensors; neither is copied.
    rows: int64 [B], the users of the batch. A user of fewer than two events gives an empty window.
    max_length: inputs of a window at most.
    window: "last" ends at the newest event; "crop" starts anywhere a full window fits, uniformly; "sliding" is the
        ``window_index``-th window of the user, 0 the newest, each ``stride`` events before the one after it; the
        oldest holds what remains, so that every event is covered.
    stride: for "sliding", in [1, max_length]; ``max_length`` if None, which gives disjoint inputs.
    window_index: int64 [B] for "sliding"; 0 for all if None. Past the oldest window gives an empty one.
    seed, stream, step: what a crop depends on, with the row's place ``first_row + b`` in the whole batch.

    Returns inputs [T], targets [T] and offsets [B+1], int64; the same bits as ``reference.windows`` for any number of
    threads. Raises TypeError or ValueError for other dtypes, shapes, rows out of range or offsets that fall.
    """
    stride = check_window(window, max_length, stride)
    offsets, items, rows = check_offsets(offsets), as_array(items, "items", dtypes=INTEGERS), as_array(rows, "rows")
    random = check_randomness(seed, stream, step)
    B, cpu = len(rows), torch.device("cpu")
    if window_index is not None:
        if window != "sliding":
            raise ValueError(f"window_index belongs to window='sliding', got it with window={window!r}")
        window_index = as_array(window_index, "window_index", size=B)
        if B and window_index.min() < 0:
            raise ValueError(f"window_index must be at least 0, got {window_index.min()}")
    elif window == "sliding":
        window_index = torch.zeros(B, dtype=torch.int64)
    begins, packed = (empty((n,), dtype=torch.int64, device=cpu) for n in (B, B + 1))
    T = _C.plan_windows(
        span(offsets),
        span(rows),
        span(window_index),
        span(begins),
        span(packed),
        num_users=len(offsets) - 1,
        events=len(items),
        rows=B,
        first_row=check_integer(first_row, "first_row", least=0),
        window=WINDOWS.index(window),
        max_length=max_length,
        stride=stride,
        **random,
    )
    inputs, targets = (empty((T,), dtype=torch.int64, device=cpu) for _ in range(2))
    _C.copy_windows(
        span(items),
        span(begins),
        span(packed),
        span(inputs),
        span(targets),
        rows=B,
    )
    return inputs, targets, packed
