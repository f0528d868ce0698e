"""Codes that depend on what is quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metarec_fast.vq.parts.projection import compute_dtype, project


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
        dtype = compute_dtype(self.proj_in)
        inner, condition = codes.to(dtype), condition.to(dtype)
        weight = self.proj_in.weight
        if isinstance(weight, Tensor) and weight.is_floating_point():
            # the projection of [condition, code], without a copy of both for each pair
            to_condition, to_code = weight.chunk(2, dim=-1)
            of_condition = F.linear(condition, to_condition, self.proj_in.bias)
            made = F.linear(inner, to_code)[:, None, None] + of_condition.unsqueeze(-2)
        else:  # a quantized layer has no weight to split
            places = (codes.shape[0], *condition.shape[:2], *codes.shape[1:])
            of_pair = (condition[None, :, :, None].expand(places), inner[:, None, None].expand(places))
            made = self.proj_in(torch.cat(of_pair, -1))
        return self._refined(made, codes.dtype)

    def at(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Only the codes [B, N, D] that are chosen, at their places; condition: [B, N, D]. Returns [B, N, D]."""
        return self._refined(project(self.proj_in, torch.cat((condition.to(codes.dtype), codes), -1)), codes.dtype)

    def _refined(self, made: Tensor, dtype: torch.dtype) -> Tensor:
        for layer in self.layers:
            made = layer(made) + made
        return (F.normalize(made, dim=-1) if self.l2norm_output else made).to(dtype)
