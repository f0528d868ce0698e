"""vq_statistics: how many rows chose each code, and their sum, in an order that never changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.codebook_checks import FLOATS, add_head, check_row_weight, fold_into_heads, unfold_heads
from metarec_fast.ops.register import Backend, check_tensor, choose_backend, define, empty
from metarec_fast.reference.vq_statistics import vq_statistics as reference_vq_statistics


class VQStatistics(NamedTuple):
    """counts: [K] or [H, K]. sums: [K, D] or [H, K, D]. float32, or float64 if x is."""

    counts: Tensor
    sums: Tensor


def _reference(x: Tensor, indices: Tensor, codebook_size: int, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference_vq_statistics(x, indices, codebook_size, row_weight=row_weight)


def _cpu(x: Tensor, indices: Tensor, codebook_size: int, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    x, indices = x.contiguous(), indices.contiguous()
    weight = None if row_weight is None else row_weight.contiguous()
    H, N, D = x.shape
    counts = empty((H, codebook_size), dtype=x.dtype, device=x.device)
    sums = empty((H, codebook_size, D), dtype=x.dtype, device=x.device)
    _C.vq_statistics(
        *map(span, (x, indices, weight, counts, sums)),
        heads=H,
        rows=N,
        codes=codebook_size,
        dim=D,
    )
    return counts, sums


def _cuda(x: Tensor, indices: Tensor, codebook_size: int, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _reference(x, indices, codebook_size, row_weight)
    from metarec_fast.kernels.vq_statistics import vq_statistics

    return vq_statistics(x.contiguous(), indices.contiguous(), codebook_size, row_weight)


def _fake(x: Tensor, indices: Tensor, codebook_size: int, row_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    H, _, D = x.shape
    return x.new_empty((H, codebook_size)), x.new_empty((H, codebook_size, D))


def _vmap(
    info: Any, in_dims: tuple, x: Tensor, indices: Tensor, codebook_size: int, row_weight: Tensor | None
) -> tuple[tuple, tuple]:
    weight = None if row_weight is None else fold_into_heads(info, row_weight, in_dims[3])
    counts, sums = _op(
        fold_into_heads(info, x, in_dims[0]), fold_into_heads(info, indices, in_dims[1]), codebook_size, weight
    )
    return (unfold_heads(info, counts), unfold_heads(info, sums)), (0, 0)


# row_weight is [H, N] here
_op = define(
    "vq_statistics(Tensor x, Tensor indices, SymInt codebook_size, Tensor? row_weight) -> (Tensor, Tensor)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    vmap=_vmap,
)


def vq_statistics(
    x: Tensor, indices: Tensor, codebook_size: int, *, row_weight: Tensor | None = None, backend: Backend = "auto"
) -> VQStatistics:
    """How many rows chose each code, and the sum of those rows: what `vq_ema_update_` needs.

    x: [N, D] or [H, N, D], float32, float16, bfloat16 or float64.
    indices: int64 [N] or [H, N] in -1..codebook_size-1; rows with -1 are skipped, as are rows with a NaN or infinity.
    row_weight: [N] floating point or bool; scales what a row adds to both.
    backend: "auto", "reference", "cpu" or "triton".

    Returns counts [K] or [H, K] and sums [K, D] or [H, K, D], float32 (float64 if x is). Rows are added in an order
    that depends on the input alone, not on the number of threads. Not differentiable.
    Raises TypeError or ValueError for arguments of another dtype, shape or device, or an index out of range (CPU).
    """
    check_tensor(x, "x", dtypes=FLOATS, dims=3 if isinstance(x, Tensor) and x.dim() == 3 else 2)
    check_tensor(indices, "indices", dtypes=(torch.int64,), dims=x.dim() - 1, device=x.device)
    check_row_weight(row_weight, x)
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must be {tuple(x.shape[:-1])} to match x, got {tuple(indices.shape)}")
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    chosen = choose_backend(backend, x.device, operator="vq_statistics", triton=True)
    x_HND = add_head(x.detach().to(dtype))
    indices_HN = indices if x.dim() == 3 else indices.unsqueeze(0)
    weight_HN = None if row_weight is None else row_weight.detach().to(dtype).expand_as(indices_HN)
    counts, sums = (_reference if chosen == "reference" else _op)(x_HND, indices_HN, codebook_size, weight_HN)
    return VQStatistics(counts, sums) if x.dim() == 3 else VQStatistics(counts[0], sums[0])
