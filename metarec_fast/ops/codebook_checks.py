"""What the codebook operators share: argument checks, the head dimension, batching."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from metarec_fast.ops.register import check_tensor

Metric = Literal["distance", "product"]
METRICS = ("distance", "product")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_pair(x: Tensor, codebook: Tensor) -> torch.dtype:
    """Check rows against a codebook; returns the dtype to compute in, which holds both exactly."""
    check_tensor(x, "x", dtypes=FLOATS, dims=3 if isinstance(x, Tensor) and x.dim() == 3 else 2)
    check_tensor(codebook, "codebook", dtypes=FLOATS, dims=x.dim(), device=x.device)
    H, D = x.shape[:-2], x.shape[-1]
    if codebook.shape[-1] != D or codebook.shape[:-2] != H:
        expected = ", ".join(str(n) for n in (*H, "K", D))
        raise ValueError(f"codebook must be [{expected}] to match x, got {tuple(codebook.shape)}")
    if codebook.shape[-2] < 1 or D < 1:
        raise ValueError(f"codebook must hold at least one code of one element, got {tuple(codebook.shape)}")
    return torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32


def check_row_weight(row_weight: Tensor | None, x: Tensor) -> None:
    if row_weight is None:
        return
    check_tensor(row_weight, "row_weight", dtypes=(*FLOATS, torch.bool), dims=1, device=x.device)
    if row_weight.shape[0] != x.shape[-2]:
        raise ValueError(f"row_weight must be [{x.shape[-2]}] to match x, got {tuple(row_weight.shape)}")


def check_metric(metric: Metric) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be {' or '.join(map(repr, METRICS))}, got {metric!r}")


def add_head(tensor: Tensor) -> Tensor:
    """[N, D] -> [1, N, D]; three dimensions stay."""
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)


def fold_into_heads(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    """[H, ...] batched at ``dim``, or shared by the batch if None -> [B * H, ...]."""
    tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(-1, *tensor.shape[2:])


def unfold_heads(info: Any, tensor: Tensor) -> Tensor:
    """[B * H, ...] -> [B, H, ...]."""
    return tensor.view(info.batch_size, -1, *tensor.shape[1:])


def batched_lookup(info: Any, in_dims: tuple, x: Tensor, codebook: Tensor, run: Any) -> tuple[tuple, tuple]:
    """vmap of ``run(x[H, N, D], codebook[H, K, D])`` as one call, for outputs that are [H, N, ...].

    A batch of x over one codebook is more rows; a batch of codebooks is more heads.
    """
    if in_dims[1] is None:
        x_HBND = x.movedim(in_dims[0], 1)
        H, B, N, D = x_HBND.shape
        outputs = run(x_HBND.reshape(H, B * N, D), codebook)
        return tuple(o.view(H, B, N, *o.shape[2:]) for o in outputs), (1,) * len(outputs)
    outputs = run(fold_into_heads(info, x, in_dims[0]), fold_into_heads(info, codebook, in_dims[1]))
    return tuple(unfold_heads(info, o) for o in outputs), (0,) * len(outputs)
