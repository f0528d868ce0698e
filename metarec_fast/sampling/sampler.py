"""Batches as a pure function of (seed, step): the order of an epoch, packed windows, negatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from metarec_fast.checks import check_flag, nearest
from metarec_fast.ops.arrays import INTEGERS, as_array, check_integer, check_offsets
from metarec_fast.ops.epoch_batches import BatchBuffers, EpochBatches, draw_batches
from metarec_fast.ops.pack_windows import Window, check_window
from metarec_fast.ops.sample_negatives import Distribution, check_distribution, distribution_table, seen_items
from metarec_fast.sampling.batch import PackedBatch
from metarec_fast.sampling.target_shares import target_shares
from metarec_fast.sampling.windows import count_windows, stretches

if TYPE_CHECKING:
    from metarec_fast.data.domain import Sequences

Targets = Literal["every", "last"]
Part = Literal["whole", "support", "query"]
PARTS = ("whole", "support", "query")
QUERY = 2**63  # sets the stream of a query's draws apart from its support's, which has the same rows
SORTED_COPY = 2**28  # events up to which a sorted copy of them, 4 bytes each, is worth its memory


class Sampler:
    """Batches of one domain: ``batch(step)`` depends on the sequences, the options and ``step``, on nothing before it.

    An epoch of ``steps_per_epoch`` steps shows each of ``num_windows`` windows once, in an order of its own; its last
    batch holds what is left and may be smaller. Users of fewer than two events have no window. Resuming takes one
    integer: the step.

    sequences: int32 or int64 items; NumPy arrays, also memory-mapped, whose contents are read in place and must not
        change. They are read through once here; a batch reads its own users alone.
    batch_size: windows in a batch. max_length, window, stride: as in ``ops.pack_windows``.
    targets: "every" position has one, or the "last" position of a window alone.
    part: "support" and "query" show only the older or only the newer events of each user, the newest ``query_share`` of
        them, and at least two, being the query. Users of fewer than four events are left out.
    users: int64, the users to draw from; all if None.
    seed, stream: samplers that differ in either are independent, so give each domain and stage a stream of its own.
    rank, world_size: ``batch`` gives this rank's rows of the batch; those of all ranks, put together, are the batch
        that one rank alone would get.
    negatives: K of each target, none of them ever seen by the user.
    shared_negatives: N for the whole batch, seen or not. Not together with ``negatives``.
    in_batch: the batch's own targets, those of all ranks, are shared negatives too, before the N others. An item's
        probability is then M/(M + N) of its share of all targets plus N/(M + N) of that in ``distribution``.
    distribution: "uniform"; "popularity": proportional to (occurrences in the sequences) ** alpha; "mixed": uniform
        with probability ``uniform_share``, else by popularity.
    sorted_copy: keep the users' items sorted, 4 bytes an event, for ``negatives``; if False, each batch sorts what its
        users have, which takes longer. None: up to 2**28 events.

    Raises ValueError for options out of range, offsets that fall, items outside [0, num_items), sequences without any
    window, and users for whom no negative exists.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        batch_size: int,
        max_length: int = 50,
        window: Window = "last",
        stride: int | None = None,
        targets: Targets = "every",
        part: Part = "whole",
        query_share: float = 0.5,
        users: np.ndarray | None = None,
        seed: int = 0,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
        negatives: int = 0,
        shared_negatives: int = 0,
        in_batch: bool = False,
        distribution: Distribution = "uniform",
        alpha: float = 0.75,
        uniform_share: float = 0.5,
        sorted_copy: bool | None = None,
    ) -> None:
        check_integer(batch_size, "batch_size", least=1)
        check_integer(negatives, "negatives", least=0)
        check_integer(shared_negatives, "shared_negatives", least=0)
        if negatives and (shared_negatives or in_batch):
            raise ValueError(
                f"negatives={negatives} excludes shared_negatives={shared_negatives} and in_batch={in_batch}"
            )
        for name, value, allowed in (("targets", targets, ("every", "last")), ("part", part, PARTS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{nearest(value, allowed)}")
        check_flag(in_batch, "in_batch")
        if sorted_copy is not None:
            check_flag(sorted_copy, "sorted_copy")
        check_distribution(distribution)
        if not 0 < query_share < 1:
            raise ValueError(f"query_share must be in (0, 1), got {query_share}")
        sequences = _checked(sequences)
        self.sequences, self.batch_size, self.max_length, self.window = sequences, batch_size, max_length, window
        self.targets, self.part, self.seed, self.stream = targets, part, seed, stream
        self.rank, self.world_size = rank, world_size
        self.negatives, self.shared_negatives, self.in_batch = negatives, shared_negatives, in_batch
        self.distribution = distribution
        self.stride = check_window(window, max_length, stride)

        begins, ends = stretches(sequences.offsets, part=part, query_share=query_share)
        per_user = count_windows(ends - begins, max_length=max_length, window=window, stride=self.stride)
        if users is not None:
            per_user = np.where(_chosen(users, len(sequences)), per_user, 0)
        self.num_windows = int(per_user.sum())
        if self.num_windows == 0:
            whose = "user" if users is None else "one of users"
            needed = "two events" if part == "whole" else "four events"
            raise ValueError(f"sequences hold no window: every {whose} has fewer than {needed}")
        self.steps_per_epoch = -(-self.num_windows // batch_size)

        num_items = sequences.num_items
        drawn = negatives or shared_negatives or in_batch
        self.table = distribution_table(
            distribution if drawn else "uniform",
            sequences.items,
            num_items=num_items,
            alpha=alpha,
            uniform_share=uniform_share,
        )
        if sorted_copy is None:
            sorted_copy = sequences.num_events <= SORTED_COPY
        seen = None
        if negatives and sorted_copy:
            seen = seen_items(sequences.offsets, sequences.items, num_items=num_items, table=self.table)
            hopeless = np.flatnonzero(seen.exhausted.numpy() & (per_user > 0))
            if len(hopeless):
                raise ValueError(
                    f"{len(hopeless)} users have seen every item that could be drawn, the first is user {hopeless[0]}: "
                    f"no negative exists for them; leave such users out"
                )
        shares = None
        if in_batch:
            options = {"max_length": max_length, "window": window, "stride": self.stride, "targets": targets}
            shares = target_shares(sequences, begins, ends, per_user, **options)
        self.longest = min(max_length, int((ends - begins).max()) - 1)
        self.batches = EpochBatches(
            sequences.offsets,
            sequences.items,
            np.concatenate(([0], np.cumsum(per_user))),
            begins=None if part == "whole" else begins,
            ends=None if part == "whole" else ends,
            num_items=num_items,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            max_length=max_length,
            window=window,
            stride=stride,
            last_target=targets == "last",
            negatives=negatives,
            shared_negatives=shared_negatives,
            seen=seen,
            table=self.table,
            target_shares=shares,
            seed=seed,
            stream=stream ^ QUERY if part == "query" else stream,
            order_stream=stream,
        )

    def __repr__(self) -> str:
        return (
            f"Sampler({self.num_windows} windows, batch_size={self.batch_size}, window={self.window!r}, "
            f"max_length={self.max_length}, seed={self.seed}, stream={self.stream})"
        )

    def batch(
        self, step: int, *, buffers: BatchBuffers | None = None, device: torch.device | str = "cpu"
    ) -> PackedBatch:
        """The batch of ``step``, counted from 0 over all epochs.

        buffers: from ``buffers()``, or the caller's own; the batch is a view of them, valid until they are used again.
        device: where the batch goes; for CUDA from pinned memory without waiting, or from ``buffers`` when it is there.
        """
        return draw([self], [step], buffers=buffers, device=device)[0]

    def buffers(self, *, pin_memory: bool = False) -> BatchBuffers:
        """Memory that any of this sampler's batches fits into."""
        return batch_buffers([self], pin_memory=pin_memory)

    def largest_batch(self) -> tuple[int, int]:
        """Elements that a batch takes at most: of its windows, and of its negatives."""
        whole = min(self.batch_size, self.num_windows)
        rows = -(-whole // self.world_size)
        targets = 1 if self.targets == "last" else self.longest
        drawn = rows * targets * self.negatives + self.shared_negatives + whole * targets * self.in_batch
        return 2 * rows + 1 + rows * self.longest + rows * targets, drawn


def batch_buffers(samplers: Sequence[Sampler], *, pin_memory: bool = False) -> BatchBuffers:
    """Memory that one batch of each of ``samplers`` fits into, pinned for copies to a GPU if ``pin_memory``."""
    return empty_buffers(*map(sum, zip(*(s.largest_batch() for s in samplers), strict=True)), pin_memory=pin_memory)


def empty_buffers(windows: int, drawn: int, *, pin_memory: bool = False) -> BatchBuffers:
    """Memory for so many elements of windows, and of negatives."""
    return BatchBuffers(
        torch.empty(windows, dtype=torch.int64, pin_memory=pin_memory),
        torch.empty(drawn, dtype=torch.int64, pin_memory=pin_memory),
        torch.empty(drawn, dtype=torch.float32, pin_memory=pin_memory),
    )


def draw(
    samplers: Sequence[Sampler],
    steps: Sequence[int],
    *,
    buffers: BatchBuffers | None = None,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """The batch of ``samplers[i]`` at ``steps[i]`` for every i, in one call and one stretch of memory.

    Arguments as in ``Sampler.batch``, with ``batch_buffers``.
    """
    drawn = draw_batches([sampler.batches for sampler in samplers], steps, buffers=buffers, device=device)
    return [
        PackedBatch(items, targets, offsets, users, negatives, logq)
        for users, offsets, items, targets, negatives, logq in drawn
    ]


def _chosen(users: np.ndarray, num_users: int) -> np.ndarray:
    users = np.asarray(users)
    if users.ndim != 1 or (users.dtype.kind not in "iu" and len(users)):
        raise TypeError(f"users must be integers [n], got {users.dtype} {users.shape}")
    if len(users) and (users.min() < 0 or users.max() >= num_users):
        raise ValueError(f"users must be in [0, {num_users}), got {users.min()} to {users.max()}")
    chosen = np.zeros(num_users, bool)
    chosen[users.astype(np.int64)] = True
    return chosen


def _checked(sequences: Sequences) -> Sequences:
    """One pass over everything, so that batches need check their own rows alone."""
    offsets, items = check_offsets(sequences.offsets), as_array(sequences.items, "items", dtypes=INTEGERS)
    num_items = sequences.num_items
    if offsets[0] != 0 or offsets[-1] != len(items) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets must rise from 0 to the number of items ({len(items)})")
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"items must be in [0, {num_items}), got {items.min()} to {items.max()}")
    return replace(sequences, offsets=offsets, items=items)
