"""bounded_lookup_: the nearest codes of rows that are looked up again, from bounds kept between lookups. Exact.

A plain function that runs on the CPU and changes its state: not to be traced, nor called under torch.func.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import check_integer, span
from metarec_fast.ops.codebook_checks import add_head, check_pair
from metarec_fast.ops.nearest_codeword import nearest_codeword
from metarec_fast.ops.register import check_tensor, empty

# After a lookup in which most bounds failed, the next is a plain search, after the next such lookup two are, and so on:
# where rows or codes are anywhere each time, bounds cost several times what a search does.
_LONGEST_PAUSE = 64


@dataclass
class RowBounds:
    """Bounds of the distances between the rows of a table and the codes; csrc/vq/bounded_lookup.cpp derives them.

    For V rows and H codebooks of K codes of width D, B of which have a bound of their own for each row, on the CPU.
    """

    neighbours: int  # B
    records: Tensor  # int32 [V, H, 6 + D + 2 B], a RowRecord each
    path: Tensor  # float64 [H, K]
    sweep: Tensor  # float64 [H]
    jumped: Tensor  # int32 [H, K]
    recent: Tensor  # int32 [H, K]
    recent_count: Tensor  # int64 [H]
    previous: Tensor  # float32 [H, K, D], the codebook at the last lookup
    codebook_version: int = -1  # -1: no codebook yet
    pause: int = 0  # lookups to go without bounds
    next_pause: int = 1

    def spans(self) -> dict[str, tuple[int, int, str]]:
        """The tensors as the extension takes them, where they are now: a copy of these bounds has others."""
        return {name: span(value) for name, value in vars(self).items() if isinstance(value, Tensor)}

    @staticmethod
    def empty(*, rows: int, heads: int, codes: int, dim: int, neighbours: int) -> RowBounds:
        """Bounds of ``rows`` rows that nothing is known of yet. neighbours: B, from 1 to ``codes``.

        Raises ValueError for sizes out of range.
        """
        for name, value in (("rows", rows), ("heads", heads), ("codes", codes), ("dim", dim)):
            check_integer(value, name, least=1)
        if not 1 <= neighbours <= codes:
            raise ValueError(f"neighbours must be in 1..{codes}, got {neighbours}")
        words = 6 + dim + 2 * neighbours
        return RowBounds(
            neighbours=neighbours,
            records=torch.full((rows, heads, words), -1, dtype=torch.int32),
            path=torch.zeros(heads, codes, dtype=torch.float64),
            sweep=torch.zeros(heads, dtype=torch.float64),
            jumped=torch.zeros(heads, codes, dtype=torch.int32),
            recent=torch.zeros(heads, codes, dtype=torch.int32),
            recent_count=torch.zeros(heads, dtype=torch.int64),
            previous=torch.zeros(heads, codes, dim),
        )


class LookupWork(NamedTuple):
    """What a lookup of rows took, a row with each codebook counting once.

    distances: how many were computed, of a row and a code, a row and its former self, or a code and its former self.
    proven: rows whose code the bounds alone named. searched: rows compared with every code.
    """

    distances: int
    proven: int
    searched: int


def _follow_codes(bounds: RowBounds, codebook: Tensor, sizes: dict[str, int]) -> tuple[bool, int]:
    """Update the bounds by how far the codes moved. Returns whether they are finite, and the distances computed."""
    if bounds.codebook_version < 0:
        if not codebook.isfinite().all():
            return False, 0
        moved, cost = True, 0
    else:
        result = _C.follow_codes(bounds.spans(), span(codebook), **sizes, next_version=bounds.codebook_version + 1)
        moved, cost = result == "moved", sizes["heads"] * sizes["codes"]
        if result == "not finite":
            return False, cost
    if moved:
        bounds.previous.copy_(codebook)
        bounds.codebook_version += 1
    return True, cost


def bounded_lookup_(bounds: RowBounds, ids: Tensor, x: Tensor, codebook: Tensor) -> tuple[Tensor, LookupWork]:
    """The codes that `nearest_codeword` gives, and what they took; ``bounds`` are brought up to date.

    ids: int64 [N] in [0, V), which rows of the table x are, in any order and as often as wanted. x: [N, D] or
    [H, N, D]; codebook: [K, D] or [H, K, D]; float32, float16, bfloat16 or float64. Neither rows nor codes need have
    anything to do with what they were before: that only costs time.

    Returns indices, int64 [N] or [H, N], and the work. `nearest_codeword` decides for rows that are not finite, for
    rows whose two nearest codes float64 cannot separate, and for all rows if the codebook is not finite, the dtype
    is float64, the device no CPU, or for a while after bounds mostly failed; such a row counts as searched.
    Raises TypeError or ValueError for arguments of another dtype, shape or device, and ids out of range.
    """
    dtype = check_pair(x, codebook)
    check_tensor(ids, "ids", dtypes=(torch.int64,), dims=1, device=x.device)
    V, H, (K, D), N = len(bounds.records), len(bounds.path), bounds.previous.shape[1:], x.shape[-2]
    if tuple(add_head(codebook).shape) != (H, K, D):
        raise ValueError(f"codebook must be {[H, K, D] if H > 1 else [K, D]}, got {list(codebook.shape)}")
    if len(ids) != N:
        raise ValueError(f"ids must be [{N}] to match x, got {list(ids.shape)}")
    if N and (int(ids.min()) < 0 or int(ids.max()) >= V):
        raise ValueError(f"ids must be in 0..{V - 1}, got {int(ids.min())}..{int(ids.max())}")
    x_HND, codebook_HKD = (add_head(t.detach().to(dtype)).contiguous() for t in (x, codebook))
    if x.device.type == "cpu" and dtype == torch.float32:
        indices, work = _cpu(bounds, ids.contiguous(), x_HND, codebook_HKD)
    else:
        indices, work = (
            nearest_codeword(x_HND, codebook_HKD, with_margin=False).indices,
            LookupWork(H * N * K, 0, H * N),
        )
    return indices if x.dim() == 3 else indices[0], work


def _cpu(bounds: RowBounds, ids: Tensor, x: Tensor, codebook: Tensor) -> tuple[Tensor, LookupWork]:
    (H, N, D), K = x.shape, codebook.shape[1]
    sizes = {"heads": H, "rows": len(bounds.records), "codes": K, "dim": D, "list": bounds.neighbours}
    finite, followed = _follow_codes(bounds, codebook, sizes)
    if bounds.pause or not finite:
        bounds.pause = max(bounds.pause - 1, 0)
        return nearest_codeword(x, codebook, with_margin=False).indices, LookupWork(followed + H * N * K, 0, H * N)
    indices = empty((H, N), dtype=torch.int64, device=x.device)
    distances, proven, searched, failed = _C.bounded_lookup(
        bounds.spans(),
        *map(span, (ids, x, codebook, indices)),
        **sizes,
        count=N,
        version=bounds.codebook_version,
    )
    if 2 * failed > H * N:
        bounds.pause, bounds.next_pause = bounds.next_pause, min(2 * bounds.next_pause, _LONGEST_PAUSE)
    elif 2 * searched <= H * N:
        bounds.next_pause = 1
    undecided_HN = indices < 0
    for head in undecided_HN.any(1).nonzero()[:, 0].tolist():
        which = undecided_HN[head].nonzero()[:, 0]
        indices[head, which] = nearest_codeword(x[head, which], codebook[head], with_margin=False).indices
        distances, searched = distances + len(which) * K, searched + len(which)
    return indices, LookupWork(followed + distances, proven, searched)
