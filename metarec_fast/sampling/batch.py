"""What a sampler gives: windows of a domain, packed, or padded for those who need rectangles."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast.ops.pad_packed import Side, pad_packed


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Windows of B users as rectangles of L positions, padded on one side.

    items, targets: int64 [B, L]. valid: bool [B, L], False where there is padding. users: int64 [B].
    negatives, logq: [B, L, K] if each position has its own, [N] if the batch shares them, else None.
    """

    items: Tensor
    targets: Tensor
    valid: Tensor
    users: Tensor
    negatives: Tensor | None = None
    logq: Tensor | None = None


class BatchShape(NamedTuple):
    """A size to fill batches to: at most ``windows`` windows of ``length`` positions, at most ``positions`` in all."""

    windows: int
    positions: int
    length: int

    @property
    def segments(self) -> int:
        """Windows, and what is padded, in pieces that are no longer than a window."""
        return self.windows + -(-self.positions // self.length)

    def fits(self, batch: PackedBatch) -> bool:
        return len(batch.items) <= self.positions and len(batch.offsets) - 1 <= self.windows


@dataclass(eq=False, slots=True)  # not frozen: five of them are a tenth of the time of a step
class PackedBatch:
    """Windows of B users without padding: row b is positions offsets[b] to offsets[b + 1] of items and targets.

    items, targets: int64 [T]; targets[t] follows items[t]. With ``targets="last"``, targets are [B], one a row.
    offsets: int64 [B+1]. users: int64 [B].
    negatives: int64 [T, K] of each target ([B, K] with ``targets="last"``), or [N] shared by the batch; logq: float32,
    the log of the probability of drawing each. None if the sampler draws none.
    valid: bool [T], False at positions that only fill the batch to a fixed size; None if there are none.
    """

    items: Tensor
    targets: Tensor
    offsets: Tensor
    users: Tensor
    negatives: Tensor | None = None
    logq: Tensor | None = None
    valid: Tensor | None = None

    def __len__(self) -> int:
        return len(self.users)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The batch with every tensor on ``device``."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items() if v is not None})

    def padded_to(self, shape: BatchShape) -> PackedBatch:
        """The batch with as many positions and segments as ``shape`` says, whatever it holds: the same loss.

        What is missing comes behind the windows: positions of item 0 without a target (-100), which ``valid`` marks.
        ``offsets`` are [shape.segments + 1]; ``users`` stay as they are. Nothing waits for the device.

        Raises ValueError for a batch that ``shape`` cannot hold, and without a target at every position.
        """
        T, B = len(self.items), len(self.offsets) - 1
        if len(self.targets) != T:
            raise ValueError("padded_to needs a target at every position, got targets of last positions alone")
        if not shape.fits(self):
            raise ValueError(
                f"batch must have at most {shape.positions} positions in {shape.windows} windows to be padded to that, "
                f"got {T} in {B}"
            )

        def fill(values: Tensor, value: int) -> Tensor:
            return torch.cat((values, values.new_full((shape.positions - T, *values.shape[1:]), value)))

        negatives, logq = self.negatives, self.logq
        if negatives is not None and negatives.dim() == 2:
            negatives, logq = fill(negatives, 0), fill(logq, 0)
        pieces = torch.arange(1 + B - shape.windows, shape.segments - shape.windows + 1, device=self.items.device)
        ends = (T + pieces.clamp_min(0) * shape.length).clamp_max(shape.positions)  # windows that are missing are empty
        return PackedBatch(
            fill(self.items, 0),
            fill(self.targets, -100),
            torch.cat((self.offsets, ends)),
            self.users,
            negatives,
            logq,
            torch.arange(shape.positions, device=self.items.device) < T,
        )

    def padded(self, length: int, *, side: Side = "left", fill: int = 0) -> PaddedBatch:
        """The batch as rectangles of ``length`` positions, ``fill`` for the items, targets and negatives of padding.

        "left" puts the padding before the oldest event. Of longer rows the newest positions are kept. Item ids start
        at 0: choose a fill outside them, or go by ``valid``. Only on the CPU.

        Raises ValueError for batches elsewhere and for targets of last positions alone.
        """
        if len(self.targets) != len(self.items):
            raise ValueError("padded_to needs a target at every position, got targets of last positions alone")

        def pad(values: Tensor, fill: int) -> Tensor:
            return pad_packed(values, self.offsets, length=length, side=side, fill=fill)

        items, targets = pad(self.items, fill), pad(self.targets, fill)  # which checks the arguments
        lengths = self.offsets.diff().clamp(max=length)[:, None]
        place = torch.arange(length)
        valid = place >= length - lengths if side == "left" else place < lengths
        negatives, logq = self.negatives, self.logq
        if negatives is not None and negatives.dim() == 2:
            negatives, logq = pad(negatives, fill), pad(logq, 0)
        return PaddedBatch(items, targets, valid, self.users, negatives, logq)
