"""Causal self-attention encoder, after SASRec (Kang and McAuley, ICDM 2018), on packed rows.

Only the attention itself is padded: rows are laid out [B, L] from the left, where causality alone keeps real
positions from reading padding. Everything else runs on the packed rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarec_fast.models.layers import linear, positions


class AttentionBlock(nn.Module):
    """Pre-norm causal attention, then a pre-norm feed-forward network, each with a residual."""

    def __init__(self, dim: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = linear(dim, 3 * dim), linear(dim, dim)
        self.into, self.out = linear(dim, 4 * dim), linear(4 * dim, dim)

    def forward(self, x_TD: Tensor, slot: Tensor, B: int, L: int) -> Tensor:
        D = x_TD.shape[1]
        qkv = self.qkv(self.attention_norm(x_TD))
        padded = qkv.new_zeros(B * L, 3 * D).index_copy(0, slot, qkv).view(B, L, 3, self.heads, D // self.heads)
        q_BHLd, k_BHLd, v_BHLd = padded.permute(2, 0, 3, 1, 4)
        scores = q_BHLd @ k_BHLd.transpose(-1, -2) / math.sqrt(D // self.heads)
        future = torch.ones(L, L, dtype=torch.bool, device=x_TD.device).triu(1)
        attention = F.dropout(scores.masked_fill(future, float("-inf")).softmax(-1), self.dropout, self.training)
        y = (attention @ v_BHLd).transpose(1, 2).reshape(B * L, D)[slot]
        x_TD = x_TD + F.dropout(self.project(y), self.dropout, self.training)
        y = F.dropout(F.gelu(self.into(self.feed_norm(x_TD))), self.dropout, self.training)
        return x_TD + F.dropout(self.out(y), self.dropout, self.training)


class SASRecEncoder(nn.Module):
    """x [T, D] packed, offsets [B+1] -> states [T, D]; segments of at most ``max_length`` rows."""

    def __init__(self, dim: int, *, layers: int, heads: int, dropout: float, max_length: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim {dim} and heads {heads}")
        self.max_length = max_length
        self.position = nn.Parameter(torch.empty(max_length, dim))
        nn.init.trunc_normal_(self.position, std=0.02, a=-0.04, b=0.04)
        self.layers = nn.ModuleList(AttentionBlock(dim, heads=heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_TD: Tensor, offsets: Tensor) -> Tensor:
        segment, place = positions(offsets, x_TD.shape[0])
        # pad to the longest segment; to the full length where a look would wait for the device, or compile again
        look = x_TD.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        L = self.max_length if not look else int(place.max()) + 1 if len(place) else 1
        if self.max_length < L:
            raise ValueError(f"segments must have at most max_length = {self.max_length} rows, got one with {L}")
        x_TD = x_TD + self.position[place]
        for block in self.layers:
            x_TD = block(x_TD, segment * L + place, offsets.numel() - 1, L)
        return self.norm(x_TD)
