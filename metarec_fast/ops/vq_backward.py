"""vq_backward: the gradient of a quantization step to its rows, in one pass. Called by the gradients of vq_commit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.codebook_checks import fold_into_heads, unfold_heads
from metarec_fast.ops.register import define, empty
from metarec_fast.reference.vq_backward import vq_backward as reference_vq_backward


def _reference(grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, rotation: bool) -> Tensor:
    return reference_vq_backward(grad, grad_error, x, quantized, rotation=rotation)


def _cpu(grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, rotation: bool) -> Tensor:
    if x.dtype != torch.float32:
        return _reference(grad, grad_error, x, quantized, rotation)
    x, quantized = x.contiguous(), quantized.contiguous()
    grad, grad_error = (None if t is None else t.contiguous() for t in (grad, grad_error))
    H, N, D = x.shape
    out = empty((H, N, D), dtype=x.dtype, device=x.device)
    _C.vq_backward(
        *map(span, (grad, grad_error, x, quantized, out)),
        rows=H * N,
        dim=D,
        rotation=rotation,
    )
    return out


def _cuda(grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, rotation: bool) -> Tensor:
    if x.dtype != torch.float32:
        return _reference(grad, grad_error, x, quantized, rotation)
    from metarec_fast.kernels.vq_backward import vq_backward

    return vq_backward(grad, grad_error, x.contiguous(), quantized.contiguous(), rotation=rotation)


def _fake(grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, rotation: bool) -> Tensor:
    return x.new_empty(x.shape)


def _vmap(
    info: Any,
    in_dims: tuple,
    grad: Tensor | None,
    grad_error: Tensor | None,
    x: Tensor,
    quantized: Tensor,
    rotation: bool,
) -> tuple[Tensor, int]:
    folded = (
        None if t is None else fold_into_heads(info, t, dim)
        for t, dim in zip((grad, grad_error, x, quantized), in_dims[:4], strict=True)
    )
    return unfold_heads(info, op(*folded, rotation)), 0


# x, quantized, grad: [H, N, D]; grad_error: [H, N]
op = define(
    "vq_backward(Tensor? grad, Tensor? grad_error, Tensor x, Tensor quantized, bool rotation) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    vmap=_vmap,
)


def vq_backward(
    grad: Tensor | None, grad_error: Tensor | None, x: Tensor, quantized: Tensor, *, rotation: bool
) -> Tensor:
    """Same result as `reference.vq_backward`, for the backward pass of an autograd.Function.

    Where that pass is to be differentiated again (create_graph, torch.func), the reference runs: the operator has no
    gradient of its own.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _reference(grad, grad_error, x, quantized, rotation)
    return op(grad, grad_error, x, quantized, rotation)
