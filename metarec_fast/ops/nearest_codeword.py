"""nearest_codeword: for each row the code of least distance, exactly, without an N x K array."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._arrays import span
from metarec_fast.ops._codebook import add_head, batched_lookup, check_pair
from metarec_fast.ops._register import Backend, choose_backend, define, empty
from metarec_fast.ops.portable_lookup import leaves_python, portable_nearest
from metarec_fast.reference.nearest_codeword import nearest_codeword as reference_nearest_codeword


class NearestCodeword(NamedTuple):
    """indices: int64 [N] or [H, N]. margin: float32, second least minus least squared distance, or None."""

    indices: Tensor
    margin: Tensor | None


def _search(x: Tensor, codebook: Tensor, *, with_margin: bool) -> tuple[Tensor, Tensor | None]:
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
    )
    return indices, margin


def _cpu(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return _search(x, codebook, with_margin=True)


def _cuda(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference_nearest_codeword(x, codebook)
    from metarec_fast.kernels.nearest_codeword import nearest_codeword

    return nearest_codeword(x.contiguous(), codebook.contiguous())


def _fake(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty(x.shape[:2], dtype=torch.float32)


def _vmap(info: Any, in_dims: tuple, x: Tensor, codebook: Tensor) -> tuple[tuple, tuple]:
    return batched_lookup(info, in_dims, x, codebook, _op)


_op = define(
    "nearest_codeword(Tensor x, Tensor codebook) -> (Tensor, Tensor)", cpu=_cpu, cuda=_cuda, fake=_fake, vmap=_vmap
)


# the margin costs a second search for the runner-up: an operator without it serves those who want codes alone
_index_op = define(
    "nearest_codeword_index(Tensor x, Tensor codebook) -> Tensor",
    cpu=lambda x, codebook: _search(x, codebook, with_margin=False)[0],
    cuda=lambda x, codebook: _cuda(x, codebook)[0],
    fake=lambda x, codebook: _fake(x, codebook)[0],
    vmap=lambda info, in_dims, x, codebook: _first(
        batched_lookup(info, in_dims, x, codebook, lambda *rows: (_index_op(*rows),))
    ),
)


def _first(batched: tuple[tuple, tuple]) -> tuple[Tensor, int]:
    (output,), (dim,) = batched
    return output, dim


def nearest_codeword(
    x: Tensor, codebook: Tensor, *, with_margin: bool = True, backend: Backend = "auto"
) -> NearestCodeword:
    """The lowest k of least ||x - c_k||^2 for each row, the same on every backend and any split of the rows.

    x: [N, D] or [H, N, D], float32, float16, bfloat16 or float64; half types are compared as the float32 they equal.
    codebook: [K, D] or [H, K, D], one codebook per head; K >= 1.
    with_margin: False leaves the margin out (None), which makes the search up to twice as fast on the CPU.
    backend: "auto", "reference", "cpu" or "triton".

    Returns indices, int64 [N] or [H, N], as `reference.nearest_codeword` gives, and margin, float32, how much larger
    the second least squared distance is: to float32 accuracy of the scores, 0 only for a tie within that accuracy,
    infinite if K is 1. A row or code with a NaN or an infinity is infinitely far; if all are, the index is 0.
    Not differentiable. Raises TypeError or ValueError for arguments of another dtype, shape or device.
    """
    dtype = check_pair(x, codebook)
    chosen = choose_backend(backend, x.device, operator="nearest_codeword", triton=True)
    rows, codes = add_head(x.detach().to(dtype)), add_head(codebook.detach().to(dtype))
    if chosen == "reference":
        indices, margin = reference_nearest_codeword(rows, codes)
    elif leaves_python() and not with_margin:
        indices, margin = portable_nearest(rows, codes), None
    elif with_margin:
        indices, margin = _op(rows, codes)
    else:
        indices, margin = _index_op(rows, codes), None
    if x.dim() == 2:
        indices, margin = indices[0], None if margin is None else margin[0]
    return NearestCodeword(indices, margin if with_margin else None)
