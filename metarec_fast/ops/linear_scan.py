"""linear_scan: diagonal complex recurrence over packed rows, restarting at each offset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.register import Backend, check_tensor, choose_backend, define, empty, traced_transform
from metarec_fast.reference.linear_scan import linear_scan as reference_linear_scan


def _sizes(u: Tensor, offsets: Tensor, reverse: bool) -> dict[str, Any]:
    return {
        "segments": offsets.numel() - 1,
        "rows": u.shape[0],
        "width": u.shape[2],
        "reverse": reverse,
    }


def _cpu(a: Tensor, u: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    a, u, offsets = a.contiguous(), u.contiguous(), offsets.contiguous()
    h = empty(tuple(u.shape), dtype=u.dtype, device=u.device)
    _C.linear_scan(*map(span, (a, u, offsets, h)), **_sizes(u, offsets, reverse))
    return h


def _backward_cpu(a: Tensor, h: Tensor, grad_h: Tensor, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    inputs = [x.contiguous() for x in (a, h, grad_h, offsets)]
    outputs = [empty(tuple(x.shape), dtype=h.dtype, device=h.device) for x in (a, h)]
    _C.linear_scan_backward(*map(span, (*inputs, *outputs)), **_sizes(h, offsets, reverse))
    return tuple(outputs)


def _cuda(a: Tensor, u: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    from metarec_fast.kernels.linear_scan import linear_scan

    return linear_scan(a, u, offsets, reverse=reverse)


def _backward_cuda(a: Tensor, h: Tensor, grad_h: Tensor, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    from metarec_fast.kernels.linear_scan import linear_scan_backward

    return linear_scan_backward(a, h, grad_h, offsets, reverse=reverse)


def _channels(info: Any, in_dims: tuple, args: tuple) -> tuple[Tensor, ...]:
    """A batch of scans as one: the recurrence is diagonal, so the batch goes into the channels."""
    *tensors, offsets, reverse = args
    if in_dims[len(tensors)] is not None:
        raise RuntimeError("linear_scan cannot be vmapped over offsets; vmap over a and u, or pack the segments")
    joined = [
        (x.unsqueeze(-2).expand(*x.shape[:-1], info.batch_size, -1) if dim is None else x.movedim(dim, -2)).flatten(-2)
        for x, dim in zip(tensors, in_dims, strict=False)
    ]
    return *joined, offsets, reverse


def _vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
    return _op(*_channels(info, in_dims, args)).unflatten(-1, (info.batch_size, -1)), 2


def _backward_vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    grad_a, grad_u = _backward_op(*_channels(info, in_dims, args))
    return tuple(x.unflatten(-1, (info.batch_size, -1)) for x in (grad_a, grad_u)), (1, 2)


_op = define(
    "linear_scan(Tensor a, Tensor u, Tensor offsets, bool reverse) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda a, u, offsets, reverse: torch.empty_like(u, memory_format=torch.contiguous_format),
    vmap=_vmap,
)
_backward_op = define(
    "linear_scan_backward(Tensor a, Tensor h, Tensor grad_h, Tensor offsets, bool reverse) "
    "-> (Tensor grad_a, Tensor grad_u)",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=lambda a, h, grad_h, offsets, reverse: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, h)
    ),
    vmap=_backward_vmap,
)


def _conjugate(x: Tensor) -> Tensor:
    re, im = x.unbind(-2)
    return torch.stack((re, -im), -2)


def _product(x: Tensor, y: Tensor) -> Tensor:
    (x_re, x_im), (y_re, y_im) = x.unbind(-2), y.unbind(-2)
    return torch.stack((x_re * y_re - x_im * y_im, x_re * y_im + x_im * y_re), -2)


def _before(h: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    """What an event of a scan continues from: the row visited before it, 0 at the first of a segment."""
    T = h.shape[0]
    # T+1 slots, one of them dropped, keep empty segments right
    inside = torch.ones(T + 1, dtype=h.dtype, device=h.device)
    inside = inside.index_fill(0, offsets[1:], 0.0)[1:] if reverse else inside.index_fill(0, offsets[:-1], 0.0)[:T]
    return h.roll(-1 if reverse else 1, 0) * inside[:, None, None]


class _LinearScan(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, u: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
        return _op(a, u, offsets, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        a, _, offsets, ctx.reverse = inputs
        ctx.save_for_backward(a, offsets, output)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        a, offsets, h = ctx.saved_tensors
        return *_Gradient.apply(a, h, grad_h, offsets, ctx.reverse), None, None


class _Gradient(torch.autograd.Function):
    """(a, h, grad_h, offsets, reverse) -> (grad_a, grad_u), in complex numbers

    grad_u = the scan of grad_h by conj(a), the other way;  grad_a = sum_t grad_u_t conj(h_(t-1)).

    Its own gradient has another scan in it, whose gradient is this one: so any number of derivatives.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, h: Tensor, grad_h: Tensor, offsets: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        return _backward_op(a, h, grad_h, offsets, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        a, h, _, offsets, ctx.reverse = inputs
        ctx.save_for_backward(a, h, offsets, output[1])

    @staticmethod
    def backward(ctx: Any, by_a: Tensor, by_u: Tensor) -> tuple[Tensor | None, ...]:
        a, h, offsets, grad_u = ctx.saved_tensors
        by_u = by_u + _product(by_a, _before(h, offsets, ctx.reverse))
        conjugate_a, by_grad_h = _Gradient.apply(_conjugate(a), grad_u, by_u, offsets, not ctx.reverse)
        by_h = _product(_conjugate(by_a), _after(grad_u, offsets, ctx.reverse))
        return _conjugate(conjugate_a), by_h, by_grad_h, None, None


def _after(x: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    """The transpose of _before: the row visited next, 0 at the last of a segment."""
    return _before(x, offsets, not reverse)


def linear_scan(a: Tensor, u: Tensor, offsets: Tensor, *, reverse: bool = False, backend: Backend = "auto") -> Tensor:
    """h_t = a * h_(t-1) + u_t over packed rows, restarting at every offset.

    a: [2, D] float32 or float64, real and imaginary part of the transition.
    u: [T, 2, D] inputs, dtype of a.
    offsets: [B+1] int64, rising from 0 to T; segment b is rows offsets[b] to offsets[b+1].
    reverse: run from the end of each segment to its start.
    backend: "auto", "reference", "cpu" or "triton".

    Returns h: [T, 2, D]. Differentiable any number of times in a and u, also under torch.func and, with backward(),
    under torch.compile. Raises TypeError or ValueError for arguments of another dtype, shape or device, and
    RuntimeError where torch.compile traces a torch.func transform, as torch would lose the gradient there. On a CPU
    ValueError, too, for offsets that do not rise from 0 to T; on a GPU they are trusted, as a look would wait for it.
    """
    check_tensor(u, "u", dtypes=(torch.float32, torch.float64), dims=3)
    check_tensor(a, "a", dtypes=(u.dtype,), dims=2, device=u.device)
    check_tensor(offsets, "offsets", dtypes=(torch.int64,), dims=1, device=u.device)
    if u.shape[1] != 2:
        raise ValueError(f"u must be [T, 2, D], real and imaginary planes, got {tuple(u.shape)}")
    if tuple(a.shape) != (2, u.shape[2]):
        raise ValueError(f"a must be [2, {u.shape[2]}] to match u, got {tuple(a.shape)}")
    if offsets.numel() < 1:
        raise ValueError("offsets must be [B+1] with B >= 0, got an empty tensor")
    if choose_backend(backend, u.device, operator="linear_scan", triton=True) == "reference":
        return reference_linear_scan(a, u, offsets, reverse=reverse)
    if traced_transform():
        raise RuntimeError(
            "linear_scan loses its gradient where torch.compile traces torch.func; run the transform without "
            "torch.compile, or compile a plain forward and call backward()"
        )
    return _LinearScan.apply(a, u, offsets, reverse)
