"""linear_scan on a GPU: a program takes a block of channels through one segment, step by step: each row once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_BLOCK_D = 64  # channels of a program at most: many small programs hide each other's latency


@triton.jit
def _scan(
    a_ptr, u_ptr, offsets_ptr, h_ptr,  # [2, D], [T, 2, D], [B + 1], [T, 2, D]
    D,
    REVERSE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    a_re = tl.load(a_ptr + d, mask=inside, other=0.0)
    a_im = tl.load(a_ptr + D + d, mask=inside, other=0.0)
    begin = tl.load(offsets_ptr + segment)
    n = tl.load(offsets_ptr + segment + 1) - begin
    first = begin + n - 1 if REVERSE else begin
    step = -2 * D if REVERSE else 2 * D
    at = first * 2 * D + d
    re = tl.zeros_like(a_re)
    im = tl.zeros_like(a_re)
    for _ in range(n.to(tl.int32)):
        u_re = tl.load(u_ptr + at, mask=inside, other=0.0)
        u_im = tl.load(u_ptr + at + D, mask=inside, other=0.0)
        next_re = a_re * re + (u_re - a_im * im)
        im = a_re * im + (u_im + a_im * re)
        re = next_re
        tl.store(h_ptr + at, re, mask=inside)
        tl.store(h_ptr + at + D, im, mask=inside)
        at += step


@triton.jit
def _backward(
    a_ptr, h_ptr, grad_h_ptr, offsets_ptr, grad_u_ptr, partial_ptr,  # as above, and [B, 2, D]
    D,
    REVERSE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    a_re = tl.load(a_ptr + d, mask=inside, other=0.0)
    a_im = tl.load(a_ptr + D + d, mask=inside, other=0.0)
    begin = tl.load(offsets_ptr + segment)
    n = tl.load(offsets_ptr + segment + 1) - begin
    first = begin if REVERSE else begin + n - 1  # against the direction of the scan
    step = 2 * D if REVERSE else -2 * D
    at = first * 2 * D + d
    re = tl.zeros_like(a_re)
    im = tl.zeros_like(a_re)
    sum_re = tl.zeros_like(a_re)
    sum_im = tl.zeros_like(a_re)
    for _ in range(n.to(tl.int32)):
        g_re = tl.load(grad_h_ptr + at, mask=inside, other=0.0)
        g_im = tl.load(grad_h_ptr + at + D, mask=inside, other=0.0)
        next_re = a_re * re + (g_re + a_im * im)
        im = a_re * im + (g_im - a_im * re)
        re = next_re
        tl.store(grad_u_ptr + at, re, mask=inside)
        tl.store(grad_u_ptr + at + D, im, mask=inside)
        at += step
        n -= 1
        continued = d < tl.where(n > 0, D, 0)  # what the scan visits first continues from nothing
        h_re = tl.load(h_ptr + at, mask=continued, other=0.0)
        h_im = tl.load(h_ptr + at + D, mask=continued, other=0.0)
        sum_re += tl.where(continued, re * h_re + im * h_im, 0.0)
        sum_im += tl.where(continued, im * h_re - re * h_im, 0.0)
    tl.store(partial_ptr + segment * 2 * D + d, sum_re, mask=inside)
    tl.store(partial_ptr + segment * 2 * D + D + d, sum_im, mask=inside)


def _launch(kernel: triton.JITFunction, *tensors: Tensor, segments: int, D: int, reverse: bool) -> None:
    if segments and D:
        BLOCK_D = _common.block_d(D, least=16, most=_BLOCK_D)
        grid = (segments, _common.cdiv(D, BLOCK_D))
        kernel[grid](
            *tensors, D, REVERSE=reverse, BLOCK_D=BLOCK_D, num_warps=max(1, BLOCK_D // 32), enable_fp_fusion=True
        )


def linear_scan(a: Tensor, u: Tensor, offsets: Tensor, *, reverse: bool) -> Tensor:
    """a: [2, D], u: [T, 2, D], offsets: [B+1], which are trusted to rise from 0 to T. Returns h: [T, 2, D]."""
    T, _, D = u.shape
    _common.check_shapes(a=(a, (2, D)), u=(u, (T, 2, D)), offsets=(offsets, (max(1, offsets.numel()),)))
    a, u, offsets = a.contiguous(), u.contiguous(), offsets.contiguous()
    h = _common.empty(tuple(u.shape), dtype=u.dtype, device=u.device)
    _launch(_scan, a, u, offsets, h, segments=len(offsets) - 1, D=u.shape[2], reverse=reverse)
    return h


def linear_scan_backward(
    a: Tensor, h: Tensor, grad_h: Tensor, offsets: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a and u. Segments are summed at the end, so that results repeat to the bit."""
    T, _, D = h.shape
    _common.check_shapes(a=(a, (2, D)), h=(h, (T, 2, D)), grad_h=(grad_h, (T, 2, D)))
    _common.check_shapes(offsets=(offsets, (max(1, offsets.numel()),)))
    a, h, grad_h, offsets = a.contiguous(), h.contiguous(), grad_h.contiguous(), offsets.contiguous()
    segments = len(offsets) - 1
    grad_u = _common.empty(tuple(h.shape), dtype=h.dtype, device=h.device)
    partial = _common.empty((segments, 2, D), dtype=h.dtype, device=h.device)
    _launch(_backward, a, h, grad_h, offsets, grad_u, partial, segments=segments, D=D, reverse=reverse)
    return partial.sum(0), grad_u
