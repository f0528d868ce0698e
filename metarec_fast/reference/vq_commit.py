"""Definition of the codebook lookup with its commitment loss."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast.reference.gradient_estimators import rotate_to, straight_through
from metarec_fast.reference.nearest_codeword import Metric, nearest_codeword
from metarec_fast.reference.vq_backward import row_difference

GRADIENT_ESTIMATORS = {"rotation": rotate_to, "straight_through": straight_through}


def mean_row_error(row_error: Tensor, row_weight: Tensor | None, dim: int) -> Tensor:
    """The mean of row_error [..., N] / dim, weighted by row_weight [N]; 0 if the weights sum to 0.

    A row of weight 0 adds nothing, whatever its error.
    """
    weight = torch.ones_like(row_error) if row_weight is None else row_weight.to(row_error.dtype).expand_as(row_error)
    nothing = (weight == 0) & ~row_error.isfinite()
    total = weight.sum() * dim
    return (weight * row_error.masked_fill(nothing, 0)).sum() / total.masked_fill(total == 0, 1)


def vq_commit(
    x: Tensor,
    codebook: Tensor,
    *,
    row_weight: Tensor | None = None,
    codebook_grad: bool = False,
    gradient: str | None = None,
    metric: Metric = "distance",
) -> tuple[Tensor, Tensor, Tensor]:
    """Codebook rows nearest to x, their indices, and the mean squared error between x and those rows.

    x: [N, D] or [H, N, D]; codebook: [K, D] or [H, K, D]; row_weight: [N].
    The loss sees the codebook as constant unless ``codebook_grad``; the quantized rows carry gradient to the codebook,
    or to x by the estimator that ``gradient`` names. metric: what makes a code the nearest, see `nearest_codeword`;
    the error is that of the distance always.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32
    table = codebook.to(dtype)
    indices, _ = nearest_codeword(x.detach(), codebook.detach(), metric=metric)
    quantized = table.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, x.shape[-1]))
    target = quantized if codebook_grad else quantized.detach()
    unweighted = None if row_weight is None else row_weight == 0
    row_error = row_difference(x.to(dtype), target, unweighted).square().sum(-1)
    if gradient is not None:
        quantized = GRADIENT_ESTIMATORS[gradient](x, quantized)
    return quantized.to(x.dtype), indices, mean_row_error(row_error, row_weight, x.shape[-1])
