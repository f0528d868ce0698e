"""nearest_codeword: for each row the code of least distance or largest product, exactly, without an N x K array."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.codebook_checks import Metric, add_head, batched_lookup, check_metric, check_pair
from metarec_fast.ops.portable_lookup import leaves_python, portable_nearest
from metarec_fast.ops.register import Backend, choose_backend, define, empty
from metarec_fast.reference.nearest_codeword import nearest_codeword as reference_nearest_codeword


class NearestCodeword(NamedTuple):
    """indices: int64 [N] or [H, N]. margin: float32, by how much it is nearer than the second code, or None."""

    indices: Tensor
    margin: Tensor | None


def _search(x: Tensor, codebook: Tensor, metric: Metric, *, with_margin: bool) -> tuple[Tensor, Tensor | None]:
    x, codebook = x.contiguous(), codebook.contiguous()
    H, N, D = x.shape
    indices = empty((H, N), dtype=torch.int64, device=x.device)
    margin = empty((H, N), dtype=torch.float32, device=x.device) if with_margin else None
    _C.nearest_codeword(
        *map(span, (x, codebook, indices, margin)),
        heads=H,
        rows=N,
        codes=codebook.shape[1],
        dim=D,
        metric=metric,
    )
    return indices, margin


def _cpu(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> tuple[Tensor, Tensor]:
    return _search(x, codebook, metric, with_margin=True)


def _cuda(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference_nearest_codeword(x, codebook, metric=metric)
    from metarec_fast.kernels.nearest_codeword import nearest_codeword

    return nearest_codeword(x.contiguous(), codebook.contiguous(), metric=metric)


def _fake(x: Tensor, codebook: Tensor, metric: Metric = "distance") -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty(x.shape[:2], dtype=torch.float32)


def _vmap(info: Any, in_dims: tuple, x: Tensor, codebook: Tensor, metric: Metric = "distance") -> tuple[tuple, tuple]:
    return batched_lookup(info, in_dims, x, codebook, lambda *rows: op(*rows, metric))


def _index_vmap(
    info: Any, in_dims: tuple, x: Tensor, codebook: Tensor, metric: Metric = "distance"
) -> tuple[Tensor, int]:
    (output,), (dim,) = batched_lookup(info, in_dims, x, codebook, lambda *rows: (index_op(*rows, metric),))
    return output, dim


op = define(
    'nearest_codeword(Tensor x, Tensor codebook, str metric="distance") -> (Tensor, Tensor)',
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
    vmap=_vmap,
)


# the margin costs a second search for the runner-up: an operator without it serves those who want codes alone
index_op = define(
    'nearest_codeword_index(Tensor x, Tensor codebook, str metric="distance") -> Tensor',
    cpu=lambda x, codebook, metric="distance": _search(x, codebook, metric, with_margin=False)[0],
    cuda=lambda x, codebook, metric="distance": _cuda(x, codebook, metric)[0],
    fake=lambda x, codebook, metric="distance": _fake(x, codebook)[0],
    vmap=_index_vmap,
)


def nearest_codeword(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "distance",
    with_margin: bool = True,
    backend: Backend = "auto",
) -> NearestCodeword:
    """For each row the lowest k of least ||x - c_k||^2 or largest <x, c_k>, the same on every backend and any split.

    x: [N, D] or [H, N, D], float32, float16, bfloat16 or float64; half types are compared as the float32 they equal.
    codebook: [K, D] or [H, K, D], one codebook per head; K >= 1.
    metric: "distance", or "product" for the largest inner product, whatever the lengths of the codes: what cosine
        similarity needs once the rows are of length 1. A row of zeros has code 0 then, as all codes tie.
    with_margin: False leaves the margin out (None), which makes the search up to twice as fast on the CPU.
    backend: "auto", "reference", "cpu" or "triton".

    Returns indices, int64 [N] or [H, N], as `reference.nearest_codeword` gives, and margin, float32, how much larger
    the second least squared distance is, or how much smaller the second largest product: to float32 accuracy of the
    scores, 0 only for a tie within that accuracy, infinite if K is 1. A row or code with a NaN or an infinity is
    infinitely far; if all are, the index is 0.
    Not differentiable. Raises TypeError or ValueError for arguments of another dtype, shape or device, and for an
    unknown ``metric``.
    """
    dtype = check_pair(x, codebook)
    check_metric(metric)
    chosen = choose_backend(backend, x.device, operator="nearest_codeword", triton=True)
    rows, codes = add_head(x.detach().to(dtype)), add_head(codebook.detach().to(dtype))
    if chosen == "reference":
        indices, margin = reference_nearest_codeword(rows, codes, metric=metric)
    elif leaves_python() and not with_margin:
        indices, margin = portable_nearest(rows, codes, metric), None
    elif with_margin:
        indices, margin = op(rows, codes, metric)
    else:
        indices, margin = index_op(rows, codes, metric), None
    if x.dim() == 2:
        indices, margin = indices[0], None if margin is None else margin[0]
    return NearestCodeword(indices, margin if with_margin else None)
