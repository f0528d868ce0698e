"""Definition of a target's rank among the candidates, by counts that need no sort."""

from __future__ import annotations

import torch
from torch import Tensor


def target_ranks(scores: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """How many candidates of each case score above its target, and how many exactly the same.

    scores: [B, V], finite. targets: [B] int64. seen: CSR (offsets [B+1], items) of items that are no candidates;
    the target is never counted against itself, seen or not. Returns greater [B] and equal [B], int64.
    """
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {int((~scores.isfinite()).sum())} others")
    candidate = torch.ones_like(scores, dtype=torch.bool)
    if seen is not None:
        offsets, items = seen
        for case in range(len(targets)):
            candidate[case, items[offsets[case] : offsets[case + 1]].long()] = False
    candidate.scatter_(1, targets[:, None], False)
    own = scores.gather(1, targets[:, None])
    return ((scores > own) & candidate).sum(1), ((scores == own) & candidate).sum(1)
