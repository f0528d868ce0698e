"""Batches as a pure function of (seed, step): the order of an epoch, packed windows, negatives."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metarec_fast.ops.epoch_batches import EpochBatches
from metarec_fast.ops.pack_windows import Window, check_window
from metarec_fast.ops.sample_negatives import (
    DISTRIBUTIONS,
    Distribution,
    item_counts,
    popularity_table,
    sample_shared_negatives,
    seen_items,
)
from metarec_fast.reference.windows import count_windows

if TYPE_CHECKING:
    from metarec_fast.data.domain import Sequences


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Windows of B users without padding: row b is positions offsets[b] to offsets[b + 1] of items and targets.

    items, targets: int64 [T]; targets[t] follows items[t]. offsets: int64 [B+1]. users: int64 [B].
    negatives: int64 [T, K] of each position, or [N] shared by the batch; logq: float32, the log of the probability of
    drawing each. None if the sampler draws none.
    """

    items: Tensor
    targets: Tensor
    offsets: Tensor
    users: Tensor
    negatives: Tensor | None = None
    logq: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The batch with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if v is not None})


class Sampler:
    """Batches of one domain: ``batch(step)`` depends on the sequences, the options and ``step``, on nothing before it.

    An epoch of ``steps_per_epoch`` steps shows each of ``num_windows`` windows once, in an order of its own; its last
    batch holds what is left and may be smaller. Users of fewer than two events have no window. Resuming takes one
    integer: the step.

    sequences: int32 or int64 items; NumPy arrays, also memory-mapped, whose contents are read in place and must not
        change. They are read through once here; a batch reads its own users alone.
    batch_size: windows in a batch. max_length, window, stride: as in ``ops.pack_windows``.
    seed, stream: samplers that differ in either are independent, so give each domain and stage a stream of its own.
    negatives: K per position, none of them ever seen by the user; takes the memory of one sorted copy of the events.
    shared_negatives: N for the whole batch, seen or not. Not together with ``negatives``.
    distribution: "uniform", or "popularity": proportional to (occurrences in the sequences) ** alpha.

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
        seed: int = 0,
        stream: int = 0,
        negatives: int = 0,
        shared_negatives: int = 0,
        distribution: Distribution = "uniform",
        alpha: float = 0.75,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("negatives", negatives, 0),
            ("shared_negatives", shared_negatives, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if negatives and shared_negatives:
            raise ValueError(f"negatives={negatives} and shared_negatives={shared_negatives} exclude each other")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
        self.sequences, self.batch_size, self.max_length, self.window = sequences, batch_size, max_length, window
        self.seed, self.stream = seed, stream
        self.negatives, self.shared_negatives = negatives, shared_negatives
        self.stride = check_window(window, max_length, stride)
        _check_sequences(sequences)

        per_user = count_windows(sequences.offsets, max_length=max_length, window=window, stride=self.stride)
        self.num_windows = int(per_user.sum())
        if self.num_windows == 0:
            raise ValueError("sequences hold no window: every user has fewer than two events")
        self.steps_per_epoch = -(-self.num_windows // batch_size)

        self.distribution = distribution
        self.table = None
        if distribution == "popularity" and (negatives or shared_negatives):
            self.table = popularity_table(item_counts(sequences.items, num_items=sequences.num_items), alpha=alpha)
        seen = None
        if negatives:
            seen = seen_items(sequences.offsets, sequences.items, num_items=sequences.num_items, table=self.table)
            hopeless = np.flatnonzero(seen.exhausted.numpy() & (per_user > 0))
            if len(hopeless):
                raise ValueError(
                    f"{len(hopeless)} users have seen every item that could be drawn, the first is user {hopeless[0]}: "
                    f"no negative exists for them; leave such users out"
                )

        self._batches = EpochBatches(
            sequences.offsets,
            sequences.items,
            np.concatenate(([0], np.cumsum(per_user))),
            max_length=max_length,
            window=window,
            stride=stride,
            seen=seen,
            count=negatives,
            seed=seed,
            stream=stream,
        )

    def __repr__(self) -> str:
        return (
            f"Sampler({self.num_windows} windows, batch_size={self.batch_size}, window={self.window!r}, "
            f"max_length={self.max_length}, seed={self.seed}, stream={self.stream})"
        )

    def batch(self, step: int) -> PackedBatch:
        """The batch of ``step``, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.batch_size
        count = min(self.batch_size, self.num_windows - first)
        items, targets, offsets, users, negatives, logq = self._batches.draw(first, count, epoch=epoch, step=step)
        if self.shared_negatives:
            negatives, logq = sample_shared_negatives(
                num_items=self.sequences.num_items,
                count=self.shared_negatives,
                distribution=self.distribution,
                table=self.table,
                seed=self.seed,
                stream=self.stream,
                step=step,
            )
        return PackedBatch(items, targets, offsets, users, negatives, logq)


def _check_sequences(sequences: Sequences) -> None:
    """One pass over everything, so that batches need check their own rows alone."""
    offsets, items, num_items = sequences.offsets, sequences.items, sequences.num_items
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"offsets must rise from 0 to the number of items ({len(items)})")
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"items must be in [0, {num_items}), got {items.min()} to {items.max()}")
