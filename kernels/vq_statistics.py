"""vq_statistics on a GPU: counts and sums of the rows of each code, the same at every run.

Rows are sorted by code, stably. A code's rows are cut into at most PIECES equal runs, each summed by one program in row
order, and the runs are added in order: nothing depends on which program ends first, and one code that holds most rows
is still summed by many programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_ROWS = 32  # rows that a program of _sum_pieces holds at once
_MAX_PIECES = 32
_PIECE_PROGRAMS = 1 << 16  # no more pieces than that over all codes, so that memory stays at a few MB
_KEY_TILE = 4096


@triton.jit(do_not_specialize=["N", "K"])
def _keys(
    x_ptr, indices_ptr, key_ptr,  # [H, N, D], [H, N] twice
    N, K, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The index, or K for a row that is left out: index -1, or an element that is NaN or infinite."""
    h = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    broken = tl.zeros([BLOCK_N], tl.int32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (row[:, None] < N) & (d[None, :] < D)
        x = tl.load(x_ptr + (h * N + row[:, None]) * D + d[None, :], mask=inside, other=0.0)
        # a finite number minus itself is 0; NaN and infinity give NaN
        broken = tl.maximum(broken, tl.max(((x - x) != 0).to(tl.int32), 1))
    index = tl.load(indices_ptr + h * N + row, mask=row < N, other=-1)
    left_out = (broken != 0) | (index < 0) | (index >= K)
    tl.store(key_ptr + h * N + row, tl.where(left_out, K, index).to(tl.int32), mask=row < N)


@triton.jit(do_not_specialize=["N", "K", "PIECES"])
def _sum_pieces(
    x_ptr, weight_ptr, order_ptr, start_ptr, count_ptr, sum_ptr,  # [H,N,D] [H,N] [H,N] [H,K+1] [H,K,P] [H,K,P,D]
    N, K, D, PIECES,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    code, piece = slot // PIECES, slot % PIECES
    h = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(start_ptr + h * (K + 1) + code)
    end = tl.load(start_ptr + h * (K + 1) + code + 1)
    length = tl.cdiv(tl.cdiv(end - start, PIECES), ROWS) * ROWS
    begin = start + piece * length
    end = tl.minimum(begin + length, end)
    order_ptr += h * N
    x_ptr += h * N * D

    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for i in range(begin, end, ROWS):
        at = i + tl.arange(0, ROWS)
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(at[:, None] < end) & (d[None, :] < D), other=0.0)
        x = x.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + h * N + row, mask=at < end, other=0.0)
            count += weight
            total += x * weight[:, None]
        else:
            total += x
    tl.store(sum_ptr + (h * K * PIECES + slot) * D + d, tl.sum(total, 0), mask=d < D)
    if tl.program_id(1) == 0:
        if WEIGHTED:
            pieces_count = tl.sum(count, 0)
        else:
            pieces_count = tl.maximum(end - begin, 0).to(tl.float32)
        tl.store(count_ptr + h * K * PIECES + slot, pieces_count)


@triton.jit(do_not_specialize=["PIECES"])
def _add_pieces(
    piece_count_ptr, piece_sum_ptr, count_ptr, sum_ptr,  # [H*K, P], [H*K, P, D], [H*K], [H*K, D]
    D, PIECES,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = 0.0
    for piece in range(PIECES):
        total += tl.load(piece_sum_ptr + (code * PIECES + piece) * D + d, mask=d < D, other=0.0)
        count += tl.load(piece_count_ptr + code * PIECES + piece)
    tl.store(sum_ptr + code * D + d, total, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + code, count)


def vq_statistics(
    x_HND: Tensor, indices_HN: Tensor, codebook_size: int, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and the sum of them.

    x_HND: float16, bfloat16 or float32. indices_HN: int64 in [-1, codebook_size); rows of index -1 are left out, and so
    are rows that hold NaN or infinity. row_weight: [N] or [H, N], what a row counts for; 1 if None.

    Returns counts_HK and sums_HKD, float32 and bit for bit the same at every run. Nothing waits for the device.
    """
    H, N, D = x_HND.shape
    _common.check_shapes(indices=(indices_HN, (H, N)))
    x, indices, K = x_HND.contiguous(), indices_HN.contiguous(), codebook_size
    counts = _common.empty((H, K), dtype=torch.float32, device=x.device)
    sums = _common.empty((H, K, D), dtype=torch.float32, device=x.device)
    if sums.numel() == 0 or N == 0:
        return counts.zero_(), sums.zero_()
    weight = None if row_weight is None else row_weight.to(torch.float32).expand(H, N).contiguous()

    BLOCK_D = _common.block_d(D, least=16, most=_common.MAX_BLOCK_D)
    BLOCK_N = _KEY_TILE // BLOCK_D
    keys = _common.empty((H, N), dtype=torch.int32, device=x.device)
    _keys[(_common.cdiv(N, BLOCK_N), H)](
        x, indices, keys, N, K, D, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True
    )
    keys, order = torch.sort(keys, dim=1, stable=True)
    codes = torch.arange(K + 1, dtype=torch.int32, device=x.device).expand(H, K + 1).contiguous()
    start = torch.searchsorted(keys, codes)

    pieces = max(1, min(_MAX_PIECES, _common.cdiv(N, _ROWS), _PIECE_PROGRAMS // (H * K)))
    one = pieces == 1
    piece_counts = counts if one else _common.empty((H, K, pieces), dtype=torch.float32, device=x.device)
    piece_sums = sums if one else _common.empty((H, K, pieces, D), dtype=torch.float32, device=x.device)
    blocks = _common.cdiv(D, BLOCK_D)
    _sum_pieces[(K * pieces, blocks, H)](
        x, weight, order, start, piece_counts, piece_sums, N, K, D, pieces,
        WEIGHTED=weight is not None, ROWS=_ROWS, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if not one:
        _add_pieces[(H * K, blocks)](
            piece_counts, piece_sums, counts, sums, D, pieces, BLOCK_D=BLOCK_D, num_warps=1, enable_fp_fusion=True
        )
    return counts, sums
