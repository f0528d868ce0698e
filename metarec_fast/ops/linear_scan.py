"""linear_scan: diagonal complex recurrence over packed rows, restarting at each offset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._register import Backend, check_tensor, choose_backend, define, empty, traced_transform
from metarec_fast.reference.linear_scan import linear_scan as reference_linear_scan


def _cpu(a: Tensor, u: Tensor, offsets: Tensor, reverse: bool) -> Tensor:
    a, u, offsets = a.contiguous(), u.contiguous(), offsets.contiguous()
    h = empty(tuple(u.shape), dtype=u.dtype, device=u.device)
    _C.linear_scan(
        a.data_ptr(),
        u.data_ptr(),
        offsets.data_ptr(),
        h.data_ptr(),
        segments=offsets.numel() - 1,
        rows=u.shape[0],
        width=u.shape[2],
        reverse=reverse,
        is_double=u.dtype == torch.float64,
    )
    return h


def _vmap(info: Any, in_dims: tuple, a: Tensor, u: Tensor, offsets: Tensor, reverse: bool) -> tuple[Tensor, int]:
    # The recurrence is diagonal: a batch of scans is one scan over more channels.
    S, (T, _, D) = info.batch_size, u.shape if in_dims[1] is None else u.select(in_dims[1], 0).shape
    if in_dims[2] is not None:
        raise RuntimeError("linear_scan cannot be vmapped over offsets; vmap over a and u, or pack the segments")
    a_2SD = a.unsqueeze(1).expand(2, S, D) if in_dims[0] is None else a.movedim(in_dims[0], 1)
    u_T2SD = u.unsqueeze(2).expand(T, 2, S, D) if in_dims[1] is None else u.movedim(in_dims[1], 2)
    h = _op(a_2SD.reshape(2, S * D), u_T2SD.reshape(T, 2, S * D), offsets, reverse)
    return h.view(T, 2, S, D), 2


_op = define(
    "linear_scan(Tensor a, Tensor u, Tensor offsets, bool reverse) -> Tensor",
    cpu=_cpu,
    cuda=lambda a, u, offsets, reverse: reference_linear_scan(a, u, offsets, reverse=reverse),
    fake=lambda a, u, offsets, reverse: torch.empty_like(u, memory_format=torch.contiguous_format),
    vmap=_vmap,
)


class _LinearScan(torch.autograd.Function):
    """The gradient of a scan is a scan the other way, so it can be differentiated again."""

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
        conjugate = torch.stack((a[0], -a[1]))
        grad_u = _LinearScan.apply(conjugate, grad_h, offsets, not ctx.reverse)
        # grad_a = sum_t grad_u_t * conj(h_(t-1)), nothing flowing into the first event of a segment
        # (a mask of T+1 slots, one of them dropped, keeps empty segments right)
        T = h.shape[0]
        inside = torch.ones(T + 1, dtype=h.dtype, device=h.device)
        inside = (
            inside.index_fill(0, offsets[1:], 0.0)[1:] if ctx.reverse else inside.index_fill(0, offsets[:-1], 0.0)[:T]
        )
        g = grad_u * inside[:, None, None]
        before = h.roll(-1 if ctx.reverse else 1, 0)
        grad_a = torch.stack(
            (
                (g[:, 0] * before[:, 0] + g[:, 1] * before[:, 1]).sum(0),
                (g[:, 1] * before[:, 0] - g[:, 0] * before[:, 1]).sum(0),
            )
        )
        return grad_a, grad_u, None, None


def linear_scan(a: Tensor, u: Tensor, offsets: Tensor, *, reverse: bool = False, backend: Backend = "auto") -> Tensor:
    """h_t = a * h_(t-1) + u_t over packed rows, restarting at every offset.

    a: [2, D] float32 or float64, real and imaginary part of the transition.
    u: [T, 2, D] inputs, dtype of a.
    offsets: [B+1] int64, rising from 0 to T; segment b is rows offsets[b] to offsets[b+1].
    reverse: run from the end of each segment to its start.
    backend: "auto", "reference" or "cpu".

    Returns h: [T, 2, D]. Differentiable any number of times in a and u, also under torch.func and, with backward(),
    under torch.compile. Raises TypeError or ValueError for arguments of another dtype, shape or device, and
    RuntimeError where torch.compile traces a torch.func transform, as torch would lose the gradient there.
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
    if choose_backend(backend, u.device, operator="linear_scan", triton=False) == "reference":
        return reference_linear_scan(a, u, offsets, reverse=reverse)
    if traced_transform():
        raise RuntimeError(
            "linear_scan loses its gradient where torch.compile traces torch.func; run the transform without "
            "torch.compile, or compile a plain forward and call backward()"
        )
    return _LinearScan.apply(a, u, offsets, reverse)
