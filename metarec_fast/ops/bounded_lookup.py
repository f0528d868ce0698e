"""bounded_lookup_: the nearest codes of rows that come back, from what was remembered of them. Exact.

A plain function that runs on the CPU and changes its state: not to be traced, nor called under torch.func.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._register import empty
from metarec_fast.ops.nearest_codeword import nearest_codeword


@dataclass
class RowBounds:
    """What is remembered of the rows of a table and of the codes; csrc/vq/bounded_lookup.cpp says what bounds what.

    For V rows and H codebooks of K codes of width D, B of them remembered by name for each row, on the CPU.
    """

    anchor: Tensor  # float32 [H, V, D], the row when it was last searched in full
    code: Tensor  # int32 [H, V, B], its nearest codes then
    key: Tensor  # float32 [H, V, B]
    rest: Tensor  # float32 [H, V]
    upper: Tensor  # float32 [H, V]
    version: Tensor  # int64 [H, V], -1 for a row never searched
    visits: Tensor  # float32 [H, V]
    spent: Tensor  # float32 [H, V]
    path: Tensor  # float64 [H, K]
    sweep: Tensor  # float64 [H]
    jumped: Tensor  # int64 [H, K]
    recent: Tensor  # int32 [H, K]
    recent_count: Tensor  # int64 [H]
    previous: Tensor  # float32 [H, K, D], the codebook at the last lookup
    transposed: Tensor  # float32 [H, D, K], the same
    codebook_version: int = -1  # -1: no codebook yet
    addresses: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "codebook_version"}
        self.addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}

    @staticmethod
    def empty(*, rows: int, heads: int, codes: int, dim: int, neighbours: int) -> RowBounds:
        """Bounds of ``rows`` rows that nothing is known of yet. neighbours: B, at most ``codes``."""
        row = (heads, rows)
        return RowBounds(
            anchor=torch.zeros(*row, dim),
            code=torch.zeros(*row, neighbours, dtype=torch.int32),
            key=torch.zeros(*row, neighbours),
            rest=torch.zeros(row),
            upper=torch.zeros(row),
            version=torch.full(row, -1, dtype=torch.int64),
            visits=torch.zeros(row),
            spent=torch.zeros(row),
            path=torch.zeros(heads, codes, dtype=torch.float64),
            sweep=torch.zeros(heads, dtype=torch.float64),
            jumped=torch.zeros(heads, codes, dtype=torch.int64),
            recent=torch.zeros(heads, codes, dtype=torch.int32),
            recent_count=torch.zeros(heads, dtype=torch.int64),
            previous=torch.zeros(heads, codes, dim),
            transposed=torch.zeros(heads, dim, codes),
        )


def _follow_codes(bounds: RowBounds, codebook: Tensor, sizes: dict[str, int]) -> tuple[bool, int]:
    """Take in how far the codes moved. Returns whether they are finite, and how many distances that took."""
    if bounds.codebook_version < 0:
        if not codebook.isfinite().all():
            return False, 0
        moved, cost = True, 0
    else:
        found = _C.follow_codes(
            bounds.addresses, codebook.data_ptr(), **sizes, next_version=bounds.codebook_version + 1
        )
        moved, cost = found == "moved", sizes["heads"] * sizes["codes"]
        if found == "not finite":
            return False, cost
    if moved:
        bounds.previous.copy_(codebook)
        bounds.transposed.copy_(codebook.transpose(1, 2))
        bounds.codebook_version += 1
    return True, cost


def bounded_lookup_(bounds: RowBounds, ids: Tensor, x: Tensor, codebook: Tensor) -> tuple[Tensor, int]:
    """The codes that `nearest_codeword` gives, and how many distances they took; ``bounds`` are brought up to date.

    ids: int64 [N], which rows of the table x are, in any order and as often as wanted; x: float32 [H, N, D];
    codebook: float32 [H, K, D]. Neither rows nor codes need have anything to do with what they were before: that
    only costs time. A distance is that of two vectors of D elements: row and code, row and its former self, code and
    its former self.

    Returns indices, int64 [H, N], and the number of distances. Rows that are not finite, all rows if the codebook is
    not, and rows whose two nearest codes float64 cannot tell apart go to `nearest_codeword`.
    Raises ValueError for ids out of range; shapes and dtypes are the caller's promise.
    """
    H, N, D = x.shape
    K = codebook.shape[1]
    x, codebook = x.contiguous(), codebook.contiguous()
    sizes = {"heads": H, "rows": bounds.version.shape[1], "codes": K, "dim": D, "list": bounds.code.shape[2]}
    finite, evaluations = _follow_codes(bounds, codebook, sizes)
    if not finite:
        return nearest_codeword(x, codebook).indices, evaluations + H * N * K
    ids = ids.contiguous()
    indices = empty((H, N), dtype=torch.int64, device=x.device)
    evaluations += _C.bounded_lookup(
        bounds.addresses,
        ids.data_ptr(),
        x.data_ptr(),
        codebook.data_ptr(),
        bounds.transposed.data_ptr(),
        indices.data_ptr(),
        **sizes,
        count=N,
        version=bounds.codebook_version,
    )
    open_HN = indices < 0
    for head in open_HN.any(1).nonzero()[:, 0].tolist():
        which = open_HN[head].nonzero()[:, 0]
        indices[head, which] = nearest_codeword(x[head, which], codebook[head]).indices
        evaluations += len(which) * K
    return indices, evaluations
