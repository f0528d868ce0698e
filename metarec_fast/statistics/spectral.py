"""A start for an item table from structure: singular vectors of the domain's own co-occurrence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences
from metarec_fast.statistics.transitions import TransitionKernel


def spectral_table(train: Sequences, dim: int, *, seed: int, window: int = 10, decay: float = 0.9) -> Tensor:
    """[V, dim] float32, rows of length 1: U sqrt(S) of the positive pointwise mutual information of co-occurrence.

    Items that never co-occur get a random direction. Deterministic for a seed.
    """
    V = train.num_items
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, dim, generator=generator)
    forward = TransitionKernel.fit(train, window=window, decay=decay)
    row, column, weight = (
        torch.cat(pair) for pair in zip(_entries(forward), _entries(forward.transposed()), strict=True)
    )
    if len(row):
        # a pair seen in both directions stands twice: the logarithm needs their sum
        counts = torch.sparse_coo_tensor(torch.stack((row, column)), weight, (V, V), check_invariants=True).coalesce()
        (row, column), weight = counts.indices(), counts.values()
        mass = torch.zeros(V, dtype=torch.float64).index_add_(0, row, weight)
        pmi = (weight * mass.sum() / (mass[row] * mass[column])).log()
        keep = pmi > 0
        matrix = torch.sparse_coo_tensor(
            counts.indices()[:, keep], pmi[keep].float(), (V, V), is_coalesced=True, check_invariants=True
        )
        rank = min(dim, V)
        U, S = _leading_singular(matrix, rank, generator)
        rows = U * S.sqrt()
        # beyond the matrix's own rank U has vectors of no meaning, on items that never co-occur too
        seen = torch.zeros(V, dtype=torch.bool)
        seen[matrix.indices()[0]] = True
        seen &= rows.norm(dim=1) > 1e-6
        table[seen, :rank] = rows[seen]
        table[seen, rank:] = 0
    return torch.nn.functional.normalize(table, dim=1)


def moments(table: Tensor, descriptors: np.ndarray) -> Tensor:
    """[D, F] of Frobenius norm 1, or 0: how each coordinate of the rows [V, D] goes with each descriptor [V, F]."""
    M = table.double().T @ torch.from_numpy(descriptors).double()
    return (M / M.norm().clamp_min(1e-12)).to(table.dtype)


def turned(table: Tensor, own: Tensor, frame: Tensor) -> Tensor:
    """The rows [V, D] turned so that their moments ``own`` [D, F] come closest to ``frame`` (orthogonal Procrustes).

    A spectral table is known up to a rotation or reflection, and each domain's has another; lengths and angles within
    it stay. Where moments say nothing, as in D - F directions at least, rows stay as they are.
    """
    tie_break = 1e-7 * torch.eye(len(own), dtype=torch.float64)  # else rounding would turn what moments leave open
    U, _, Vh = torch.linalg.svd(own.double() @ frame.double().T + tie_break)
    return (table.double() @ (U @ Vh)).to(table.dtype)


def _entries(kernel: TransitionKernel) -> tuple[Tensor, Tensor, Tensor]:
    rows = np.repeat(np.arange(kernel.num_items), np.diff(kernel.offsets))
    return (
        torch.from_numpy(rows),
        torch.from_numpy(kernel.columns.astype(np.int64)),
        torch.from_numpy(kernel.weights).double(),
    )


def _leading_singular(
    matrix: Tensor, rank: int, generator: torch.Generator, iterations: int = 6
) -> tuple[Tensor, Tensor]:
    """Randomized subspace iteration (Halko, Martinsson and Tropp, 2011) with its own generator."""
    width = min(rank + 16, matrix.shape[0])
    Q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[0], width, generator=generator)).Q
    for _ in range(iterations):  # the matrix is symmetric
        Q = torch.linalg.qr(matrix @ Q).Q
    U, S, _ = torch.linalg.svd((matrix @ Q).T, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank]
