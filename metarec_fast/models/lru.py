"""Linear recurrent encoder over packed rows, after LRURec (Yue et al., WSDM 2024).

Complex numbers are kept as two real planes, so that every product is one real matrix product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarec_fast import ops
from metarec_fast.models.layers import FeedForward, linear


class LRULayer(nn.Module):
    """LN(Dropout(Re(C h)) + x) with h_t = lambda * h_(t-1) + gamma * (B x_t) and |lambda| < 1."""

    def __init__(self, dim: int, *, dropout: float, smallest: float = 0.8, largest: float = 0.99) -> None:
        super().__init__()
        width = 2 * dim
        # |lambda|^2 uniform on the ring between smallest and largest, phase uniform on the circle
        modulus = (torch.rand(width) * (largest**2 - smallest**2) + smallest**2).sqrt()
        self.log_decay = nn.Parameter((-modulus.log()).log())
        self.log_phase = nn.Parameter((2 * math.pi * torch.rand(width)).clamp_min(1e-4).log())
        self.log_gamma = nn.Parameter((1 - modulus.square()).sqrt().log())
        self.into = linear(dim, 2 * width)
        self.out = linear(2 * width, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = dropout

    def forward(self, x_TD: Tensor, offsets: Tensor) -> Tensor:
        modulus, phase = torch.exp(-torch.exp(self.log_decay)), torch.exp(self.log_phase)
        a = torch.stack((modulus * torch.cos(phase), modulus * torch.sin(phase)))
        gamma = torch.exp(self.log_gamma).repeat(2)  # on the weights: there are fewer of them than of their products
        u = ops.linear(x_TD, gamma[:, None] * self.into.weight, gamma * self.into.bias).unflatten(1, (2, -1))
        h = ops.linear_scan(a, u, offsets)
        y = self.out(h.flatten(1))
        return self.norm(F.dropout(y, self.dropout, self.training) + x_TD)


class LRUEncoder(nn.Module):
    """x [T, D] packed, offsets [B+1] -> states [T, D]; nothing crosses an offset. Any length."""

    def __init__(self, dim: int, *, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((LRULayer(dim, dropout=dropout), FeedForward(dim, dropout=dropout))) for _ in range(layers)
        )

    def forward(self, x_TD: Tensor, offsets: Tensor) -> Tensor:
        for recur, feed_forward in self.layers:
            x_TD = feed_forward(recur(x_TD, offsets))
        return x_TD
