"""Definition of the gradient of a quantization step to its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast.reference.gradient_estimators import rotate_back


def row_difference(x: Tensor, target: Tensor, unweighted: Tensor | None) -> Tensor:
    """x - target, [..., N, D]; in rows that ``unweighted``, bool [..., N], marks, 0 for a row that is not finite."""
    difference = x - target
    if unweighted is not None:
        finite = difference.detach().isfinite().all(-1)
        difference = difference.masked_fill((unweighted & ~finite)[..., None], 0)
    return difference


def vq_backward(
    grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, *, rotation: bool
) -> Tensor:
    """What the gradients of the quantized rows and of their squared errors are to x, all [..., N, D] or [..., N].

    The estimator (``rotate_to`` or straight through) takes ``grad``; the squared error sum_d (x - quantized)^2 adds
    2 (x - quantized) grad_error. Rows with grad_error 0 may hold NaN or infinity.
    """
    out = torch.zeros_like(x) if grad is None else rotate_back(grad, x, quantized) if rotation else grad
    if grad_error is None:
        return out
    return out + 2 * row_difference(x, quantized, grad_error == 0) * grad_error.unsqueeze(-1)
