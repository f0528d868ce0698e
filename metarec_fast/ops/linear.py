"""linear: x W^T + b through oneDNN on a CPU, where torch's own product is MKL's, half as fast on AMD processors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarec_fast.ops.portable_lookup import leaves_python
from metarec_fast.ops.register import define, traced_transform

# its linear layer has been where inductor finds it since torch 2.0; a build without it has MKL or OpenBLAS alone
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (x.numel() and len(weight)):  # oneDNN has no empty products
        return F.linear(x, weight, bias)
    bias = bias if bias is None else bias.contiguous()  # oneDNN reads it as if it were (torch 2.13)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _vmap(info: Any, in_dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    x, weight = (
        v.unsqueeze(0).expand(info.batch_size, *v.shape) if dim is None else v.movedim(dim, 0)
        for v, dim in zip((x, weight), in_dims, strict=False)
    )
    y = x @ weight.mT
    if bias is not None:
        y = y + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0).unsqueeze(1))
    return y, 0


_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_cpu,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    vmap=_vmap,
)


class _Linear(torch.autograd.Function):
    """(x, weight, bias) -> x weight^T + bias; its gradients are such products too, so any number of derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _op(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _Linear.apply(grad, weight.t(), None) if to_x else None,
            _Linear.apply(grad.t(), x.t(), None) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of rows: x [T, I], weight [O, I], bias [O] -> [T, O].

    float32 on a CPU runs in oneDNN, everything else and what is traced or exported in torch. Differentiable any number
    of times, also under torch.func and, with backward(), under torch.compile.
    """
    fast = _HAS_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2
    fast = fast and not traced_transform() and not leaves_python()
    return _Linear.apply(x, weight, bias) if fast else F.linear(x, weight, bias)
