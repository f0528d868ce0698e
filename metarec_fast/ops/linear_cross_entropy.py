"""linear_cross_entropy: softmax cross-entropy over an item table, in tiles, without a [T, V] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._register import Backend, check_tensor, choose_backend, define, empty, traced_transform
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
    needs = (need_h, need_table, need_bias)
    outputs = [empty(shape, dtype=h.dtype, device=h.device) for shape in _shapes(h, table, *needs)]
    asked = (x if need else None for x, need in zip(outputs, needs, strict=True))
    (T, D), V = h.shape, table.shape[0]
    _C.linear_cross_entropy_backward(*map(_address, inputs), *map(_address, asked), T=T, V=V, D=D)
    return tuple(outputs)


def _double_backward_cpu(
    grad: Tensor,
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    u: Tensor | None,
    w: Tensor | None,
    c: Tensor | None,
    need_h: bool,
    need_table: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x if x is None else x.contiguous() for x in (grad, h, table, targets, bias, lse, u, w, c)]
    needs = (True, need_h, need_table, need_bias)
    shapes = (grad.shape, *_shapes(h, table, *needs[1:]))
    outputs = [empty(tuple(shape), dtype=h.dtype, device=h.device) for shape in shapes]
    asked = (x if need else None for x, need in zip(outputs, needs, strict=True))
    (T, D), V = h.shape, table.shape[0]
    _C.linear_cross_entropy_double_backward(*map(_address, inputs), *map(_address, asked), T=T, V=V, D=D)
    return tuple(outputs)


def _shapes(h: Tensor, table: Tensor, need_h: bool, need_table: bool, need_bias: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of the gradients of h, table and bias; those that nobody needs are empty."""
    (T, D), V = h.shape, table.shape[0]
    return (T, D) if need_h else (0,), (V, D) if need_table else (0,), (V,) if need_bias else (0,)


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
    fake=lambda grad, h, table, targets, bias, lse, *needs: tuple(map(h.new_empty, _shapes(h, table, *needs))),
    vmap=_loop(lambda: _backward),
)


_double_backward = define(
    "linear_cross_entropy_double_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, "
    "Tensor lse, Tensor? u, Tensor? w, Tensor? c, bool need_h, bool need_table, bool need_bias) "
    "-> (Tensor grad_grad, Tensor grad_h, Tensor grad_table, Tensor grad_bias)",
    cpu=_double_backward_cpu,
    fake=lambda grad, h, table, targets, bias, lse, u, w, c, *needs: (
        h.new_empty(h.shape[0]),
        *map(h.new_empty, _shapes(h, table, *needs)),
    ),
    vmap=_loop(lambda: _double_backward),
)


class _Loss(torch.autograd.Function):
    """(h, table, targets, bias) -> (loss, lse)."""

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
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grads = _Gradient.apply(grad_loss, *ctx.saved_tensors, *needs)
        grad_h, grad_table, grad_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return grad_h, grad_table, None, grad_bias


class _Gradient(torch.autograd.Function):
    """The gradients of <grad, loss>, and as its own gradient the whole derivative: lse counts as a function of h."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        return _backward(grad, h, table, targets, bias, lse, need_h, need_table, need_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.needs = inputs[6:]
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        u, w, c = (x if need else None for x, need in zip(cotangents, ctx.needs, strict=True))
        needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        grads = _SecondGradient.apply(*ctx.saved_tensors, u, w, c, *needs)
        grad_grad, grad_h, grad_table, grad_bias = (
            grad if need else None for grad, need in zip(grads, (ctx.needs_input_grad[0], *needs), strict=True)
        )
        return grad_grad, grad_h, grad_table, None, grad_bias, None, None, None, None


class _SecondGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        h: Tensor,
        table: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        u: Tensor | None,
        w: Tensor | None,
        c: Tensor | None,
        need_h: bool,
        need_table: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _double_backward(grad, h, table, targets, bias, lse, u, w, c, need_h, need_table, need_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "linear_cross_entropy has two derivatives; for a third one pass backend='reference', which torch "
            "differentiates any number of times"
        )


def linear_cross_entropy(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Softmax cross-entropy of every row over all items, without a [T, V] tensor in memory.

    loss_t = log sum_v exp(logit_tv) - logit_(t, target_t), with logit_tv = <h_t, table_v> + bias_v.

    h: [T, D] float32 or float64, for example the packed states of an encoder.
    table: [V, D] item vectors, V >= 1, dtype of h.
    targets: [T] int64 in [0, V).
    bias: [V], dtype of h, or None. An item of bias -inf is left out.
    backend: "auto", "reference" or "cpu".

    Returns loss: [T], not weighted or averaged. Rows whose loss gets a gradient of zero cost nothing in the first
    backward pass, so rows are ignored by a weight of zero.

    The fused CPU path is for float32. It computes the logits of a tile again in the backward pass and needs memory of
    order (T + V) D. It is differentiable twice in h, table and bias, also under torch.func and, with backward(), under
    torch.compile; a third derivative raises RuntimeError. Results do not depend on the number of threads.

    float64 runs the reference composition, which keeps [T, V] tensors and is differentiable any number of times. So
    does "auto" where torch.compile traces a torch.func transform, as torch would lose the gradient of the fused path
    there; "cpu" then raises RuntimeError.

    Raises TypeError or ValueError for arguments of another dtype, shape or device, and on the fused path ValueError
    for a target outside [0, V).
    """
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
    if chosen == "cpu" and traced_transform():
        if backend == "cpu":
            raise RuntimeError(
                "linear_cross_entropy: backend='cpu' has no gradient where torch.compile traces torch.func; use "
                "backend='auto' or 'reference', or leave this part out of the compiled code"
            )
        chosen = "reference"
    if chosen == "reference" or h.dtype == torch.float64:
        return reference_linear_cross_entropy(h, table, targets, bias)
    loss, _ = _Loss.apply(h, table, targets, bias)
    return loss
