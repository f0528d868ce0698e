"""pad_packed: packed rows as a padded rectangle, for those who need one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import check_integer, span
from metarec_fast.ops.register import check_tensor, empty

Side = Literal["left", "right"]


def pad_packed(values: Tensor, offsets: Tensor, *, length: int, side: Side = "left", fill: int = 0) -> Tensor:
    """Row b of the result holds values[offsets[b]:offsets[b + 1]], padded to ``length`` positions with ``fill``.

    values: [T] or [T, K], int64 or float32, on the CPU. offsets: int64 [B+1] rising from 0 to T.
    side: where the padding goes; "left" keeps the newest event at the end. Of a longer row the last ``length``
        positions are kept.
    fill: an integer; for float32 only 0.

    Returns [B, length] or [B, length, K]. The same as ``reference.windows.pad_packed``. Raises TypeError or
    ValueError for other dtypes, shapes, devices, and offsets that fall.
    """
    dims = values.dim() if isinstance(values, Tensor) else 1
    if dims not in (1, 2):
        raise ValueError(f"values must be [T] or [T, K], got {tuple(values.shape)}")
    check_tensor(values, "values", dtypes=(torch.int64, torch.float32), dims=dims, device=torch.device("cpu"))
    check_tensor(offsets, "offsets", dtypes=(torch.int64,), dims=1, device=values.device)
    if side not in ("left", "right"):
        raise ValueError(f"side must be left or right, got {side!r}")
    if len(offsets) == 0:
        raise ValueError("offsets must be [B+1] with B >= 0, got an empty tensor")
    check_integer(length, "length", least=1, below=2**40)
    check_integer(fill, "fill", least=-(2**63), below=2**63)
    if fill != 0 and values.dtype == torch.float32:
        raise ValueError(f"fill must be 0 for float32 values, got {fill}")
    values, offsets = values.contiguous(), offsets.contiguous()
    B = len(offsets) - 1
    out = empty((B, length, *values.shape[1:]), dtype=values.dtype, device=values.device)
    bits = torch.int64 if values.dtype == torch.int64 else torch.int32  # copied, whatever they stand for
    _C.pad_rows(
        span(values.view(bits)),
        span(offsets),
        span(out.view(bits)),
        rows=B,
        positions=len(values),
        length=length,
        count=values.shape[1] if values.dim() == 2 else 1,
        left=side == "left",
        fill=fill,
    )
    return out
