"""Vector quantization in plain torch as fast as torch.compile makes it: no one-hot, no sqrt, no clamp, rows in chunks.

The mathematics is that of a VectorQuantize with its default settings (euclidean, moving averages, commitment loss,
rotation trick or straight-through), on the same buffers, so that results can be compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainVQ(nn.Module):
    """x [1, N, D] -> (quantized [1, N, D], indices [1, N], loss); in training the codes follow the averages.

    chunk: rows whose distances are held at a time; 0 for all at once. On two cores, compiled, 2048 rows were up to six
    times faster than all at once at K = 1024, D = 8 and within 6 % of the fastest at the other sizes tried.
    """

    def __init__(
        self, dim: int, codebook_size: int, *, rotation: bool, chunk: int = 2048, decay: float = 0.8, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.rotation, self.chunk, self.decay, self.eps = rotation, chunk, decay, eps
        self.register_buffer("embed", torch.zeros(codebook_size, dim))
        self.register_buffer("embed_avg", torch.zeros(codebook_size, dim))
        self.register_buffer("cluster_size", torch.zeros(codebook_size))

    def load(self, state: dict[str, Tensor]) -> None:
        """Start from a VectorQuantize's state_dict."""
        for name, buffer in self.named_buffers():
            buffer.copy_(state[f"_codebook.{name}"].view_as(buffer))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.view(-1, x.shape[-1])
        with torch.no_grad():
            indices = self._nearest(rows.detach())
        codes = F.embedding(indices, self.embed)
        loss = F.mse_loss(rows, codes)
        quantized = rotate(rows, codes) if self.rotation else rows + (codes - rows).detach()
        if self.training:
            with torch.no_grad():
                self._move(rows.detach(), indices)
        return quantized.view_as(x), indices.view(x.shape[:-1]), loss

    def _nearest(self, rows: Tensor) -> Tensor:
        square, codes = self.embed.square().sum(1), self.embed.t()
        parts = rows.split(self.chunk) if self.chunk else (rows,)
        return torch.cat([torch.addmm(square, part, codes, alpha=-2).argmin(1) for part in parts])

    def _move(self, rows: Tensor, indices: Tensor) -> None:
        K = len(self.embed)
        counts = torch.bincount(indices, minlength=K).float()
        sums = torch.zeros_like(self.embed).index_add_(0, indices, rows)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + K * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed.unsqueeze(1))


def rotate(x: Tensor, codes: Tensor) -> Tensor:
    """Codes in value, with the gradient of the rotation and scaling that carry each row to its code."""
    with torch.no_grad():
        length, code_length = x.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
        u, v = x / length.clamp_min(1e-6), codes / code_length.clamp_min(1e-6)
        w = F.normalize(u + v, dim=1, eps=1e-6)
        scale = code_length / length.clamp_min(1e-6)
    along_w, along_u = (x * w).sum(1, keepdim=True), (x * u).sum(1, keepdim=True)
    return scale * (x - 2 * along_w * w + 2 * along_u * v)
