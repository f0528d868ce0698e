"""Definition of training windows: which stretch of a user's events a batch row shows."""

from __future__ import annotations

import numpy as np

from metarec_fast.reference.philox import CROP, Randomness, bounded, derive_key


def count_windows(offsets: np.ndarray, *, max_length: int, window: str, stride: int) -> np.ndarray:
    """Windows of each user, int64 [U]: none below two events; one, or for "sliding" as many as reach the oldest."""
    inputs = np.diff(offsets) - 1
    if window != "sliding":
        return (inputs > 0).astype(np.int64)
    return np.where(inputs > 0, 1 + np.maximum(inputs - max_length + stride - 1, 0) // stride, 0)


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
