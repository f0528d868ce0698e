"""The loss as a function that torch differentiates, twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast.ops.linear_cross_entropy import operators
from metarec_fast.ops.linear_cross_entropy.shapes import Gradients
from metarec_fast.ops.register import transformed


class Loss(torch.autograd.Function):
    """(h, table, targets, bias, ignored) -> (loss, lse)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
        return operators.forward(h, table, targets, bias, ignored)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.ignored = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*tensors, lse)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grads = _Gradient.apply(grad_loss, *ctx.saved_tensors, ctx.ignored, *needs, None, None, None, None)
        grad_h, grad_table, grad_bias = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return grad_h, grad_table, None, grad_bias, None


class WeightedSum(torch.autograd.Function):
    """(h, table, targets, bias, weight, ignored, three needs) -> <weight, loss>, and the gradients in the same pass.

    The other outputs are lse and the gradients for a cotangent of 1: what the backward pass of a scalar has to scale.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        h: Tensor,
        table: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        ignored: int,
        need_h: bool,
        need_table: bool,
        need_bias: bool,
    ) -> tuple[Tensor, ...]:
        total, _, lse, *grads = operators.weighted_sum(
            h, table, targets, bias, weight, ignored, need_h, need_table, need_bias
        )
        return total, lse, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.ignored, ctx.known = inputs[5], inputs[6:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for those would be as large as the table
        ctx.save_for_backward(*inputs[:5], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h, table, targets, bias, weight, lse, *known = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        if any(need and not has for need, has in zip(needs, ctx.known, strict=True)):
            known = None  # a transform hid from the forward pass what would be differentiated
        if known is not None and _is_one(grad):
            grads = known
        else:
            scale_and_known = (None, None, None, None) if known is None else (grad, *known)
            inputs = (h, table, targets, bias, lse, ctx.ignored)
            grads = _Gradient.apply(grad * weight, *inputs, *needs, *scale_and_known)
        grad_h, grad_table, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
        grad_weight = None
        if ctx.needs_input_grad[4]:
            grad_weight = grad * Loss.apply(h, table, targets, bias, ctx.ignored)[0]
        return grad_h, grad_table, None, grad_bias, grad_weight, None, None, None, None


def _is_one(grad: Tensor) -> bool:
    """Whether a factor, and a pass over the table's gradient, can be left out; known in plain backward() only."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return False
    return grad.device.type == "cpu" and grad.item() == 1.0


class _Gradient(torch.autograd.Function):
    """The gradients of <grad, loss>, and as its own gradient the whole derivative: lse counts as a function of h.

    known: these gradients up to the factor scale, if the forward pass has computed them. They count as constants here:
    what they depend on comes in by the other arguments.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        h: Tensor,
        table: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        lse: Tensor,
        ignored: int,
        need_h: bool,
        need_table: bool,
        need_bias: bool,
        scale: Tensor | None,
        known_h: Tensor | None,
        known_table: Tensor | None,
        known_bias: Tensor | None,
    ) -> Gradients:
        if scale is None:
            return operators.backward(grad, h, table, targets, bias, lse, ignored, need_h, need_table, need_bias)
        known, needs = (known_h, known_table, known_bias), (need_h, need_table, need_bias)
        return tuple(scale * x if need else x.new_empty(0) for x, need in zip(known, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.ignored, ctx.needs = inputs[6], inputs[7:10]
        ctx.set_materialize_grads(False)  # zeros for a gradient that nobody used would cost whole products
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        u, w, c = (x if need else None for x, need in zip(cotangents, ctx.needs, strict=True))
        needs = (ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        grads = _SecondGradient.apply(*ctx.saved_tensors, u, w, c, ctx.ignored, *needs)
        grad_grad, grad_h, grad_table, grad_bias = (
            grad if need else None for grad, need in zip(grads, (ctx.needs_input_grad[0], *needs), strict=True)
        )
        return grad_grad, grad_h, grad_table, None, grad_bias, *(None,) * 9


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
        ignored: int,
        need_h: bool,
        need_table: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return operators.double_backward(
            grad, h, table, targets, bias, lse, u, w, c, ignored, need_h, need_table, need_bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "linear_cross_entropy has two derivatives; for a third one pass backend='reference', which torch "
            "differentiates any number of times"
        )
