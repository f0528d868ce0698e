"""A start for an item table from structure: singular vectors of the domain's own co-occurrence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences


def cooccurrence(train: Sequences, *, window: int, decay: float) -> Tensor:
    """Symmetric [V, V] sparse counts of items at most ``window`` events apart, lag l weighing decay^(l-1)."""
    V, items = train.num_items, np.asarray(train.items, dtype=np.int64)
    user = np.repeat(np.arange(len(train)), train.lengths)
    index, weight = [], []
    for lag in range(1, window + 1):
        together = user[lag:] == user[:-lag]
        index.append(np.stack((items[:-lag][together], items[lag:][together])))
        weight.append(np.full(index[-1].shape[1], decay ** (lag - 1)))
    forward = np.concatenate(index, 1)
    both = np.concatenate((forward, forward[::-1]), 1)
    values = np.tile(np.concatenate(weight), 2)
    return torch.sparse_coo_tensor(torch.from_numpy(both), torch.from_numpy(values), (V, V)).coalesce()


def spectral_table(train: Sequences, dim: int, *, seed: int, window: int = 10, decay: float = 0.9) -> Tensor:
    """[V, dim] float32, rows of length 1: U sqrt(S) of the positive pointwise mutual information of co-occurrence.

    Items that never co-occur get a random direction. Deterministic for a seed.
    """
    V = train.num_items
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(V, dim, generator=generator)
    counts = cooccurrence(train, window=window, decay=decay)
    if counts._nnz():
        mass = torch.zeros(V, dtype=torch.float64).index_add_(0, counts.indices()[0], counts.values())
        row, column = counts.indices()
        pmi = (counts.values() * mass.sum() / (mass[row] * mass[column])).log()
        keep = pmi > 0
        matrix = (
            torch.sparse_coo_tensor(counts.indices()[:, keep], pmi[keep].float(), (V, V)).coalesce().to_sparse_csr()
        )
        rank = min(dim, V)
        U, S = _leading_singular(matrix, rank, generator)
        seen = U.norm(dim=1) > 1e-6
        table[seen, :rank] = (U * S.sqrt())[seen]
        table[seen, rank:] = 0
    return torch.nn.functional.normalize(table, dim=1)


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
