"""Definition of training windows: which stretch of a user's events a batch row shows."""

from __future__ import annotations

import math

import numpy as np

from metarec_fast.reference.philox import CROP, Randomness, bounded, derive_key


def stretches(offsets: np.ndarray, *, part: str = "whole", query_share: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Events begins[u] to ends[u] - 1 of each user that belong to ``part``: int64 [U] twice.

    "query" is the newest ceil(query_share * n) of a user's n events, "support" the ones before; both have two events at
    least, and users of fewer than four events have neither.
    """
    begins, ends = [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        n = end - begin
        cut = end - min(max(math.ceil(query_share * n), 2), n - 2)
        if part == "whole":
            begins.append(begin), ends.append(end)
        elif n < 4:
            begins.append(begin), ends.append(begin)
        else:
            begins.append(begin if part == "support" else cut), ends.append(cut if part == "support" else end)
    return np.array(begins, np.int64), np.array(ends, np.int64)


def count_windows(length: int, *, max_length: int, window: str, stride: int) -> int:
    """Windows of a user of ``length`` events: none below two; one, or for "sliding" as many as reach the oldest."""
    inputs = length - 1
    if inputs < 1:
        return 0
    return 1 if window != "sliding" else 1 + math.ceil(max(inputs - max_length, 0) / stride)


def target_weights(length: int, *, max_length: int, window: str, stride: int, last_target: bool) -> np.ndarray:
    """How often each event of a user of ``length`` events is a target in one epoch, on average: float64 [length]."""
    m = length - 1
    weights = np.zeros(max(length, 0))
    if m < 1:
        return weights
    if window == "crop" and m > max_length:
        ends = np.arange(max_length, m + 1)
    elif window == "sliding":
        count = count_windows(length, max_length=max_length, window=window, stride=stride)
        ends = m - stride * np.arange(count)
    else:
        ends = np.array([m])
    share = 1 / len(ends) if window == "crop" else 1.0
    for end in ends:
        weights[end if last_target else max(end - max_length, 0) + 1 : end + 1] += share
    return weights


def pack_windows(
    offsets: np.ndarray,
    items: np.ndarray,
    rows: np.ndarray,
    *,
    max_length: int,
    window: str = "last",
    stride: int | None = None,
    window_index: np.ndarray | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Same contract as ``metarec_fast.ops.pack_windows``, one row after the other."""
    stride = stride or max_length
    randomness = Randomness(derive_key(seed, stream), step, CROP)
    inputs, targets, lengths = [], [], []
    for b, user in enumerate(rows):
        events = items[offsets[user] : offsets[user + 1]]
        end = max(len(events) - 1, 0)  # inputs are events[begin:end], targets events[begin + 1:end + 1]
        if window == "sliding" and window_index is not None:
            end = max(end - stride * int(window_index[b]), 0)
        elif window == "crop" and end > max_length:
            starts = end - max_length + 1
            start = bounded(lambda a, b=b: randomness.wide(0, first_row + b, attempt=a), starts, 64)
            end = start + max_length
        begin = max(end - max_length, 0)
        inputs.extend(events[begin:end].tolist())
        targets.extend(events[begin + 1 : end + 1].tolist())
        lengths.append(end - begin)
    packed = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    return np.array(inputs, np.int64), np.array(targets, np.int64), packed.astype(np.int64)


def pad_packed(
    values: np.ndarray, offsets: np.ndarray, *, length: int, side: str = "left", fill: int = 0
) -> np.ndarray:
    """Same contract as ``metarec_fast.ops.pad_packed``, one row after the other."""
    out = np.full((len(offsets) - 1, length, *values.shape[1:]), fill, values.dtype)
    for b in range(len(offsets) - 1):
        row = values[offsets[b] : offsets[b + 1]][-length:]
        out[b, length - len(row) if side == "left" else 0 :][: len(row)] = row
    return out
