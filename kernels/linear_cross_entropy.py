"""linear_cross_entropy on a GPU: logits exist as tiles in registers, once forward and again in the backward pass.

Products of float32 are made of three TF32 products each ("tf32x3"), whose error is of the order of float32's own. What
several programs find about one row or item is summed in a fixed order, so that results repeat to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_BLOCK_T = 32
_BLOCK_V = 64
_SPLITS = 16  # parts of the table that programs take for the same rows


@triton.jit
def _logits(
    h_ptr, table_ptr, bias_ptr, t, v, keep, T, V, D,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_V], -inf beyond the table; rows that are not kept read as 0."""
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + t[:, None] * D + d[None, :], mask=keep[:, None] & (d[None, :] < D), other=0.0)
        w = tl.load(table_ptr + v[None, :] * D + d[:, None], mask=(v[None, :] < V) & (d[:, None] < D), other=0.0)
        logits = tl.dot(h, w, logits, input_precision="tf32x3")
    if HAS_BIAS:
        logits += tl.load(bias_ptr + v, mask=v < V, other=0.0)[None, :]
    return tl.where(v[None, :] < V, logits, float("-inf"))


@triton.jit
def _forward(
    h_ptr, table_ptr, bias_ptr, target_ptr, keep_ptr,  # [T, D], [V, D], [V], [T], [T]
    top_ptr, sum_ptr, target_logit_ptr,  # [SPLITS, T]
    T, V, D,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    keep = tl.load(keep_ptr + t, mask=t < T, other=0.0) != 0.0
    target = tl.load(target_ptr + t, mask=t < T, other=-1)
    top = tl.full([BLOCK_T], -3.4e38, tl.float32)  # finite: logits of -inf then add exp(-inf) = 0
    total = tl.zeros([BLOCK_T], tl.float32)
    target_logit = tl.zeros([BLOCK_T], tl.float32)
    for first in range(split * BLOCK_V, V, SPLITS * BLOCK_V):
        v = first + tl.arange(0, BLOCK_V).to(tl.int64)
        logits = _logits(h_ptr, table_ptr, bias_ptr, t, v, keep, T, V, D, HAS_BIAS, BLOCK_T, BLOCK_V, BLOCK_D)
        high = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - high) + tl.sum(tl.exp(logits - high[:, None]), 1)
        top = high
        target_logit += tl.sum(tl.where(v[None, :] == target[:, None], logits, 0.0), 1)
    at = split.to(tl.int64) * T + t
    tl.store(top_ptr + at, top, mask=t < T)
    tl.store(sum_ptr + at, total, mask=t < T)
    tl.store(target_logit_ptr + at, target_logit, mask=t < T)


@triton.jit
def _cotangents(
    h_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, t, v, T, V, D,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad (P - Y): [BLOCK_T, BLOCK_V], 0 in rows of zero grad, and which rows have another."""
    grad = tl.load(grad_ptr + t, mask=t < T, other=0.0)
    lse = tl.load(lse_ptr + t, mask=t < T, other=0.0)
    target = tl.load(target_ptr + t, mask=t < T, other=-1)
    keep = grad != 0.0
    logits = _logits(h_ptr, table_ptr, bias_ptr, t, v, keep, T, V, D, HAS_BIAS, BLOCK_T, BLOCK_V, BLOCK_D)
    p = tl.exp(logits - lse[:, None]) - tl.where(v[None, :] == target[:, None], 1.0, 0.0)
    return tl.where(keep[:, None], p * grad[:, None], 0.0), keep


@triton.jit
def _rows(
    h_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, partial_ptr,  # the last one [SPLITS, T, D]
    T, V, D,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in range(split * BLOCK_V, V, SPLITS * BLOCK_V):
        v = first + tl.arange(0, BLOCK_V).to(tl.int64)
        p, _ = _cotangents(
            h_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, t, v, T, V, D,
            HAS_BIAS, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        w = tl.load(table_ptr + v[:, None] * D + d[None, :], mask=(v[:, None] < V) & (d[None, :] < D), other=0.0)
        total = tl.dot(p, w, total, input_precision="tf32x3")
    at = (split.to(tl.int64) * T + t)[:, None] * D + d[None, :]
    tl.store(partial_ptr + at, total, mask=(t[:, None] < T) & (d[None, :] < D))


@triton.jit
def _items(
    h_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, grad_table_ptr, grad_bias_ptr,  # ..., [V, D], [V]
    T, V, D,
    NEED_TABLE: tl.constexpr, NEED_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    total_bias = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, T, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T).to(tl.int64)
        p, keep = _cotangents(
            h_ptr, table_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, t, v, T, V, D,
            HAS_BIAS, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        total_bias += tl.sum(p, 0)
        if NEED_TABLE:
            h = tl.load(h_ptr + t[:, None] * D + d[None, :], mask=keep[:, None] & (d[None, :] < D), other=0.0)
            total = tl.dot(tl.trans(p), h, total, input_precision="tf32x3")
    if NEED_TABLE:
        tl.store(grad_table_ptr + v[:, None] * D + d[None, :], total, mask=(v[:, None] < V) & (d[None, :] < D))
    if NEED_BIAS:
        tl.store(grad_bias_ptr + v, total_bias, mask=v < tl.where(tl.program_id(1) == 0, V, 0))


def _blocks(D: int) -> dict[str, int]:
    BLOCK_D = _common.block_d(D, least=16, most=64)
    return {"BLOCK_T": _BLOCK_T, "BLOCK_V": _BLOCK_V, "BLOCK_D": BLOCK_D, "num_warps": 8, "num_stages": 2}


def linear_cross_entropy(
    h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int
) -> tuple[Tensor, Tensor]:
    """float32. Returns loss: [T] and lse: [T], both 0 in ignored rows. Other targets are trusted to lie in [0, V)."""
    (T, D), V = h.shape, table.shape[0]
    _common.check_shapes(table=(table, (max(1, V), D)), targets=(targets, (T,)), bias=(bias, (V,)))
    h, table, targets = h.contiguous(), table.contiguous(), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    keep = targets != ignored
    top, total, target_logit = (_common.empty((_SPLITS, T), dtype=h.dtype, device=h.device) for _ in range(3))
    if T:
        _forward[(_common.cdiv(T, _BLOCK_T), _SPLITS)](
            h, table, bias, targets, keep.to(h.dtype), top, total, target_logit, T, V, D,
            SPLITS=_SPLITS, HAS_BIAS=bias is not None, enable_fp_fusion=True, **_blocks(D),
        )  # fmt: skip
    highest = top.amax(0)
    log_total = (total * (top - highest).exp()).sum(0).log()
    loss = (highest - target_logit.sum(0)) + log_total  # this order keeps small losses exact
    return loss.where(keep, 0.0), (highest + log_total).where(keep, 0.0)


def linear_cross_entropy_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <grad, loss> in h, table and bias; those that are not needed are empty."""
    (T, D), V = h.shape, table.shape[0]
    _common.check_shapes(table=(table, (max(1, V), D)), targets=(targets, (T,)), bias=(bias, (V,)))
    _common.check_shapes(grad=(grad, (T,)), lse=(lse, (T,)))
    h, table, targets, lse = h.contiguous(), table.contiguous(), targets.contiguous(), lse.contiguous()
    bias = None if bias is None else bias.contiguous()
    grad = grad.where(targets != ignored, 0.0).contiguous()

    def room(shape: tuple[int, ...], need: bool) -> Tensor:
        return _common.empty(shape if need else (0,), dtype=h.dtype, device=h.device)

    partial, grad_table, grad_bias = room((_SPLITS, T, D), need_h), room((V, D), need_table), room((V,), need_bias)
    inputs, blocks = (h, table, bias, targets, lse, grad), _blocks(D)
    options = {"HAS_BIAS": bias is not None, "enable_fp_fusion": True, **blocks}
    chunks = _common.cdiv(D, blocks["BLOCK_D"])
    if need_h and T:
        _rows[(_common.cdiv(T, _BLOCK_T), _SPLITS, chunks)](*inputs, partial, T, V, D, SPLITS=_SPLITS, **options)
    if need_table or need_bias:
        _items[(_common.cdiv(V, _BLOCK_V), chunks if need_table else 1)](
            *inputs, grad_table, grad_bias, T, V, D, NEED_TABLE=need_table, NEED_BIAS=need_bias, **options
        )
    return partial.sum(0) if need_h else partial, grad_table, grad_bias
