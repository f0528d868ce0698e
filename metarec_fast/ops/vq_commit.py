"""vq_commit: codebook lookup, gather and commitment loss in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.codebook_checks import (
    Metric,
    add_head,
    batched_lookup,
    check_metric,
    check_pair,
    check_row_weight,
)
from metarec_fast.ops.gradient_estimators import GRADIENT_ESTIMATORS
from metarec_fast.ops.nearest_codeword import index_op as nearest_index
from metarec_fast.ops.nearest_codeword import op as nearest_op
from metarec_fast.ops.portable_lookup import leaves_python, portable_nearest
from metarec_fast.ops.register import Backend, choose_backend, define, empty, traced_transform, transformed
from metarec_fast.ops.row_errors import mean_row_error, row_difference
from metarec_fast.ops.vq_backward import vq_backward
from metarec_fast.reference.nearest_codeword import nearest_codeword as reference_nearest_codeword
from metarec_fast.reference.vq_commit import vq_commit as reference_vq_commit

Gradient = Literal["rotation", "straight_through"]


class VQCommit(NamedTuple):
    """quantized: like x. indices: int64 [N] or [H, N]. loss: 0-dim float32, or float64 if x is."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class Health(NamedTuple):
    """How well the codes separate the rows, a by-product of the lookup.

    margin: float32 [] or [H], by how much the nearest code is nearer than the second (see `nearest_codeword`), the
    mean over every 64th row.
    rechecked: int64 [], rows that took more than the first pass to decide.
    """

    margin: Tensor
    rechecked: Tensor


_MARGIN_EVERY = 64  # a search for the runner-up costs about as much again
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # quantized, indices, row_error, margin, rechecked


def _composed(
    x: Tensor, codebook: Tensor, nearest: Callable, *, codebook_grad: bool = False, unweighted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    indices = nearest(x.detach(), codebook.detach())
    quantized = codebook.gather(1, indices.unsqueeze(-1).expand_as(x))
    target = quantized if codebook_grad else quantized.detach()
    return quantized, indices, row_difference(x, target, unweighted).square().sum(-1)


def _in_float64(x: Tensor, codebook: Tensor, nearest: Callable) -> _Outputs:
    outputs = _composed(x, codebook, lambda *rows: nearest(*rows)[0])
    margin = nearest(x[:, ::_MARGIN_EVERY].contiguous(), codebook)[1]
    return *outputs, _mean(margin), torch.full((), x.shape[0] * x.shape[1], device=x.device)


def _mean(margin: Tensor) -> Tensor:
    return margin.sum(-1) / max(1, margin.shape[-1])


def _cpu(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> _Outputs:
    if x.dtype == torch.float64:
        return _in_float64(x, codebook, partial(nearest_op, metric=metric))
    x, codebook = x.contiguous(), codebook.contiguous()
    H, N, D = x.shape
    quantized = empty((H, N, D), dtype=x.dtype, device=x.device)
    indices = empty((H, N), dtype=torch.int64, device=x.device)
    row_error = empty((H, N), dtype=x.dtype, device=x.device)
    margin = empty((H, -(-N // _MARGIN_EVERY)), dtype=x.dtype, device=x.device)
    rechecked = empty((), dtype=torch.int64, device=x.device)
    _C.vq_commit(
        *map(span, (x, codebook, quantized, indices, row_error, margin, rechecked)),
        margin_every=_MARGIN_EVERY,
        heads=H,
        rows=N,
        codes=codebook.shape[1],
        dim=D,
        metric=metric,
    )
    return quantized, indices, row_error, _mean(margin), rechecked


def _cuda(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> _Outputs:
    if x.dtype == torch.float64:
        return _in_float64(x, codebook, partial(reference_nearest_codeword, metric=metric))
    from metarec_fast.kernels.vq_commit import vq_commit

    *outputs, margin, undecided = vq_commit(x.contiguous(), codebook.contiguous(), metric=metric)
    return *outputs, _mean(margin[:, ::_MARGIN_EVERY]), undecided[0].long()


def _fake(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> _Outputs:
    H, N, D = x.shape
    indices, rechecked = (x.new_empty(shape, dtype=torch.int64) for shape in ((H, N), ()))
    return x.new_empty((H, N, D)), indices, x.new_empty((H, N)), x.new_empty((H,), dtype=torch.float32), rechecked


def _vmap(info: Any, in_dims: tuple, x: Tensor, codebook: Tensor, metric: Metric = "distance") -> tuple[tuple, tuple]:
    health = []

    def run(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        outputs = _op(x, codebook, metric)
        health.extend(outputs[3:])
        return outputs[:3]

    # health is that of the whole batch
    outputs, out_dims = batched_lookup(info, in_dims, x, codebook, run)
    return (*outputs, *health), (*out_dims, None, None)


_op = define(
    'vq_commit(Tensor x, Tensor codebook, str metric="distance") -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    vmap=_vmap,
)


class _Commit(torch.autograd.Function):
    """Gradients from x and the quantized rows alone; one fused pass, or torch operations to be differentiated again.

    With ``gradient`` the quantized rows pass gradient to x, else to the codebook; not with codebook_grad.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, codebook_grad: bool, gradient: Gradient | None, metric: Metric
    ) -> _Outputs:
        return _op(x, codebook, metric)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, codebook, ctx.codebook_grad, ctx.gradient, _ = inputs
        quantized, indices, _, *health = output
        ctx.codes = codebook.shape[-2]
        ctx.mark_non_differentiable(indices, *health)
        ctx.set_materialize_grads(False)
        # not the codebook: an EMA step may change it in place before backward
        ctx.save_for_backward(x, quantized, indices)

    @staticmethod
    def backward(ctx: Any, grad_quantized: Tensor | None, _: Any, grad_error: Tensor | None, *__: Any) -> tuple:
        x, quantized, indices = ctx.saved_tensors
        target = quantized if ctx.codebook_grad else quantized.detach()
        to_x, to_codes = (None, grad_quantized) if ctx.gradient is None else (grad_quantized, None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = vq_backward(to_x, grad_error, x, target, rotation=ctx.gradient == "rotation")
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None, None
        if ctx.codebook_grad and grad_error is not None:
            pulled = vq_backward(None, grad_error, x, target, rotation=False)
            to_codes = -pulled if to_codes is None else to_codes - pulled
        H, _, D = x.shape
        if to_codes is None:
            return grad_x, x.new_zeros(H, ctx.codes, D), None, None, None
        head_H1 = torch.arange(H, device=x.device).unsqueeze(1) * ctx.codes
        grad_codebook = to_codes.new_zeros(H * ctx.codes, D).index_add(
            0, (indices + head_H1).reshape(-1), to_codes.reshape(-1, D)
        )
        return grad_x, grad_codebook.view(H, ctx.codes, D), None, None, None


def vq_commit(
    x: Tensor,
    codebook: Tensor,
    *,
    row_weight: Tensor | None = None,
    codebook_grad: bool = False,
    gradient: Gradient | None = None,
    metric: Metric = "distance",
    backend: Backend = "auto",
) -> VQCommit:
    """The nearest code of each row, its index, and the mean squared error between the rows and their codes.

    x: [N, D] or [H, N, D], float32, float16, bfloat16 or float64.
    codebook: [K, D] or [H, K, D], one codebook per head; K >= 1.
    row_weight: [N] floating point or bool; the loss is the weighted mean (a mask, or multiplicities), 0 if the
        weights sum to 0. A row of weight 0 may hold NaN or infinity. The weights get a gradient.
    codebook_grad: let the loss move the codebook too; by default the loss sees it as constant.
    gradient: where the gradient of quantized goes: None, to the codebook; "rotation" or "straight_through", to x by
        that estimator and in the same pass as the loss's (see `metarec_fast.vq.rotate_to`, `straight_through`).
    metric: what makes a code the nearest, "distance" or "product" (see `nearest_codeword`).
    backend: "auto", "reference", "cpu" or "triton".

    Returns quantized (dtype and shape of x), indices (see `nearest_codeword`) and the 0-dim loss, float32 unless an
    input is float64. The gradient of the loss to x is 2 (x - quantized) * weight / (sum of weights * D).
    Twice differentiable; works under torch.func and torch.compile.
    Raises TypeError or ValueError for arguments of another dtype, shape or device, and for an unknown ``gradient`` or
    ``metric``.
    """
    options = {"row_weight": row_weight, "codebook_grad": codebook_grad, "gradient": gradient, "metric": metric}
    return vq_commit_with_health(x, codebook, **options, backend=backend)[0]


def vq_commit_with_health(
    x: Tensor,
    codebook: Tensor,
    *,
    row_weight: Tensor | None = None,
    codebook_grad: bool = False,
    gradient: Gradient | None = None,
    metric: Metric = "distance",
    backend: Backend = "auto",
) -> tuple[VQCommit, Health | None]:
    """`vq_commit`, and the health of the codes, a by-product of the same pass.

    Health is None where it is not computed: from the reference, in a torch.func transform that is compiled, and in
    a program that is traced or exported.
    """
    dtype = check_pair(x, codebook)
    check_row_weight(row_weight, x)
    check_metric(metric)
    if gradient is not None and gradient not in GRADIENT_ESTIMATORS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENT_ESTIMATORS)} or None, got {gradient!r}")
    if choose_backend(backend, x.device, operator="vq_commit", triton=True) == "reference":
        options = {"row_weight": row_weight, "codebook_grad": codebook_grad, "gradient": gradient, "metric": metric}
        return VQCommit(*reference_vq_commit(x, codebook, **options)), None
    x_HND, codebook_HKD = add_head(x.to(dtype)), add_head(codebook.to(dtype))
    # codes that learn must reach the loss past the estimator, which then is a step of its own
    composed = leaves_python() or traced_transform()
    fused = gradient is not None and not codebook_grad and not composed
    health = None
    if composed:
        nearest = partial(portable_nearest if leaves_python() else nearest_index, metric=metric)
        options = {"codebook_grad": codebook_grad, "unweighted": None if row_weight is None else row_weight == 0}
        quantized, indices, row_error = _composed(x_HND, codebook_HKD, nearest, **options)
    else:
        needs_grad = torch.is_grad_enabled() and (x_HND.requires_grad or codebook_HKD.requires_grad)
        if needs_grad or transformed():
            outputs = _Commit.apply(x_HND, codebook_HKD, codebook_grad, gradient if fused else None, metric)
        else:  # an autograd.Function costs as much as a small lookup
            outputs = _op(x_HND, codebook_HKD, metric)
        quantized, indices, row_error, margin, rechecked = outputs
        health = Health(margin if x.dim() == 3 else margin[0], rechecked)
    if gradient is not None and not fused:
        quantized = GRADIENT_ESTIMATORS[gradient](x_HND, quantized)
    loss = mean_row_error(row_error, row_weight, x.shape[-1])
    if x.dim() == 2:
        quantized, indices = quantized[0], indices[0]
    return VQCommit(quantized.to(x.dtype), indices, loss), health
