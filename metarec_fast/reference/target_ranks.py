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
    return _count(scores, targets, seen)


def linear_scores(
    h: Tensor, table: Tensor, *, bias: Tensor | None = None, added: tuple[Tensor, Tensor, Tensor] | None = None
) -> Tensor:
    """bias + h @ table.T, summed in this order and that of D, plus terms that belong to few items: [B, V].

    h: [B, D]. table: [V, D]. bias: [V]. added: CSR (offsets [B+1], items, terms), an item at most once in a case.
    """
    scores = h.new_zeros(len(h), len(table)) if bias is None else bias.expand(len(h), -1).clone()
    for d in range(h.shape[1]):
        scores += h[:, d, None] * table[:, d]
    if added is not None:
        offsets, items, terms = added
        cases = torch.arange(len(h), device=h.device).repeat_interleave(offsets.diff())
        scores[cases, items.long()] += terms
    return scores


def linear_target_ranks(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
    added: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`target_ranks` of `linear_scores`, and how many of these are not finite: int64 [B] each."""
    scores = linear_scores(h, table, bias=bias, added=added)
    return *_count(scores, targets, seen), (~scores.isfinite()).sum(1)


def _count(scores: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    candidate = torch.ones_like(scores, dtype=torch.bool)
    if seen is not None:
        offsets, items = seen
        cases = torch.arange(len(targets), device=items.device).repeat_interleave(offsets.diff())
        candidate[cases, items.long()] = False
    candidate.scatter_(1, targets[:, None], False)
    own = scores.gather(1, targets[:, None])
    return ((scores > own) & candidate).sum(1), ((scores == own) & candidate).sum(1)
