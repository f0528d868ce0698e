"""Layers that both encoders use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarec_fast import ops


class Linear(nn.Linear):
    """nn.Linear by `metarec_fast.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def linear(inputs: int, outputs: int) -> Linear:
    """A linear layer with the small truncated-normal initialisation that LRURec and SASRec use."""
    layer = Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
    nn.init.zeros_(layer.bias)
    return layer


class FeedForward(nn.Module):
    """LN(Dropout(W2 Dropout(GELU(W1 x))) + x), four times as wide inside."""

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.gelu(self.into(x)), self.dropout, self.training)
        return self.norm(F.dropout(self.out(y), self.dropout, self.training) + x)


def positions(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Segment and place within it of every packed row: two [T] int64 tensors."""
    row = torch.arange(rows, device=offsets.device)
    segment = torch.searchsorted(offsets, row, right=True) - 1
    return segment, row - offsets[segment]
