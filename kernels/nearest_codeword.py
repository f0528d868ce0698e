"""nearest_codeword on a GPU: screened on the tensor cores, then compared in float64 where the screen cannot decide.

The screen compares s_k = |c_k|^2 - 2<x, c_k>, which orders the codes as |x - c_k|^2 does. Float32 vectors are centred
by the codebook's mean m, scaled by a power of two and split into two float16 numbers, a = a_high + a_low with
|a - a_high - a_low| <= 2^-21 |a|; three products (all but low * low) accumulate in float32. With R = |x - m|,
C = max_k |c_k - m| and u = 2^-24, every score is within

    E = 2 R C (g + 2^-19) + 4 u C^2,    g = (D + 32) 2^-22

of its real value. g: a tensor core aligns b >= 4 products with the sum so far and cuts all of them to 24 bits, an error
of at most (b + 2) 2^-23 R C for each of D / b blocks (Blanchard, Higham, Lopez, Mary, Pranesh 2020). 2^-19: both splits
(2 * 2^-21), the product left out (2^-22), the roundings of x - m and c - m (2 u) and of the score (2 u). 4 u C^2: the
rounded |c|^2 and score. The float64 sum that defines the index is itself up to F = (D + 4) 2^-52 (R + C)^2 away. So
least and second least score more than 2 (E + F) apart prove the index. The other rows (ties among them, and whatever
overflowed) are compared in float64.
Float16 and bfloat16 codebooks enter as they are: their products are exact in float32 and only g and u remain.

For the largest product whatever the codes' lengths, s_k = -2<x, c_k - m> = -2<x - m, c_k - m> - 2<m, c_k - m>: the last
term stands where |c_k - m|^2 stood, rounded once from float64. With M = |m| (0 where codes enter as they are)

    E = 2 R C (g + 2^-19) + 4 u M C,    F = (D + 4) 2^-52 (R + M) (C + M),

u once for that term and once for the score, F for the float64 sum of (x c)_d that defines the product, twice over.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

Metric = Literal["distance", "product"]  # as in the reference, which kernels do not import

# Up to this many terms (x - c)^2 the float64 pass alone is over before the screen's launches would be.
_REFINE_ALL = 1 << 26
_REFINE_PROGRAMS = 2048
_REFINE_BLOCK_K = 256
_PREPARE_BLOCK_K = 32
_SPLIT_BLOCK_N = 32


@triton.jit
def _power_of_two_scale(amax):
    """(s, 1/s), powers of two with amax * s in [2^10, 2^11): room above for float16, room below for its subnormals."""
    exponent = (amax.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(exponent, 11)  # below 2^-116 the scale itself would overflow
    scale = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    unscale = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
    return scale, unscale


@triton.jit
def _split(scaled):
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def _load_centred(x_ptr, mean_ptr, row, d, rows, D, SPLIT: tl.constexpr):
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=(row[:, None] < rows) & (d[None, :] < D), other=0.0)
    if SPLIT:
        return x.to(tl.float32) - tl.load(mean_ptr + d, mask=d < D, other=0.0)[None, :]
    else:
        return x


@triton.jit
def _halves(tile):
    """Left and right half of the columns; in a matrix unit's layout a thread holds both, so nothing moves."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [rows, 2, columns // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=["K"])
def _prepare(
    codebook_ptr, mean_ptr, least_ptr, most_ptr,  # [H, K, D], [H, D] three times
    high_ptr, low_ptr, norm_ptr, unscale_ptr, count_ptr,  # [H, K', D'] twice, [H, K'], [H], [1]
    K, D,
    SPLIT: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The codebook as the screen reads it, padded to whole blocks: zeros in D, codes at infinite norm in K.

    norm: what a code adds to its scores.
    """
    h = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    padded_K = tl.num_programs(0).to(tl.int64) * BLOCK_K
    padded_D = tl.cdiv(D, BLOCK_D) * BLOCK_D

    scale = 1.0
    if SPLIT:
        reach = tl.zeros([BLOCK_D], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mean = tl.load(mean_ptr + h * D + d, mask=d < D, other=0.0)
            most = tl.load(most_ptr + h * D + d, mask=d < D, other=0.0)
            least = tl.load(least_ptr + h * D + d, mask=d < D, other=0.0)
            reach = tl.maximum(reach, tl.maximum(most - mean, mean - least))
        scale, unscale = _power_of_two_scale(tl.max(reach, 0))
        if tl.program_id(0) == 0:
            tl.store(unscale_ptr + h, unscale)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(count_ptr, 0)

    norm = tl.zeros([BLOCK_K], tl.float64)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (k[:, None] < K) & (d[None, :] < D)
        code = tl.load(codebook_ptr + (h * K + k[:, None]) * D + d[None, :], mask=inside, other=0.0)
        out = (h * padded_K + k[:, None]) * padded_D + d[None, :]
        if SPLIT:
            mean = tl.load(mean_ptr + h * D + d, mask=d < D, other=0.0)
            centred = tl.where(inside, code.to(tl.float64) - mean.to(tl.float64)[None, :], 0.0)
            if PRODUCT:
                norm -= 2.0 * tl.sum(centred * mean.to(tl.float64)[None, :], 1)
            else:
                norm += tl.sum(centred * centred, 1)
            high, low = _split(centred.to(tl.float32) * scale)
            tl.store(high_ptr + out, high)
            tl.store(low_ptr + out, low)
        else:
            if not PRODUCT:
                norm += tl.sum(code.to(tl.float64) * code.to(tl.float64), 1)
            tl.store(high_ptr + out, code)
    tl.store(norm_ptr + h * padded_K + k, tl.where(k < K, norm, float("inf")).to(tl.float32))


@triton.jit(do_not_specialize=["N"])
def _split_rows(
    x_ptr, mean_ptr, high_ptr, low_ptr, unscale_ptr, radius_ptr,  # [H, N, D], [H, D], [H, N, D'] twice, [H, N] twice
    N, D,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows too wide to stay on chip: split once here, instead of once per tile of codes. Without SPLIT only |x|."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = N - first
    row = tl.arange(0, BLOCK_N)
    padded_D = tl.cdiv(D, BLOCK_D) * BLOCK_D
    first += h * N
    x_ptr += first * D
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    unscale = scale
    if SPLIT:
        mean_ptr += h * D
        amax = tl.zeros([BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            x = _load_centred(x_ptr, mean_ptr, row, d0 + tl.arange(0, BLOCK_D), rows, D, SPLIT)
            amax = tl.maximum(amax, tl.max(tl.abs(x), 1))
        scale, unscale = _power_of_two_scale(amax)
        tl.store(unscale_ptr + first + row, unscale, mask=row < rows)
    square = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        scaled = _load_centred(x_ptr, mean_ptr, row, d, rows, D, SPLIT).to(tl.float32) * scale[:, None]
        square += tl.sum(scaled * scaled, 1)
        if SPLIT:
            high, low = _split(scaled)
            out = (first + row[:, None]) * padded_D + d[None, :]
            tl.store(high_ptr + out, high, mask=row[:, None] < rows)
            tl.store(low_ptr + out, low, mask=row[:, None] < rows)
    tl.store(radius_ptr + first + row, tl.sqrt(square) * unscale, mask=row < rows)


@triton.jit(do_not_specialize=["N", "K"])
def _screen(
    x_ptr, x_low_ptr, x_unscale_ptr, x_radius_ptr,  # [H, N, D]; what _split_rows wrote, unless RESIDENT
    mean_ptr, high_ptr, low_ptr, norm_ptr, unscale_ptr,  # [H, D], then what _prepare wrote
    reach_ptr,  # [H, 2] for products: the largest |c - m|, and |m|
    indices_ptr, margin_ptr, undecided_ptr, count_ptr,  # [H, N] three times, [1]
    N, K, D, x_stride, padded_K,
    SPLIT: tl.constexpr, PRODUCT: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Least and second least score of BLOCK_N rows; rows that are not proven go to the list of the undecided."""
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = N - first
    first += h * N
    row = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    chunk = tl.arange(0, BLOCK_D)
    padded_D = BLOCK_D if RESIDENT else tl.cdiv(D, BLOCK_D) * BLOCK_D
    high_ptr += h * padded_K * padded_D
    norm_ptr += h * padded_K
    x_ptr += first * x_stride
    if SPLIT:
        low_ptr += h * padded_K * padded_D

    unscale = tl.full([BLOCK_N], 1.0, tl.float32)
    if RESIDENT:
        x = _load_centred(x_ptr, mean_ptr + h * D if SPLIT else mean_ptr, row, chunk, rows, D, SPLIT)
        x_high = x
        scaled = x.to(tl.float32)
        if SPLIT:
            scale, unscale = _power_of_two_scale(tl.max(tl.abs(x), 1))
            scaled = x * scale[:, None]
            x_high, x_low = _split(scaled)
        x_radius = tl.sqrt(tl.sum(scaled * scaled, 1)) * unscale
    else:
        if SPLIT:
            unscale = tl.load(x_unscale_ptr + first + row, mask=row < rows, other=1.0)
            x_low_ptr += first * x_stride
        x_radius = tl.load(x_radius_ptr + first + row, mask=row < rows, other=0.0)
    factor = 2.0 * unscale
    if SPLIT:
        factor *= tl.load(unscale_ptr + h)

    # Four columns share a lane. A lane keeps its two least scores and meets the others once, after the last tile:
    # as many comparisons as four lanes would take, and a quarter of the registers.
    LANES: tl.constexpr = BLOCK_K // 4
    best = tl.full([BLOCK_N, LANES], float("inf"), tl.float32)
    second = tl.full([BLOCK_N, LANES], float("inf"), tl.float32)
    origin = tl.zeros([BLOCK_N, LANES], tl.int32)
    most_norm = tl.zeros([BLOCK_K], tl.float32)
    code = chunk[:, None] + lane[None, :] * padded_D
    for k0 in range(0, K, BLOCK_K):
        product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        if RESIDENT:
            high = tl.load(high_ptr + code)
            if SPLIT:
                low = tl.load(low_ptr + code)
                product = tl.dot(x_low, high, product, input_precision="ieee")
                product = tl.dot(x_high, low, product, input_precision="ieee")
            product = tl.dot(x_high, high, product, input_precision="ieee")
        else:
            for d0 in range(0, D, BLOCK_D):
                d = d0 + chunk
                source = row[:, None] * x_stride + d[None, :]
                inside = (row[:, None] < rows) & (d[None, :] < x_stride)
                x_high = tl.load(x_ptr + source, mask=inside, other=0.0)
                high = tl.load(high_ptr + d0 + code)
                if SPLIT:
                    x_low = tl.load(x_low_ptr + source, mask=inside, other=0.0)
                    low = tl.load(low_ptr + d0 + code)
                    product = tl.dot(x_low, high, product, input_precision="ieee")
                    product = tl.dot(x_high, low, product, input_precision="ieee")
                product = tl.dot(x_high, high, product, input_precision="ieee")
        norm = tl.load(norm_ptr + k0 + lane)
        if not PRODUCT:
            most_norm = tl.maximum(most_norm, tl.where(k0 + lane < K, norm, 0.0))
        score = norm[None, :] - factor[:, None] * product
        left, right = _halves(score)
        least_left, least_right = _halves(tl.minimum(left, right))
        following_left, following_right = _halves(tl.maximum(left, right))
        from_left, from_right = _halves(tl.where(right < left, k0 + 2 * LANES, k0))
        least = tl.minimum(least_left, least_right)
        following = tl.minimum(tl.maximum(least_left, least_right), tl.minimum(following_left, following_right))
        origin_of_least = tl.where(least_right < least_left, from_right + LANES, from_left)
        second = tl.minimum(tl.minimum(second, following), tl.maximum(best, least))
        origin = tl.where(least < best, origin_of_least, origin)
        best = tl.minimum(best, least)
        high_ptr += BLOCK_K * padded_D
        if SPLIT:
            low_ptr += BLOCK_K * padded_D

    index = origin + tl.arange(0, LANES)[None, :]
    row_best = tl.min(best, 1)
    row_index = tl.min(tl.where(best == row_best[:, None], index, 0x7FFFFFFF), 1)
    row_second = tl.min(tl.where(index == row_index[:, None], second, best), 1)
    margin = row_second - row_best

    gamma = (D + 32) * 2.0**-22
    if SPLIT:
        gamma += 2.0**-19
    if PRODUCT:
        c_radius = tl.load(reach_ptr + 2 * h)
        m_radius = tl.load(reach_ptr + 2 * h + 1)
        rounded = m_radius * c_radius
        defined = (x_radius + m_radius) * (c_radius + m_radius)
    else:
        rounded = tl.max(most_norm, 0)
        c_radius = tl.sqrt(rounded)
        reach = x_radius + c_radius
        defined = reach * reach
    error = 2.0 * gamma * x_radius * c_radius + 2.0**-22 * rounded + (D + 4) * 2.0**-52 * defined
    # 1.001 for the rounding of R, C and the margin; 2^-100 for what underflowed
    bound = 2.002 * error + 2.0**-100
    proven = (margin > bound) & (margin < float("inf"))

    out = first + row
    tl.store(indices_ptr + out, row_index.to(tl.int64), mask=row < rows)
    if PRODUCT:
        margin *= 0.5
    tl.store(margin_ptr + out, margin, mask=row < rows)
    undecided = ((row < rows) & (proven == 0)).to(tl.int32)
    total = tl.sum(undecided, 0)
    if total > 0:
        slot = tl.atomic_add(count_ptr, total)
        tl.store(undecided_ptr + slot + tl.cumsum(undecided, 0) - 1, out, mask=undecided == 1)


@triton.jit
def _cost(x, c, PRODUCT: tl.constexpr):
    if PRODUCT:
        return -(x * c)
    else:
        difference = x - c
        return difference * difference


@triton.jit(do_not_specialize=["N", "K", "rows"])
def _refine(
    x_ptr, codebook_ptr,  # [H, N, D], [H, D, K]
    undecided_ptr, count_ptr, indices_ptr, margin_ptr,  # [H, N], [1], [H, N] twice
    N, K, D, rows,
    ALL: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """sum_d (x_d - c_d)^2, or -sum_d x_d c_d, in float64, d by d, for every code of the rows listed (ALL: of each)."""
    lane = tl.arange(0, BLOCK_K)
    count = rows
    if not ALL:
        count = tl.load(count_ptr)
    for i in range(tl.program_id(0), count, tl.num_programs(0)):
        if ALL:
            row = tl.cast(i, tl.int64)
        else:
            row = tl.load(undecided_ptr + i).to(tl.int64)
        x_row = x_ptr + row * D
        head = codebook_ptr + (row // N) * K * D
        best = tl.full([BLOCK_K], float("inf"), tl.float64)
        second = tl.full([BLOCK_K], float("inf"), tl.float64)
        index = tl.zeros([BLOCK_K], tl.int32) + lane
        for k0 in range(0, K, BLOCK_K):
            k = k0 + lane
            codes = head + k
            distance = tl.zeros([BLOCK_K], tl.float64)
            for d in range(0, D // UNROLL * UNROLL, UNROLL):
                for j in tl.static_range(UNROLL):
                    c = tl.load(codes + j * K, mask=k < K, other=0.0).to(tl.float64)
                    distance += _cost(tl.load(x_row + d + j).to(tl.float64), c, PRODUCT)
                codes += UNROLL * K
            for d in range(D // UNROLL * UNROLL, D):
                c = tl.load(codes, mask=k < K, other=0.0).to(tl.float64)
                distance += _cost(tl.load(x_row + d).to(tl.float64), c, PRODUCT)
                codes += K
            # infinitely far too: a distance with a NaN, a product that is not finite
            finite = (distance < float("inf")) & (distance > float("-inf"))
            distance = tl.where((k < K) & finite, distance, float("inf"))
            second = tl.minimum(second, tl.maximum(best, distance))
            index = tl.where(distance < best, k, index)
            best = tl.minimum(best, distance)
        row_best = tl.min(best, 0)
        row_index = tl.min(tl.where(best == row_best, index, 0x7FFFFFFF), 0)
        row_second = tl.min(tl.where(index == row_index, second, best), 0)
        tl.store(indices_ptr + row, row_index.to(tl.int64))
        if K > 1:
            row_second = tl.where(row_best < float("inf"), row_second - row_best, 0.0)
        tl.store(margin_ptr + row, row_second.to(tl.float32))


def screen_config(D: int, *, split: bool) -> dict[str, int | bool]:
    """Block sizes, warps and stages of the screen: no spills on sm_80 and sm_90, at most 99 KB of shared memory.

    Narrow rows stay on chip, two programs to a multiprocessor, so that one compares while the other multiplies; wide
    rows take a larger tile, whose products outweigh the comparisons.
    """
    most = 64 if split else 128
    if most >= D:
        tile = {"RESIDENT": True, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_D": _common.block_d(D, least=16, most=most)}
    else:
        tile = {"RESIDENT": False, "BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": 32 if split else 64}
    return {"SPLIT": split, **tile, "num_warps": 8, "num_stages": 2 if tile["RESIDENT"] else 3}


def _refine_rows(
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    margin: Tensor,
    undecided: Tensor | None,
    count: Tensor | None,
    *,
    product: bool,
) -> None:
    (H, N, D), K = x.shape, codebook.shape[1]
    _refine[(min(H * N, _REFINE_PROGRAMS),)](
        x, codebook.transpose(1, 2).contiguous(), undecided, count, indices, margin, N, K, D, H * N,
        ALL=undecided is None, PRODUCT=product, BLOCK_K=_REFINE_BLOCK_K, UNROLL=2, num_warps=4,
        # Not fused here, so that a tie falls as it does in any plain float64 loop.
        enable_fp_fusion=False,
    )  # fmt: skip


def _reach(codebook: Tensor, mean: Tensor | None) -> Tensor:
    """float32 [H, 2]: the largest |c - m| of a head's codes and |m|, which is 0 without a mean."""
    codes = codebook.double()  # in which no square underflows
    mean = torch.zeros_like(codes[:, 0]) if mean is None else mean.double()
    most = torch.linalg.vector_norm(codes - mean.unsqueeze(1), dim=-1).amax(1)
    return torch.stack((most, torch.linalg.vector_norm(mean, dim=-1)), 1).float()


def nearest_codeword(x_HND: Tensor, codebook_HKD: Tensor, *, metric: Metric = "distance") -> tuple[Tensor, Tensor]:
    """Index of the nearest code of each row, and by how much it is nearer than the second.

    x_HND, codebook_HKD: float16, bfloat16, float32 or float64 on one device; 1 <= K < 2^28. The dtypes may differ.

    Returns indices_HN (int64): the lowest k of least sum_d (x_d - c_kd)^2, evaluated in float64 wherever rounding could
    matter, or by metric "product" of largest sum_d x_d c_kd; margin_HN (float32): second least minus least squared
    distance, or largest minus second largest product, infinite for K = 1. What has a NaN or an
    infinity is infinitely far; where every code is, the index is 0 and the margin too. Nothing waits for the device.
    """
    return search(x_HND, codebook_HKD, metric=metric)[:2]


def search(x_HND: Tensor, codebook_HKD: Tensor, *, metric: Metric = "distance") -> tuple[Tensor, Tensor, Tensor]:
    """``nearest_codeword``, and how many rows [1] int32 the screen left to float64."""
    (H, N, D), K = x_HND.shape, codebook_HKD.shape[1]
    _common.check_shapes(codebook=(codebook_HKD, (H, max(1, K), D)))
    x, codebook = x_HND.contiguous(), codebook_HKD.contiguous()
    product = metric == "product"
    indices = _common.empty((H, N), dtype=torch.int64, device=x.device)
    margin = _common.empty((H, N), dtype=torch.float32, device=x.device)
    count = _common.empty((1,), dtype=torch.int32, device=x.device)
    if indices.numel() == 0:
        return indices, margin, count.zero_()
    if K == 1 or torch.float64 in (x.dtype, codebook.dtype) or H * N * K * D <= _REFINE_ALL:
        _refine_rows(x, codebook, indices, margin, None, None, product=product)
        return indices, margin, count.fill_(H * N)

    split = x.dtype != codebook.dtype or codebook.dtype == torch.float32
    if split:
        codebook = codebook.float()
    config = screen_config(D, split=split)
    padded_K = _common.cdiv(K, config["BLOCK_K"]) * config["BLOCK_K"]
    padded_D = _common.cdiv(D, config["BLOCK_D"]) * config["BLOCK_D"]

    def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _common.empty(shape, dtype=dtype, device=x.device)

    high = buffer((H, padded_K, padded_D), torch.float16 if split else codebook.dtype)
    low = buffer((H, padded_K, padded_D), torch.float16) if split else None
    norm = buffer((H, padded_K), torch.float32)
    unscale = buffer((H,), torch.float32)
    undecided = buffer((H, N), torch.int64)
    mean, (least, most) = (codebook.mean(1), torch.aminmax(codebook, dim=1)) if split else (None, (None, None))
    reach = _reach(codebook, mean) if product else None
    _prepare[(padded_K // _PREPARE_BLOCK_K, H)](
        codebook, mean, least, most, high, low, norm, unscale, count, K, D,
        SPLIT=split, PRODUCT=product, BLOCK_K=_PREPARE_BLOCK_K, BLOCK_D=config["BLOCK_D"], num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip
    x_high, x_low, x_unscale, x_radius, x_stride = x, None, None, None, D
    if not config["RESIDENT"]:
        x_radius = buffer((H, N), torch.float32)
        if split:
            x_high, x_low = (buffer((H, N, padded_D), torch.float16) for _ in range(2))
            x_unscale, x_stride = buffer((H, N), torch.float32), padded_D
        _split_rows[(_common.cdiv(N, _SPLIT_BLOCK_N), H)](
            x, mean, x_high, x_low, x_unscale, x_radius, N, D,
            SPLIT=split, BLOCK_N=_SPLIT_BLOCK_N, BLOCK_D=config["BLOCK_D"], num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    _screen[(_common.cdiv(N, config["BLOCK_N"]), H)](
        x_high, x_low, x_unscale, x_radius, mean, high, low, norm, unscale, reach,
        indices, margin, undecided, count, N, K, D, x_stride, padded_K,
        PRODUCT=product, **config, enable_fp_fusion=True,
    )  # fmt: skip
    _refine_rows(x, codebook, indices, margin, undecided, count, product=product)
    return indices, margin, count
