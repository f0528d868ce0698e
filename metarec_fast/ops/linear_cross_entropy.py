"""linear_cross_entropy: softmax cross-entropy over an item table, in tiles, without a [T, V] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._register import Backend, check_tensor, choose_backend, define, empty
from metarec_fast.reference.linear_cross_entropy import linear_cross_entropy as reference_linear_cross_entropy


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _forward_cpu(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    h, table, targets, bias = (x if x is None else x.contiguous() for x in (h, table, targets, bias))
    (T, D), V = h.shape, table.shape[0]
    loss, lse = (empty((T,), dtype=h.dtype, device=h.device) for _ in range(2))
    _C.linear_cross_entropy_forward(*map(_address, (h, table, targets, bias, loss, lse)), T=T, V=V, D=D)
    return loss, lse


def _backward_cpu(
    grad: Tensor,
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    need_h: bool,
    need_table: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [x if x is None else x.contiguous() for x in (grad, h, table, targets, bias, lse)]
    (T, D), V = h.shape, table.shape[0]
    shapes = ((T, D) if need_h else (0,), (V, D) if need_table else (0,), (V,) if need_bias else (0,))
    outputs = tuple(empty(shape, dtype=h.dtype, device=h.device) for shape in shapes)
    needs = (need_h, need_table, need_bias)
    addresses = (x.data_ptr() if need else 0 for x, need in zip(outputs, needs, strict=True))
    _C.linear_cross_entropy_backward(*map(_address, inputs), *addresses, T=T, V=V, D=D)
    return outputs


def _backward_fake(grad, h, table, targets, bias, lse, need_h, need_table, need_bias):
    V = table.shape[0]
    return (
        h.new_empty(h.shape if need_h else (0,)),
        h.new_empty(table.shape if need_table else (0,)),
        h.new_empty((V,) if need_bias else (0,)),
    )


def _loop(run: Callable) -> Callable:
    """A batch of problems has a table each: one call for each is already as parallel as the machine."""

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            run()(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return vmap


_forward = define(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? bias) -> (Tensor loss, Tensor lse)",
    cpu=_forward_cpu,
    fake=lambda h, table, targets, bias: (h.new_empty(h.shape[0]), h.new_empty(h.shape[0])),
    vmap=_loop(lambda: _forward),
)
_backward = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, Tensor lse, "
    "bool need_h, bool need_table, bool need_bias) -> (Tensor grad_h, Tensor grad_table, Tensor grad_bias)",
    cpu=_backward_cpu,
    fake=_backward_fake,
    vmap=_loop(lambda: _backward),
)


class _LinearCrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(h, table, targets, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*inputs, lse)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        h, table, targets, bias, lse = ctx.saved_tensors
        need_h, need_table, _, need_bias = ctx.needs_input_grad
        grads = _LinearCrossEntropyBackward.apply(
            grad_loss, h, table, targets, bias, lse, need_h, need_table, need_bias
        )
        grad_h, grad_table, grad_bias = (
            grad if need else None for grad, need in zip(grads, (need_h, need_table, need_bias), strict=True)
        )
        return grad_h, grad_table, None, grad_bias


class _LinearCrossEntropyBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("todo")


def linear_cross_entropy(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    check_tensor(h, "h", dtypes=(torch.float32, torch.float64), dims=2)
    check_tensor(table, "table", dtypes=(h.dtype,), dims=2, device=h.device)
    check_tensor(targets, "targets", dtypes=(torch.int64,), dims=1, device=h.device)
    T, D = h.shape
    if table.shape[1] != D:
        raise ValueError(f"table must be [V, {D}] to match h, got {tuple(table.shape)}")
    if table.shape[0] == 0:
        raise ValueError(f"table must have at least one row, got {tuple(table.shape)}")
    if targets.shape[0] != T:
        raise ValueError(f"targets must be [{T}] to match h, got {tuple(targets.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", dtypes=(h.dtype,), dims=1, device=h.device)
        if bias.shape[0] != table.shape[0]:
            raise ValueError(f"bias must be [{table.shape[0]}] to match table, got {tuple(bias.shape)}")
    chosen = choose_backend(backend, h.device, operator="linear_cross_entropy", triton=False)
    if chosen == "reference" or h.dtype == torch.float64:
        return reference_linear_cross_entropy(h, table, targets, bias)
    loss, _ = _LinearCrossEntropy.apply(h, table, targets, bias)
    return loss
