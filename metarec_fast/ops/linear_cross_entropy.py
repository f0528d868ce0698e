"""linear_cross_entropy: softmax cross-entropy over an item table, in tiles, without a [T, V] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.register import (
    Backend,
    check_tensor,
    choose_backend,
    define,
    empty,
    traced_transform,
    transformed,
)
from metarec_fast.reference.linear_cross_entropy import linear_cross_entropy as reference_linear_cross_entropy

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")
_ELEMENTS = 1 << 24  # of a composed [rows, V] tensor
Gradients = tuple[Tensor, Tensor, Tensor]  # of h, table and bias; those that nobody needs are empty


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _logits(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> _C.LinearLogits:
    """Holds the addresses of contiguous tensors, which must outlive it."""
    (T, D), V = h.shape, table.shape[0]
    return _C.LinearLogits(*map(span, (h, table, targets, bias)), T=T, V=V, D=D, ignored=ignored)


def _shapes(h: Tensor, table: Tensor, need_h: bool, need_table: bool, need_bias: bool) -> tuple[tuple[int, ...], ...]:
    (T, D), V = h.shape, table.shape[0]
    return (T, D) if need_h else (0,), (V, D) if need_table else (0,), (V,) if need_bias else (0,)


def _gradients(h: Tensor, table: Tensor, *needs: bool) -> tuple[Gradients, _C.LinearGradients]:
    """Room for the gradients that are needed, and its addresses."""
    tensors = tuple(empty(shape, dtype=h.dtype, device=h.device) for shape in _shapes(h, table, *needs))
    return tensors, _C.LinearGradients(*(span(x) if need else None for x, need in zip(tensors, needs, strict=True)))


def _per_row(h: Tensor, count: int) -> list[Tensor]:
    return [empty((h.shape[0],), dtype=h.dtype, device=h.device) for _ in range(count)]


def _forward_cpu(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
    h, table, targets, bias = _contiguous(h, table, targets, bias)
    loss, lse = _per_row(h, 2)
    _C.linear_cross_entropy_forward(_logits(h, table, targets, bias, ignored), span(loss), span(lse))
    return loss, lse


def _backward_cpu(
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


def _sum_cpu(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor, ignored: int, *needs: bool
) -> tuple[Tensor, ...]:
    h, table, targets, bias, weight = _contiguous(h, table, targets, bias, weight)
    total, (loss, lse) = empty((), dtype=h.dtype, device=h.device), _per_row(h, 2)
    grads, out = _gradients(h, table, *needs)
    logits = _logits(h, table, targets, bias, ignored)
    _C.linear_cross_entropy_sum(logits, *map(span, (weight, total, loss, lse)), out)
    return total, loss, lse, *grads


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
    ignored: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    grad, h, table, targets, bias, lse, u, w, c = _contiguous(grad, h, table, targets, bias, lse, u, w, c)
    (grad_grad,), (grads, out) = _per_row(h, 1), _gradients(h, table, *needs)
    by = _C.LinearGradients(*map(span, (u, w, c)))
    logits = _logits(h, table, targets, bias, ignored)
    _C.linear_cross_entropy_double_backward(logits, span(lse), span(grad), by, span(grad_grad), out)
    return grad_grad, *grads


def _forward_cuda(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int
) -> tuple[Tensor, Tensor]:
    from metarec_fast.kernels.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(h, table, targets, bias, ignored)


def _backward_cuda(*args: Any) -> Gradients:
    from metarec_fast.kernels.linear_cross_entropy import linear_cross_entropy_backward

    return linear_cross_entropy_backward(*args)


def _sum_cuda(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor, ignored: int, *needs: bool
) -> tuple[Tensor, ...]:
    loss, lse = _forward_cuda(h, table, targets, bias, ignored)
    return (weight * loss).sum(), loss, lse, *_backward_cuda(weight, h, table, targets, bias, lse, ignored, *needs)


def _double_backward_cuda(
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
    grad_grad, grads = torch.zeros_like(grad), [h.new_zeros(shape) for shape in _shapes(h, table, *needs)]
    rows = max(1, _ELEMENTS // table.shape[0])
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


def _batched(run: Callable, rows: str, needs: bool = True) -> Callable:
    """vmap of an operator whose tensors named in ``rows``, by position, have a row for each state.

    Batches that share the table are one call over all their rows, unless each wants a table's gradient of its own. Such
    calls, and those with a table each, run one after the other: each is already as parallel as the machine.
    """

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        S = info.batch_size
        by_row = [str(i) in rows.split() for i in range(len(args))]
        one_table = all(dim is None for dim, row in zip(in_dims, by_row, strict=True) if not row)
        if one_table and not (needs and any(args[-2:])):
            flat = [
                (x.expand(S, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
                if row and x is not None
                else x
                for x, dim, row in zip(args, in_dims, by_row, strict=True)
            ]
            outputs = tuple(x.unflatten(0, (S, -1)) if x.numel() else x.expand(S, 0) for x in run()(*flat))
        else:
            calls = [
                run()(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(S)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return vmap


_NEEDS = "bool need_h, bool need_table, bool need_bias"
_GRADS = "Tensor grad_h, Tensor grad_table, Tensor grad_bias"

_forward = define(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? bias, int ignored) -> (Tensor loss, "
    "Tensor lse)",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=lambda h, table, targets, bias, ignored: (h.new_empty(h.shape[0]), h.new_empty(h.shape[0])),
    vmap=_batched(lambda: _forward, rows="0 2", needs=False),
)
_backward = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, Tensor lse, "
    f"int ignored, {_NEEDS}) -> ({_GRADS})",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=lambda grad, h, table, targets, bias, lse, ignored, *needs: tuple(map(h.new_empty, _shapes(h, table, *needs))),
    vmap=_batched(lambda: _backward, rows="0 1 3 5"),
)
_double_backward = define(
    "linear_cross_entropy_double_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, "
    f"Tensor lse, Tensor? u, Tensor? w, Tensor? c, int ignored, {_NEEDS}) -> (Tensor grad_grad, {_GRADS})",
    cpu=_double_backward_cpu,
    cuda=_double_backward_cuda,
    fake=lambda grad, h, table, targets, bias, lse, u, w, c, ignored, *needs: (
        h.new_empty(h.shape[0]),
        *map(h.new_empty, _shapes(h, table, *needs)),
    ),
    vmap=_batched(lambda: _double_backward, rows="0 1 3 5 6"),
)


def _sum_vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    def rows_of_sums(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, weight: Tensor, *rest: Any):
        """Without the total, of which every batch has its own."""
        return _sum(h, table, targets, bias, weight, *rest)[1:]

    outputs, dims = _batched(lambda: rows_of_sums, rows="0 2 4")(info, in_dims, *args)
    weight, dim = args[4], in_dims[4]
    weight = weight if dim is None else weight.movedim(dim, 0)
    total = (weight.double() * outputs[0]).sum(1).to(weight.dtype)
    return (total, *outputs), (0, *dims)


_sum = define(
    "linear_cross_entropy_sum(Tensor h, Tensor table, Tensor targets, Tensor? bias, Tensor weight, int ignored, "
    f"{_NEEDS}) -> (Tensor total, Tensor loss, Tensor lse, {_GRADS})",
    cpu=_sum_cpu,
    cuda=_sum_cuda,
    fake=lambda h, table, targets, bias, weight, ignored, *needs: (
        h.new_empty(()),
        h.new_empty(h.shape[0]),
        h.new_empty(h.shape[0]),
        *map(h.new_empty, _shapes(h, table, *needs)),
    ),
    vmap=_sum_vmap,
)


class _Loss(torch.autograd.Function):
    """(h, table, targets, bias, ignored) -> (loss, lse)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> tuple[Tensor, Tensor]:
        return _forward(h, table, targets, bias, ignored)

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


class _Sum(torch.autograd.Function):
    """(h, table, targets, bias, weight, ignored, three needs) -> <weight, loss>, with the gradients found on the way.

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
        total, _, lse, *grads = _sum(h, table, targets, bias, weight, ignored, need_h, need_table, need_bias)
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
            grad_weight = grad * _Loss.apply(h, table, targets, bias, ctx.ignored)[0]
        return grad_h, grad_table, None, grad_bias, grad_weight, None, None, None, None


def _is_one(grad: Tensor) -> bool:
    """Whether a factor, and a pass over the table's gradient, can be left out; known in plain backward() only."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return False
    return grad.device.type == "cpu" and grad.item() == 1.0


class _Gradient(torch.autograd.Function):
    """The gradients of <grad, loss>, and as its own gradient the whole derivative: lse counts as a function of h.

    known: these gradients up to the factor scale, if they have been found already. They count as constants here, as
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
            return _backward(grad, h, table, targets, bias, lse, ignored, need_h, need_table, need_bias)
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
        return _double_backward(grad, h, table, targets, bias, lse, u, w, c, ignored, need_h, need_table, need_bias)

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
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0,  # no float: torch.compile would make a symbol of it, and trace twice
    backend: Backend = "auto",
) -> Tensor:
    """Softmax cross-entropy of every row over all items, without a [T, V] tensor in memory.

    loss_t = log sum_v exp(logit_tv) - logit_(t, target_t), with logit_tv = <h_t, table_v> + bias_v.

    h: [T, D] float32 or float64, for example the packed states of an encoder. States of several batches over one
        table are cheapest as one call: h.flatten(0, 1), which is also what vmap over h does.
    table: [V, D] item vectors, V >= 1, dtype of h.
    targets: [T] int64 in [0, V), or ignore_index.
    bias: [V], dtype of h, or None. An item of bias -inf is left out.
    row_weight: [T], dtype of h, multiplies the losses.
    reduction: "none"; "sum" of the weighted losses; or "mean", the sum over the sum of the weights (without
        row_weight, over the number) of rows that are not ignored, NaN if there is none. A scalar finds its gradients
        already in the forward pass, with a quarter less arithmetic: prefer it to reducing the losses afterwards.
    ignore_index: rows of this target have loss and gradients 0 and cost nothing.
    label_smoothing: in [0, 1], the part of the target's probability that is spread evenly over all items.
    backend: "auto", "reference", "cpu" or "triton".

    Returns loss: [T], or [] if reduced. Rows whose loss gets a gradient of zero cost nothing in the first backward
    pass of reduction "none".

    The fused paths are for float32. They are differentiable twice in h, table, bias and row_weight, also under
    torch.func and, with backward(), under torch.compile; a third derivative raises RuntimeError. The CPU path needs
    memory of order (T + V) D and up to 16 MB for a block of rows, and does not depend on the number of threads. The
    Triton path repeats to the bit; its second derivative is composed of torch's products, for a few rows at a time.

    float64 runs the reference composition, which keeps [T, V] tensors and is differentiable any number of times. So
    does "auto" where torch.compile traces a torch.func transform, as torch would lose the gradient of the fused path
    there; "cpu" and "triton" then raise RuntimeError.

    Raises TypeError or ValueError for arguments of another dtype, shape or device, and on the fused CPU path ValueError
    for a target outside [0, V) that is not ignore_index; on a GPU targets are trusted, as a look would wait for it.
    """
    _check(h, table, targets, bias, row_weight, reduction, label_smoothing)
    chosen = choose_backend(backend, h.device, operator="linear_cross_entropy", triton=True)
    if chosen != "reference" and traced_transform():
        if backend != "auto":
            raise RuntimeError(
                f"linear_cross_entropy: backend={backend!r} has no gradient where torch.compile traces torch.func; use "
                "backend='auto' or 'reference', or leave this part out of the compiled code"
            )
        chosen = "reference"
    of_nothing = reduction == "mean" and h.shape[0] == 0  # NaN, as the sum of no weights divides
    if chosen == "reference" or h.dtype == torch.float64 or of_nothing:
        return reference_linear_cross_entropy(
            h,
            table,
            targets,
            bias,
            row_weight=row_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    if reduction == "none":
        loss, _ = _Loss.apply(h, table, targets, bias, ignore_index)
        if label_smoothing:
            loss = loss + label_smoothing * _target_excess(h, table, targets, bias, ignore_index)
        return loss if row_weight is None else row_weight * loss
    weight = (targets != ignore_index).to(h.dtype)
    if row_weight is not None:
        weight = weight * row_weight
    if reduction == "mean":
        weight = weight / weight.sum()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (h, table, bias)]
    loss = _Sum.apply(h, table, targets, bias, weight, ignore_index, *needs)[0]
    if label_smoothing:
        loss = loss + label_smoothing * (weight * _target_excess(h, table, targets, bias, ignore_index)).sum()
    return loss


def _target_excess(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> Tensor:
    """The target's logit over the mean of all items': [T], 0 where ignored. It needs no other logits."""
    keep = targets != ignored
    target = targets.where(keep, 0)
    direction = torch.nn.functional.embedding(target, table) - table.mean(0)
    excess = (h.masked_fill(~keep[:, None], 0.0) * direction).sum(1)
    return (excess if bias is None else excess + (bias[target] - bias.mean())).masked_fill(~keep, 0.0)


def _check(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    check_tensor(h, "h", dtypes=(torch.float32, torch.float64), dims=2)
    check_tensor(table, "table", dtypes=(h.dtype,), dims=2, device=h.device)
    check_tensor(targets, "targets", dtypes=(torch.int64,), dims=1, device=h.device)
    (T, D), V = h.shape, table.shape[0]
    if table.shape[1] != D:
        raise ValueError(f"table must be [V, {D}] to match h, got {tuple(table.shape)}")
    if V == 0:
        raise ValueError(f"table must have at least one row, got {tuple(table.shape)}")
    if targets.shape[0] != T:
        raise ValueError(f"targets must be [{T}] to match h, got {tuple(targets.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", dtypes=(h.dtype,), dims=1, device=h.device)
        if bias.shape[0] != V:
            raise ValueError(f"bias must be [{V}] to match table, got {tuple(bias.shape)}")
    if row_weight is not None:
        check_tensor(row_weight, "row_weight", dtypes=(h.dtype,), dims=1, device=h.device)
        if row_weight.shape[0] != T:
            raise ValueError(f"row_weight must be [{T}] to match h, got {tuple(row_weight.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
