"""What a sampler gives: windows of a domain, packed, or padded for those who need rectangles."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from metarec_fast.ops.pad_packed import Side, pad_packed


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Windows of B users as rectangles of L positions, padded on one side.

    items, targets: int64 [B, L]. real: bool [B, L], False where there is padding. users: int64 [B].
    negatives, logq: [B, L, K] if each position has its own, [N] if the batch shares them, else None.
    """

    items: Tensor
    targets: Tensor
    real: Tensor
    users: Tensor
    negatives: Tensor | None = None
    logq: Tensor | None = None


@dataclass(eq=False, slots=True)  # not frozen: five of them are a tenth of the time of a step
class PackedBatch:
    """Windows of B users without padding: row b is positions offsets[b] to offsets[b + 1] of items and targets.

    items, targets: int64 [T]; targets[t] follows items[t]. With ``targets="last"``, targets are [B], one a row.
    offsets: int64 [B+1]. users: int64 [B].
    negatives: int64 [T, K] of each target ([B, K] with ``targets="last"``), or [N] shared by the batch; logq: float32,
    the log of the probability of drawing each. None if the sampler draws none.
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

    def padded(self, length: int, *, side: Side = "left", fill: int = 0) -> PaddedBatch:
        """The batch as rectangles of ``length`` positions, ``fill`` for the items, targets and negatives of padding.

        "left" puts the padding before the oldest event. Of longer rows the newest positions are kept. Item ids start
        at 0: choose a fill outside them, or go by ``real``. Only on the CPU.

        Raises ValueError for batches elsewhere and for targets of last positions alone.
        """
        if len(self.targets) != len(self.items):
            raise ValueError("padded needs a target at every position, got targets of last positions alone")

        def pad(values: Tensor, fill: int) -> Tensor:
            return pad_packed(values, self.offsets, length=length, side=side, fill=fill)

        items, targets = pad(self.items, fill), pad(self.targets, fill)  # which checks the arguments
        lengths = self.offsets.diff().clamp(max=length)[:, None]
        place = torch.arange(length)
        real = place >= length - lengths if side == "left" else place < lengths
        negatives, logq = self.negatives, self.logq
        if negatives is not None and negatives.dim() == 2:
            negatives, logq = pad(negatives, fill), pad(logq, 0)
        return PaddedBatch(items, targets, real, self.users, negatives, logq)
