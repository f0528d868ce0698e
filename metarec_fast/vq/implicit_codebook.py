"""Codes that depend on what is quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ImplicitCodebook(nn.Module):
    """A small network from each code and what is quantized so far to the code of that place (QINCo).

    dim: width of codes. dim_hidden: of the residual blocks, default ``dim``. depth: their number. l2norm_output: codes
    of length 1. Parameters are named as in vector_quantize_pytorch. Source: arXiv 2401.14732.
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False) -> None:
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )
        self.l2norm_output = l2norm_output

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """codes: [H, K, D]. condition: [B, N, D]. Returns [H, B, N, K, D]."""
        # the projection of [condition, code], without a copy of both for each pair
        to_condition, to_code = self.proj_in.weight.chunk(2, dim=-1)
        of_condition = F.linear(condition.to(codes.dtype), to_condition, self.proj_in.bias)
        made = F.linear(codes, to_code)[:, None, None] + of_condition.unsqueeze(-2)
        for layer in self.layers:
            made = layer(made) + made
        return F.normalize(made, dim=-1) if self.l2norm_output else made

    def at(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Only the codes [B, N, D] that are chosen, at their places; condition: [B, N, D]. Returns [B, N, D]."""
        made = self.proj_in(torch.cat((condition.to(codes.dtype), codes), -1))
        for layer in self.layers:
            made = layer(made) + made
        return F.normalize(made, dim=-1) if self.l2norm_output else made
