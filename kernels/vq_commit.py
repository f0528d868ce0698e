"""vq_commit on a GPU: nearest_codeword, then its code and the squared error in one pass over x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common
from metarec_fast.kernels.nearest_codeword import Metric, search

_TILE = 2048  # elements of x that a program holds


@triton.jit(do_not_specialize=["N", "K"])
def _gather(
    x_ptr, codebook_ptr, indices_ptr, quantized_ptr, error_ptr,  # [H, N, D], [H, K, D], [H, N], [H, N, D], [H, N]
    N, K, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = N - first
    first += h * N
    row = tl.arange(0, BLOCK_N)
    x_ptr += first * D
    quantized_ptr += first * D
    code = h * K + tl.load(indices_ptr + first + row, mask=row < rows, other=0)
    error = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        at = row[:, None] * D + d[None, :]
        inside = (row[:, None] < rows) & (d[None, :] < D)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        c = tl.load(codebook_ptr + code[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(quantized_ptr + at, c.to(x.dtype), mask=inside)
        difference = x.to(tl.float32) - c.to(tl.float32)
        error += tl.sum(difference * difference, 1)
    tl.store(error_ptr + first + row, error, mask=row < rows)


def vq_commit(
    x_HND: Tensor, codebook_HKD: Tensor, *, metric: Metric = "distance"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Nearest code of each row, its index and the squared distance to it.

    x_HND, codebook_HKD, metric: as in ``nearest_codeword``.

    Returns quantized_HND (dtype of x), indices_HN (int64), row_error_HN (float32): sum over D of (x - c)^2, with c
    before it is rounded to the dtype of x; the same for a row whatever other rows come with it. Then margin_HN and the
    number of rows that the screen left to float64, as ``search`` returns them.
    """
    x, codebook = x_HND.contiguous(), codebook_HKD.contiguous()
    indices, margin, undecided = search(x, codebook, metric=metric)
    (H, N, D), K = x.shape, codebook.shape[1]
    quantized = _common.empty((H, N, D), dtype=x.dtype, device=x.device)
    row_error = _common.empty((H, N), dtype=torch.float32, device=x.device)
    if indices.numel():
        BLOCK_D = _common.block_d(D, least=16, most=_common.MAX_BLOCK_D)
        BLOCK_N = _TILE // BLOCK_D
        _gather[(_common.cdiv(N, BLOCK_N), H)](
            x, codebook, indices, quantized, row_error, N, K, D,
            BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return quantized, indices, row_error, margin, undecided
