"""The passes on a GPU: Triton kernels, the second derivative composed of torch's products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast.ops.linear_cross_entropy.shapes import Gradients, gradient_shapes

ELEMENTS = 1 << 24  # of a composed [rows, V] tensor


def forward(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    from metarec_fast.kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, table, targets, bias, ignored)


def backward(*args: Any) -> Gradients:
    from metarec_fast.kernels.linear_cross_entropy import linear_cross_entropy_backward

    return linear_cross_entropy_backward(*args)


def weighted_sum(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor, ignored: int, *needs: bool
) -> tuple[Tensor, ...]:
    loss, lse = forward(h, table, targets, bias, ignored)
    return (weight * loss).sum(), loss, lse, *backward(weight, h, table, targets, bias, lse, ignored, *needs)


def double_backward(
    grad: Tensor,
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    u: Tensor | None,
    w: Tensor | None,
    c: Tensor | None,
    ignored: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    """Composed of products for a few rows at a time. csrc/sequence/linear_cross_entropy.cpp has the formulas."""
    keep = targets != ignored
    h, grad, target = h.masked_fill(~keep[:, None], 0.0), grad.masked_fill(~keep, 0.0), targets.where(keep, 0)
    grad_grad, grads = torch.zeros_like(grad), [h.new_zeros(shape) for shape in gradient_shapes(h, table, *needs)]
    rows = max(1, ELEMENTS // table.shape[0])
    for t in (slice(first, first + rows) for first in range(0, h.shape[0], rows)):
        p = ((h[t] @ table.T if bias is None else torch.addmm(bias, h[t], table.T)) - lse[t, None]).exp()
        q = torch.zeros_like(p) if c is None else c.expand_as(p)
        q = q if u is None else q + u[t] @ table.T
        q = q if w is None else q + h[t] @ w.T
        mean, on_target = (p * q).sum(1, keepdim=True), target[t, None]
        grad_grad[t] = (mean - q.gather(1, on_target)).squeeze(1).masked_fill(~keep[t], 0.0)
        b = grad[t, None] * p * (q - mean)
        a = (grad[t, None] * p).scatter_add(1, on_target, -grad[t, None])
        if needs[0]:
            grads[0][t] = b @ table if w is None else b @ table + a @ w
        if needs[1]:
            grads[1] += b.T @ h[t] if u is None else b.T @ h[t] + a.T @ u[t]
        if needs[2]:
            grads[2] += b.sum(0)
    return grad_grad, *grads
