"""vq_backward on a GPU: each row once from memory, whatever its width; wide rows come a second time from cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_TILE = 2048  # elements of x that a program holds
_EPS = tl.constexpr(1e-6)  # least length by which a vector is divided


@triton.jit(do_not_specialize=["N"])
def _backward(
    grad_ptr, grad_error_ptr, x_ptr, quantized_ptr, out_ptr,  # [N, D], [N], [N, D] three times
    N, D,
    ROTATION: tl.constexpr, HAS_GRAD: tl.constexpr, HAS_ERROR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = N - first
    row = tl.arange(0, BLOCK_N)
    x_ptr += first * D
    quantized_ptr += first * D
    out_ptr += first * D
    if HAS_GRAD:
        grad_ptr += first * D
    on_grad = tl.full([BLOCK_N], 1.0, tl.float32)
    on_x = tl.zeros([BLOCK_N], tl.float32)
    on_code = tl.zeros([BLOCK_N], tl.float32)
    if ROTATION and HAS_GRAD:
        xx = tl.zeros([BLOCK_N], tl.float32)
        qq = tl.zeros([BLOCK_N], tl.float32)
        qg = tl.zeros([BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at = row[:, None] * D + d[None, :]
            inside = (row[:, None] < rows) & (d[None, :] < D)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            q = tl.load(quantized_ptr + at, mask=inside, other=0.0)
            g = tl.load(grad_ptr + at, mask=inside, other=0.0)
            xx += tl.sum(x * x, 1)
            qq += tl.sum(q * q, 1)
            qg += tl.sum(q * g, 1)
        length = tl.maximum(tl.sqrt(xx), _EPS)
        code_length = tl.maximum(tl.sqrt(qq), _EPS)
        scale = tl.sqrt(qq) / length
        to_u = 1.0 / length
        to_v = 1.0 / code_length
        ww = tl.zeros([BLOCK_N], tl.float32)
        wg = tl.zeros([BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at = row[:, None] * D + d[None, :]
            inside = (row[:, None] < rows) & (d[None, :] < D)
            x = tl.load(x_ptr + at, mask=inside, other=0.0)
            q = tl.load(quantized_ptr + at, mask=inside, other=0.0)
            g = tl.load(grad_ptr + at, mask=inside, other=0.0)
            w = x * to_u[:, None] + q * to_v[:, None]
            ww += tl.sum(w * w, 1)
            wg += tl.sum(w * g, 1)
        along_w = -2.0 * scale * wg / tl.maximum(ww, _EPS * _EPS)
        along_u = 2.0 * scale * qg * to_v
        on_grad = scale
        on_x = (along_w + along_u) * to_u
        on_code = along_w * to_v
    pull = tl.zeros([BLOCK_N], tl.float32)
    if HAS_ERROR:
        pull = 2.0 * tl.load(grad_error_ptr + first + row, mask=row < rows, other=0.0)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        at = row[:, None] * D + d[None, :]
        inside = (row[:, None] < rows) & (d[None, :] < D)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        q = tl.load(quantized_ptr + at, mask=inside, other=0.0)
        # a row without weight may hold NaN
        out = tl.where(pull[:, None] == 0.0, 0.0, pull[:, None] * (x - q))
        if HAS_GRAD:
            g = tl.load(grad_ptr + at, mask=inside, other=0.0)
            out += on_grad[:, None] * g
            if ROTATION:
                out += on_x[:, None] * x + on_code[:, None] * q
        tl.store(out_ptr + at, out, mask=inside)


def vq_backward(
    grad_HND: Tensor | None, grad_error_HN: Tensor | None, x_HND: Tensor, quantized_HND: Tensor, *, rotation: bool
) -> Tensor:
    """Gradient to x of its quantized rows and of their squared errors; float32. See reference/vq_backward.py."""
    H, N, D = x_HND.shape
    _common.check_shapes(
        grad=(grad_HND, (H, N, D)), grad_error=(grad_error_HN, (H, N)), quantized=(quantized_HND, (H, N, D))
    )
    x, quantized = x_HND.contiguous(), quantized_HND.contiguous()
    grad, grad_error = (None if t is None else t.contiguous() for t in (grad_HND, grad_error_HN))
    N = H * N
    out = _common.empty(tuple(x.shape), dtype=x.dtype, device=x.device)
    if N:
        BLOCK_D = _common.block_d(D, least=16, most=_common.MAX_BLOCK_D)
        BLOCK_N = _TILE // BLOCK_D
        _backward[(_common.cdiv(N, BLOCK_N),)](
            grad, grad_error, x, quantized, out, N, D,
            ROTATION=rotation, HAS_GRAD=grad is not None, HAS_ERROR=grad_error is not None,
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
