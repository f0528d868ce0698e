"""Definition of the sums that an exponential moving average of a codebook needs."""

from __future__ import annotations

import torch
from torch import Tensor


def vq_statistics(
    x: Tensor, indices: Tensor, codebook_size: int, *, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and the sum of those rows; with ``row_weight``, weighted by it.

    x: [N, D] or [H, N, D]; indices: int64 [N] or [H, N], -1 for rows to skip; row_weight: [N].
    Rows that hold a NaN or an infinity are left out. Returns counts [K] or [H, K] and sums [K, D] or [H, K, D].
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = (indices >= 0) & x.isfinite().all(-1)
    weight = kept.to(dtype) if row_weight is None else torch.where(kept, row_weight.to(dtype), 0)
    slot = torch.where(kept, indices, 0)
    rows = torch.where(kept.unsqueeze(-1), x.to(dtype), 0) * weight.unsqueeze(-1)
    counts = weight.new_zeros((*indices.shape[:-1], codebook_size)).scatter_add(-1, slot, weight)
    sums = rows.new_zeros((*indices.shape[:-1], codebook_size, x.shape[-1]))
    return counts, sums.scatter_add(-2, slot.unsqueeze(-1).expand_as(rows), rows)
