"""Negatives drawn on a GPU, with the bits of the CPU's ``sample_unseen``: for counts too large to travel there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._arrays import Array, arange, as_array, check_integer, check_randomness
from metarec_fast.ops._register import has_triton
from metarec_fast.ops.sample_negatives import SeenItems
from metarec_fast.reference.negatives import CAPACITY
from metarec_fast.reference.philox import NEGATIVE, SHARED


@dataclass(frozen=True, eq=False)
class GpuSeenItems:
    """``seen`` with what its kernel reads on a device: 24 bytes a user and 4 or 8 an event, 24 an item of its table.

    Made by ``gpu_seen_items``.
    """

    seen: SeenItems
    offsets: Tensor  # int64 [U+1]
    counts: Tensor  # int64 [U]
    items: Tensor  # as in seen
    shift: Tensor  # float64 [U]: log of how many items are unseen or, with a table, of their share of its weight
    cells: Tensor | None  # int32 [V, 4], the table's cells as they lie in memory
    cumulative: Tensor | None  # int64 [V+1]
    unseen_weights: Tensor | None  # int64 [U]

    @property
    def device(self) -> torch.device:
        return self.items.device

    @classmethod
    def on(cls, seen: SeenItems, device: torch.device) -> GpuSeenItems:
        """The copy itself, on any device."""
        if seen.table is None:
            shift, table = (seen.num_items - seen.counts).double().log(), (None, None, None)
        else:
            total = seen.num_items * CAPACITY
            unseen = total - seen.weights
            cells = np.ascontiguousarray(seen.table.cells).view(np.int32).reshape(-1, 4)
            shift = (unseen.double() / total).log()
            table = (torch.from_numpy(cells), torch.from_numpy(np.ascontiguousarray(seen.table.cumulative)), unseen)
        arrays = (seen.offsets, seen.counts, seen.items, shift, *table)
        return cls(seen, *(None if a is None else a.to(device) for a in arrays))


def gpu_seen_items(seen: SeenItems, device: torch.device | str = "cuda") -> GpuSeenItems:
    """``seen`` for ``sample_unseen_on_gpu``, copied to ``device`` once.

    For shared negatives, of one user who has seen nothing: ``seen_items([0, 0], [], ...)``.
    Raises RuntimeError for a device that is not CUDA, or without Triton.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise RuntimeError(f"device must be a CUDA device, got {device}; on the CPU use sample_negatives")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device is {device}, but torch finds no CUDA device; on the CPU use sample_negatives")
    if not has_triton():
        raise RuntimeError("negatives on a GPU need the package triton, which is not installed")
    return GpuSeenItems.on(seen, device)


def sample_unseen_on_gpu(
    seen: GpuSeenItems,
    rows: Array,
    *,
    count: int,
    segments: Array | None = None,
    seed: int = 0,
    stream: int = 0,
    step: int = 0,
    first_row: int = 0,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """``sample_unseen`` with negatives and logq on the device of ``seen``: the same items, logq within one rounding.

    rows, segments: as there, on the CPU: they are checked, and are all that travels. shared: the words of
    ``sample_shared_negatives``, for row 0 of a ``seen`` in which nothing is seen. Errors as in ``sample_negatives``.
    """
    rows = as_array(rows, "rows")
    segments = as_array(arange(len(rows) + 1) if segments is None else segments, "segments", size=len(rows) + 1)
    check_integer(count, "count", least=0, below=2**33)
    check_integer(first_row, "first_row", least=0)
    random = check_randomness(seed, stream, step)
    _check_rows(seen.seen, rows, segments, count, first_row)

    from metarec_fast.kernels.sample_negatives import Popularity, Words, sample_negatives

    moved = torch.from_numpy(np.concatenate((rows, segments))).to(seen.device, non_blocking=True)
    key = _C.philox(stream & 0xFFFFFFFF, stream >> 32, 0, 0, seed & 0xFFFFFFFF, seed >> 32)[:2]
    last = random["step"] >> 32 << 16 | (SHARED if shared else NEGATIVE) << 12
    popularity = None
    if seen.cells is not None:
        popularity = Popularity(seen.cells, seen.cells.view(torch.float32), seen.cumulative, seen.unseen_weights)
    return sample_negatives(
        moved[: len(rows)],
        moved[len(rows) :],
        seen.offsets,
        seen.counts,
        seen.items,
        seen.shift,
        positions=int(segments[-1]),
        count=count,
        num_items=seen.seen.num_items,
        first_row=first_row,
        words=Words(random["step"] & 0xFFFFFFFF, last, *key),
        popularity=popularity,
    )


def _check_rows(seen: SeenItems, rows: np.ndarray, segments: np.ndarray, count: int, first_row: int) -> None:
    """What the CPU operator refuses too: the kernel reads where these say."""
    lengths = np.diff(segments)
    if first_row > 2**32 - len(rows):
        raise ValueError(f"first_row must be in [0, 2**32 - rows], got {first_row}")
    if segments[0] != 0 or (lengths < 0).any():
        raise ValueError("segments must rise from 0")
    if (long := lengths > 2**33 // max(count, 1)).any():
        raise ValueError(f"a row can draw 2**33 negatives at most, position {long.argmax()} of rows asks for more")
    if (outside := (rows < 0) | (rows >= len(seen))).any():
        raise ValueError(f"rows must be in [0, {len(seen)}), got {rows[outside.argmax()]}")
    if (empty := seen.exhausted.numpy()[rows] & (lengths * count > 0)).any():
        row = rows[empty.argmax()]
        raise ValueError(
            f"row {row} has seen every item that could be drawn ({seen.counts[row]} of {seen.num_items}): "
            "no negative exists; leave such users out"
        )
