"""Scores that are a product of states and items: what recommenders compute, and what can be ranked without a tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearScores:
    """``scores(begin, end) -> [B, end - begin]``: states @ table.T + bias for items begin to end, plus ``added``.

    states: [B, D]. table: [V, D]. bias: [V]. added: CSR (offsets [B+1], items, terms) of terms that belong to few
    items; items rise within a case.
    """

    states: Tensor
    table: Tensor
    bias: Tensor | None = None
    added: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, begin: int, end: int) -> Tensor:
        table = self.table[begin:end].T
        scores = self.states @ table if self.bias is None else torch.addmm(self.bias[begin:end], self.states, table)
        if self.added is not None:
            offsets, items, terms = self.added
            cases = torch.arange(len(self.states), device=items.device).repeat_interleave(offsets.diff())
            here = (items >= begin) & (items < end)
            scores[cases[here], items[here] - begin] += terms[here]
        return scores

    def rows(self, begin: int, end: int) -> LinearScores:
        """The scores of cases begin to end alone."""
        added = self.added
        if added is not None:
            offsets = added[0][begin : end + 1]
            mine = slice(int(offsets[0]), int(offsets[-1]))
            added = (offsets - offsets[0], added[1][mine], added[2][mine])
        return LinearScores(self.states[begin:end], self.table, self.bias, added)

    def of_items(self, items: Tensor) -> LinearScores:
        """The scores of these items alone, int64 [C] rising, under new numbers: a copy of their part of the table."""
        added = self.added
        if added is not None:
            place = torch.full((len(self.table),), -1, dtype=torch.int64, device=items.device)
            place[items] = torch.arange(len(items), device=items.device)
            place = place[added[1].long()]
            kept = place >= 0
            before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
            added = (before[added[0]], place[kept], added[2][kept])
        return LinearScores(self.states, self.table[items], None if self.bias is None else self.bias[items], added)
