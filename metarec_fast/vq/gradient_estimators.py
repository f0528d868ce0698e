"""Gradients past the nearest-code lookup: the value is the code, the gradient goes to the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metarec_fast.ops._register import traced_transform

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
    return _composed(x, quantized) if traced_transform() else _RotateTo.apply(x, quantized)


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


def _composed(x: Tensor, quantized: Tensor) -> Tensor:
    """The definition in torch's own operations: more passes and more memory than `_RotateTo`, traced by anything."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    row, code = x.detach().to(dtype), quantized.detach().to(dtype)
    length, code_length = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (row, code))
    scale = code_length / length.clamp_min(_EPS)
    u, v = row / length.clamp_min(_EPS), code / code_length.clamp_min(_EPS)
    w, moving = u + v, x.to(dtype)
    rotated = moving - 2 * w * _dot(w, moving) / _dot(w, w).clamp_min(_EPS**2) + 2 * v * _dot(u, moving)
    return straight_through((scale * rotated).to(x.dtype), quantized.to(x.dtype))


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
        x, quantized = (t.detach() for t in ctx.saved_tensors)
        half = grad.dtype in (torch.float16, torch.bfloat16)
        g = grad.float() if half else grad
        x, quantized = x.to(g.dtype), quantized.to(g.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_EPS)
        code_length = torch.linalg.vector_norm(quantized, dim=-1, keepdim=True)
        scale = code_length / length
        code_length = code_length.clamp_min(_EPS)
        # With w = u + v, R = I - 2 w w^T / |w|^2 + 2 v u^T, so R^T g = g - 2 w (w.g) / |w|^2 + 2 u (v.g);
        # u and v enter as x and quantized with their lengths among the factors of a row, to save passes.
        w = torch.addcmul(x / length, quantized, 1 / code_length)
        along_w = -2 * scale * _dot(w, g) / _dot(w, w).clamp_min(_EPS**2)
        along_x = 2 * scale * _dot(quantized, g) / (code_length * length)
        return torch.addcmul(torch.addcmul(g * scale, w, along_w), x, along_x).to(grad.dtype), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)  # torch.linalg.vecdot is a batched product of 1 x D by D x 1: slower
