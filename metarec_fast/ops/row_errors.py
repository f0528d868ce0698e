"""Squared errors between rows and their codes; rows of weight 0 may have a NaN or an infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def row_difference(x: Tensor, target: Tensor, unweighted: Tensor | None) -> Tensor:
    """x - target, [..., N, D]; 0 in rows that ``unweighted``, bool [..., N], marks and that are not finite."""
    difference = x - target
    if unweighted is None:
        return difference
    left_out = unweighted & ~difference.detach().isfinite().all(-1)
    return torch.where(left_out.unsqueeze(-1), 0, difference)


def mean_row_error(row_error: Tensor, row_weight: Tensor | None, dim: int) -> Tensor:
    """Mean over elements of the squared errors that rows of ``dim`` elements sum to; 0 if no row counts.

    row_error: [..., N], which may be NaN or infinite where the weight is 0. row_weight: [N], or None for equal weights.
    """
    if row_weight is None:
        return row_error.sum() / max(1, row_error.numel() * dim)
    weight = row_weight.to(row_error.dtype).expand_as(row_error)
    total = weight.sum() * dim
    row_error = torch.where((weight == 0) & ~row_error.isfinite(), 0, row_error)
    return (row_error * weight).sum() / torch.where(total == 0, 1, total)
