"""EpochBatches: epoch_order, pack_windows and sample_negatives bound to a domain; a step of many domains is two calls.

Runs on the CPU, where the sequences lie (perhaps memory-mapped), ahead of any traced graph: plain functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import INTEGERS, Array, as_array, check_integer, check_offsets, check_randomness, span
from metarec_fast.ops.pack_windows import WINDOWS, Window, check_window
from metarec_fast.ops.register import empty
from metarec_fast.ops.sample_negatives import PopularityTable, SeenItems

CPU = torch.device("cpu")
PARTS = 4  # of a batch's windows: users, offsets, items, targets
DTYPES = (torch.int64, torch.int64, torch.float32)  # of windows, negatives, logq


@dataclass(frozen=True, eq=False)
class BatchBuffers:
    """Memory of the caller's that batches are written into, on the CPU, pinned if it is to be.

    windows: int64, for users, offsets, items and targets. negatives: int64. logq: float32.
    """

    windows: Tensor
    negatives: Tensor
    logq: Tensor


class EpochBatches:
    """The windows of one domain in the order of an epoch, with negatives.

    offsets, items, max_length, window, stride: as in ``pack_windows``. Arrays are read in place and must not change.
    starts: int64 [U+1] rising from 0: user u has the windows of ids starts[u] to starts[u + 1] - 1, the newest first.
    begins, ends: int64 [U]: windows show events begins[u] to ends[u] - 1 of user u alone; all of them if None.
    batch_size: windows of a step, over all ranks. An epoch's last batch holds what is left.
    rank, world_size: this rank gets rows [R * rank // world_size, R * (rank + 1) // world_size) of a batch of R.
    last_target: targets and negatives of each window's last position alone.
    negatives: of each target, unseen by the user; not together with those that a batch shares.
    seen: what users have seen; if None, each batch sorts what its own users have, which costs time and saves the
        sorted copy of everything.
    shared_negatives: for the whole batch. table: the distribution of both; uniform if None.
    target_shares: float64 [num_items]: the share of each item among the targets of an epoch. Given, the targets of
        the batch of all ranks are negatives too, and logq is the log of the probability of a draw from the mixture of
        them and the shared negatives.
    seed, stream: as in each of the three operators. order_stream: the stream of the epochs' order, if another: domains
        that show the same users in the same rows and draw apart.

    Raises TypeError or ValueError as they do, and for starts that fall. With ``last_target``, ``draw_batches`` raises
    ValueError for windows that starts give to users of fewer than two events, or past a user's oldest event.
    """

    def __init__(
        self,
        offsets: Array,
        items: Array,
        starts: Array,
        *,
        num_items: int,
        batch_size: int,
        begins: Array | None = None,
        ends: Array | None = None,
        rank: int = 0,
        world_size: int = 1,
        max_length: int,
        window: Window = "last",
        stride: int | None = None,
        last_target: bool = False,
        negatives: int = 0,
        shared_negatives: int = 0,
        seen: SeenItems | None = None,
        table: PopularityTable | None = None,
        target_shares: Array | None = None,
        seed: int = 0,
        stream: int = 0,
        order_stream: int | None = None,
    ) -> None:
        offsets, items = check_offsets(offsets), as_array(items, "items", dtypes=INTEGERS)
        U = len(offsets) - 1
        starts = as_array(starts, "starts", size=U + 1)
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
            raise ValueError("starts must rise from 0")
        if starts[-1] == 0:
            raise ValueError("starts must hold at least one window, got none")
        begins = offsets[:-1] if begins is None else as_array(begins, "begins", size=U)
        ends = offsets[1:] if ends is None else as_array(ends, "ends", size=U)
        check_integer(num_items, "num_items", least=1, below=2**62)
        if seen is not None and (len(seen) != U or seen.num_items != num_items or seen.table is not table):
            raise ValueError(
                f"seen must hold {U} users and {num_items} items with the given table, got {len(seen)} users and "
                f"{seen.num_items} items"
            )
        if table is not None and len(table.cells) != num_items:
            raise ValueError(f"table must be over num_items={num_items} items, got one over {len(table.cells)}")
        if target_shares is not None:
            float64 = (np.dtype(np.float64),)
            target_shares = as_array(target_shares, "target_shares", dtypes=float64, size=num_items)
        # mostly the same numbers, and one array is in the cache already when the other would be read
        seen_offsets = None if seen is None else seen.offsets.numpy()
        if seen_offsets is not None and np.array_equal(seen_offsets, offsets):
            seen_offsets = offsets
        self.negatives = check_integer(negatives, "negatives", least=0, below=2**33)
        check_integer(shared_negatives, "shared_negatives", least=0, below=2**33)
        if negatives and (shared_negatives or target_shares is not None):
            raise ValueError(
                f"negatives={negatives} excludes shared_negatives={shared_negatives} and target_shares "
                f"({'absent' if target_shares is None else 'given'})"
            )
        random = check_randomness(seed, stream, 0)
        check_integer(world_size, "world_size", least=1, below=2**31)
        self.num_windows = int(starts[-1])
        windows = np.diff(starts)
        owners = np.flatnonzero(windows) if windows.max() == 1 else None  # needs no search
        self.draws = bool(negatives or shared_negatives or target_shares is not None)
        # C++ holds their addresses
        self._kept = offsets, begins, ends, items, starts, owners, seen, seen_offsets, table, target_shares
        self.bound = _C.EpochBatches(
            offsets=span(offsets),
            begins=span(begins),
            ends=span(ends),
            items=span(items),
            starts=span(starts),
            owners=span(owners),
            seen_offsets=None if seen is None else span(seen_offsets),
            counts=None if seen is None else span(seen.counts),
            seen=None if seen is None else span(seen.items),
            cells=None if table is None else span(table.cells),
            cumulative=None if table is None else span(table.cumulative),
            seen_weights=None if seen is None or seen.weights is None else span(seen.weights),
            target_shares=span(target_shares),
            num_users=U,
            num_items=num_items,
            batch_size=min(check_integer(batch_size, "batch_size", least=1, below=2**32), self.num_windows),
            rank=check_integer(rank, "rank", least=0, below=world_size),
            world_size=world_size,
            window=WINDOWS.index(window),
            stride=check_window(window, max_length, stride),
            max_length=max_length,
            last_target=bool(last_target),
            negatives=self.negatives,
            shared_negatives=shared_negatives,
            seed=random["seed"],
            stream=random["stream"],
            order_stream=random["stream"]
            if order_stream is None
            else check_randomness(seed, order_stream, 0)["stream"],
        )


def draw_batches(
    domains: Sequence[EpochBatches],
    steps: Sequence[int],
    *,
    buffers: BatchBuffers | None = None,
    device: torch.device | str = CPU,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """The batch of ``domains[i]`` at ``steps[i]``, for every i: a function of the domains and steps alone.

    buffers: the batches are views of these, valid until they are written again; of fresh memory if None.
    device: where the batches go. For CUDA, three copies bring them over: from fresh pinned memory without waiting;
        from ``buffers``, which may be written again at once, when they are done.

    Returns of each batch, R rows and T positions, int64 but logq float32:

    - users [R] and offsets [R+1],
    - items [T] and targets [P], P = T or, with ``last_target``, R,
    - negatives and logq, [P, K] of each target; or [M + N], the M targets of the batch of all ranks if they are
      negatives, then N shared ones; or None.

    Raises TypeError or ValueError for a step that is no integer in [0, 2**48), buffers too small, and users who have
    seen every item.
    """
    try:
        plan = _C.BatchPlan([domain.bound for domain in domains], steps)
    except TypeError:
        for step in steps:
            check_integer(step, "step", least=0, below=2**48)
        raise
    sizes, draws = plan.sizes, plan.draws
    memory = _memory((sum(sizes), sum(draws), sum(draws)), buffers, device)
    plan.fill(*map(span, memory))
    if torch.device(device) != CPU:
        memory = [part.to(device, non_blocking=buffers is None) for part in memory]
    windows = torch.split_with_sizes(memory[0], sizes)
    counts = {domain.negatives for domain in domains}
    count = counts.pop() if len(counts) == 1 else None
    if count:  # one shape for all: fewer views to make
        draws = [n // count for n in draws]
        negatives, logq = (torch.split_with_sizes(part.view(-1, count), draws) for part in memory[1:])
    else:
        negatives, logq = (torch.split_with_sizes(part, draws) for part in memory[1:])
        shapes = [(-1, domain.negatives) if domain.negatives else (-1,) for domain in domains]
        negatives, logq = ([x.view(s) for x, s in zip(part, shapes, strict=True)] for part in (negatives, logq))
    return [
        (
            *windows[PARTS * i : PARTS * i + PARTS],
            *((negatives[i], logq[i]) if domain.draws else (None, None)),
        )
        for i, domain in enumerate(domains)
    ]


def _memory(
    sizes: tuple[int, int, int], buffers: BatchBuffers | None, device: torch.device | str
) -> tuple[Tensor, ...]:
    """Three tensors of these sizes: ``buffers``, pinned memory for a GPU, or plain."""
    if buffers is None:
        if torch.device(device).type == "cuda":
            return tuple(torch.empty(n, dtype=d, pin_memory=True) for n, d in zip(sizes, DTYPES, strict=True))
        return tuple(empty((n,), dtype=d, device=CPU) for n, d in zip(sizes, DTYPES, strict=True))
    parts = (buffers.windows, buffers.negatives, buffers.logq)
    for name, part, dtype, size in zip(("windows", "negatives", "logq"), parts, DTYPES, sizes, strict=True):
        if part.dtype != dtype or part.dim() != 1 or not part.is_contiguous() or part.device != CPU:
            raise TypeError(
                f"buffers.{name} must be a contiguous {dtype} [n] on the CPU, got {part.dtype} {tuple(part.shape)} on "
                f"{part.device}"
            )
        if len(part) < size:
            raise ValueError(f"buffers.{name} must hold at least {size} elements, got {len(part)}")
    return tuple(part[:size] for part, size in zip(parts, sizes, strict=True))
