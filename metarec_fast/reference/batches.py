"""Definition of a batch: everything that a sampler gives for a step, from the definitions of its parts."""

from __future__ import annotations

import numpy as np

from metarec_fast.reference.negatives import CAPACITY, sample_negatives, sample_shared_negatives
from metarec_fast.reference.permutation import epoch_order
from metarec_fast.reference.windows import count_windows, pack_windows, stretches, target_weights


def epoch_batch(
    offsets: np.ndarray,
    items: np.ndarray,
    *,
    num_items: int,
    step: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_length: int,
    window: str = "last",
    stride: int | None = None,
    last_target: bool = False,
    part: str = "whole",
    query_share: float = 0.5,
    negatives: int = 0,
    shared_negatives: int = 0,
    in_batch: bool = False,
    weights: np.ndarray | None = None,
    seed: int = 0,
    stream: int = 0,
    order_stream: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """users, offsets, items, targets, negatives and logq, as ``metarec_fast.ops.epoch_batches`` describes them.

    weights: int64 [num_items] of ``integer_weights``; None: uniform.
    """
    windows = {"max_length": max_length, "window": window, "stride": stride or max_length}
    begins, ends = stretches(offsets, part=part, query_share=query_share)
    starts = np.concatenate(([0], np.cumsum([count_windows(int(n), **windows) for n in ends - begins])))
    size = int(starts[-1])
    epoch, place = divmod(step, -(-size // batch_size))
    rows = min(batch_size, size - place * batch_size)
    order = stream if order_stream is None else order_stream
    ids = epoch_order(size, place * batch_size, rows, seed=seed, stream=order, epoch=epoch)
    users = np.searchsorted(starts, ids, side="right") - 1
    random = {"seed": seed, "stream": stream, "step": step}

    # a user's stretch, as if it were all the user had
    shown = np.concatenate(([0], np.cumsum((ends - begins)[users])))
    events = np.concatenate([items[begins[u] : ends[u]] for u in users])
    index = ids - starts[users] if window == "sliding" else None
    inputs, targets, packed = pack_windows(shown, events, np.arange(rows), window_index=index, **windows, **random)
    if last_target:
        targets = targets[packed[1:] - 1]

    first, last = rows * rank // world_size, rows * (rank + 1) // world_size
    here = slice(packed[first], packed[last])
    wanted = slice(first, last) if last_target else here
    segments = np.arange(last - first + 1) if last_target else packed[first : last + 1] - packed[first]
    drawn, logq = sample_negatives(
        offsets,
        items,
        users[first:last],
        num_items=num_items,
        count=negatives,
        weights=weights,
        segments=segments,
        first_row=first,
        **random,
    )
    shared, shared_logq = sample_shared_negatives(
        num_items=num_items, count=shared_negatives, weights=weights, **random
    )
    if in_batch:
        options = {**windows, "last_target": last_target}
        counts = [target_weights(int(n), **options) for n in ends - begins]
        shown_items = np.concatenate([items[a:b] for a, b in zip(begins, ends, strict=True)])
        share = np.bincount(shown_items, np.concatenate(counts), minlength=num_items)
        q = np.full(num_items, 1 / num_items) if weights is None else weights / (num_items * CAPACITY)
        M, N = len(targets), shared_negatives
        shared = np.concatenate((targets, shared))
        shared_logq = np.log((M * (share / share.sum())[shared] + N * q[shared]) / (M + N))
    return (
        users[first:last],
        packed[first : last + 1] - packed[first],
        inputs[here],
        targets[wanted],
        np.concatenate((drawn.ravel(), shared)),
        np.concatenate((logq.ravel(), shared_logq)).astype(np.float32),
    )
