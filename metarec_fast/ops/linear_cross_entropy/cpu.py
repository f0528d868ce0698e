"""The passes on the CPU, in C++: csrc/sequence/linear_cross_entropy.cpp has the formulas."""

from __future__ import annotations

from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.linear_cross_entropy.shapes import Gradients, gradient_shapes
from metarec_fast.ops.register import empty


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _logits(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> _C.LinearLogits:
    """Holds the addresses of contiguous tensors, which must outlive it."""
    (T, D), V = h.shape, table.shape[0]
    return _C.LinearLogits(*map(span, (h, table, targets, bias)), T=T, V=V, D=D, ignored=ignored)


def _gradients(h: Tensor, table: Tensor, *needs: bool) -> tuple[Gradients, _C.LinearGradients]:
    """Room for the gradients that are needed, and its addresses."""
    tensors = tuple(empty(shape, dtype=h.dtype, device=h.device) for shape in gradient_shapes(h, table, *needs))
    return tensors, _C.LinearGradients(*(span(x) if need else None for x, need in zip(tensors, needs, strict=True)))


def _per_row(h: Tensor, count: int) -> list[Tensor]:
    return [empty((h.shape[0],), dtype=h.dtype, device=h.device) for _ in range(count)]


def forward(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    h, table, targets, bias = _contiguous(h, table, targets, bias)
    loss, lse = _per_row(h, 2)
    _C.linear_cross_entropy_forward(_logits(h, table, targets, bias, ignored), span(loss), span(lse))
    return loss, lse


def backward(
    grad: Tensor,
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignored: int,
    *needs: bool,
) -> Gradients:
    grad, h, table, targets, bias, lse = _contiguous(grad, h, table, targets, bias, lse)
    grads, out = _gradients(h, table, *needs)
    _C.linear_cross_entropy_backward(_logits(h, table, targets, bias, ignored), span(lse), span(grad), out)
    return grads


def weighted_sum(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor, ignored: int, *needs: bool
) -> tuple[Tensor, ...]:
    h, table, targets, bias, weight = _contiguous(h, table, targets, bias, weight)
    total, (loss, lse) = empty((), dtype=h.dtype, device=h.device), _per_row(h, 2)
    grads, out = _gradients(h, table, *needs)
    logits = _logits(h, table, targets, bias, ignored)
    _C.linear_cross_entropy_sum(logits, *map(span, (weight, total, loss, lse)), out)
    return total, loss, lse, *grads


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
    grad, h, table, targets, bias, lse, u, w, c = _contiguous(grad, h, table, targets, bias, lse, u, w, c)
    (grad_grad,), (grads, out) = _per_row(h, 1), _gradients(h, table, *needs)
    by = _C.LinearGradients(*map(span, (u, w, c)))
    logits = _logits(h, table, targets, bias, ignored)
    _C.linear_cross_entropy_double_backward(logits, span(lse), span(grad), by, span(grad_grad), out)
    return grad_grad, *grads
