"""Definitions of the gradients past a lookup: the value is the code, the gradient goes to the input."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # least length by which a vector is divided


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in value, the identity in gradient to ``x``."""
    return quantized.detach() + (x - x.detach())  # the bracket is exactly zero, so codes come out exact


def rotate_to(x: Tensor, quantized: Tensor) -> Tensor:
    """``quantized`` in value; in gradient s R x, with R the rotation from the direction of x to that of quantized.

    With u and v these directions and w = u + v, R = I - 2 w w^T / |w|^2 + 2 v u^T, and s = |quantized| / |x|; both
    are constants to the gradient.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    row, code = x.detach().to(dtype), quantized.detach().to(dtype)
    length, code_length = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (row, code))
    scale = code_length / length.clamp_min(EPS)
    u, v = row / length.clamp_min(EPS), code / code_length.clamp_min(EPS)
    w, moving = u + v, x.to(dtype)
    rotated = moving - 2 * w * _dot(w, moving) / _dot(w, w).clamp_min(EPS**2) + 2 * v * _dot(u, moving)
    return straight_through((scale * rotated).to(x.dtype), quantized.to(x.dtype))


def rotate_back(grad: Tensor, x: Tensor, quantized: Tensor) -> Tensor:
    """The gradient to x of ``rotate_to``: s R^T grad. Differentiable in ``grad`` alone."""
    x, quantized = x.detach(), quantized.detach()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(EPS)
    code_length = torch.linalg.vector_norm(quantized, dim=-1, keepdim=True)
    scale = code_length / length
    code_length = code_length.clamp_min(EPS)
    # R^T g = g - 2 w (w.g) / |w|^2 + 2 u (v.g); u and v enter as x and quantized with their lengths among the factors
    # of a row, to save passes.
    w = torch.addcmul(x / length, quantized, 1 / code_length)
    along_w = -2 * scale * _dot(w, grad) / _dot(w, w).clamp_min(EPS**2)
    along_x = 2 * scale * _dot(quantized, grad) / (code_length * length)
    return torch.addcmul(torch.addcmul(grad * scale, w, along_w), x, along_x)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)  # torch.linalg.vecdot is a batched product of 1 x D by D x 1: slower
