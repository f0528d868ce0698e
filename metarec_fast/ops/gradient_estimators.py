"""Gradients past the nearest-code lookup: the value is the code, the gradient goes to the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metarec_fast.ops.register import traced_transform
from metarec_fast.ops.vq_backward import vq_backward
from metarec_fast.reference.gradient_estimators import rotate_to as reference_rotate_to

_EPS = 1e-6  # least length by which a vector is divided


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in value; the gradient passes to ``x`` unchanged, none to ``quantized``.

    x, quantized: the same shape. Source: Bengio et al., arXiv 1308.3432. Raises ValueError for unequal shapes.
    """
    _check_shapes(x, quantized)
    return quantized.detach() + (x - x.detach())  # the bracket is exactly zero, so codes come out exact


def rotate_to(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in value; the gradient passes to ``x`` through the rotation and scaling that carry x to it.

    x, quantized: [..., D], the same shape. With u and v the directions of x and quantized, R the rotation in their
    plane that takes u to v, and s = |quantized| / |x|, the result is s R x with s and R held constant: angles between
    gradient and code survive the lookup. Differentiable in x, also under torch.func. Source: arXiv 2410.06424.
    Raises ValueError for unequal shapes.
    """
    _check_shapes(x, quantized)
    return reference_rotate_to(x, quantized) if traced_transform() else _RotateTo.apply(x, quantized)


def step_towards(x: Tensor, quantized: Tensor, *, variance: float) -> Tensor:
    """``x`` moved by its distance to ``quantized``, in a direction near to that of the code.

    x, quantized: [..., D], the same shape. variance: of the normal noise in each element of the direction.
    The direction is constant, the distance is not: gradients go to both. Source: DiVeQ, openreview KRVnpTbx7R,
    figure 1. Raises ValueError for unequal shapes.
    """
    _check_shapes(x, quantized)
    error = quantized - x
    noisy = (error + variance**0.5 * torch.randn_like(error)).detach()
    return x + F.normalize(noisy, dim=-1, eps=_EPS) * torch.linalg.vector_norm(error, dim=-1, keepdim=True)


def _check_shapes(x: Tensor, quantized: Tensor) -> None:
    if x.shape != quantized.shape:
        raise ValueError(f"x and quantized must have one shape, got {tuple(x.shape)} and {tuple(quantized.shape)}")


class _RotateTo(torch.autograd.Function):
    """Saves x and the code alone; the rotation is a pair of rank-one terms, rebuilt in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # s R and its transpose are constants, so a second derivative sees only `grad`
        dtype = torch.promote_types(grad.dtype, torch.float32)
        rows = [t.to(dtype).reshape(1, -1, t.shape[-1]) for t in (grad, *ctx.saved_tensors)]
        return vq_backward(rows[0], None, *rows[1:], rotation=True).view_as(grad).to(grad.dtype), None


GRADIENT_ESTIMATORS = {"rotation": rotate_to, "straight_through": straight_through}
