"""The codes of a table's rows, cached from step to step so that most of them need no search."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast.ops import LookupWork, RowBounds, bounded_lookup_


class AssignmentStats(NamedTuple):
    """What was looked up so far, a row with each codebook counting once.

    rows: looked up; proven: of these, decided by their bounds alone; searched: compared with every code.
    evaluations: distances computed, the bounds' own included: of a row and a code, a row and its former self, or a
    code and its former self. full_evaluations: what comparing every row with every code computes.
    """

    rows: int
    proven: int
    searched: int
    evaluations: int
    full_evaluations: int


class CodebookAssignments:
    """Exact nearest codes of rows that come back step after step, such as an item table in training.

    Bounds kept for each row prove that most codes cannot have become its nearest since it was last searched, from how
    far the row and the codes have moved; only the others are compared. The codes are those of `nearest_codeword`,
    whatever rows and codebook do in between: a table that is replaced, or codes that jump, cost time alone. By distance
    only: for cosine similarity use ``nearest_codeword(x, codebook, metric="product")``, which no such bounds serve.

    num_rows, codebook_size, dim: of the table, the codebook, and the vectors. num_codebooks: codebooks for as many
    heads. neighbours: candidate codes cached for each row; more of them serve longer drifts and take more memory,
    4 * (dim + 2 * neighbours + 6) bytes for each row and codebook.

    Fewer distances are not always less time: a full search computes them in tiles, several times faster each. It pays
    where rows and codes move slowly beside the distances between codes and codebook_size * dim is large. Where most
    bounds fail, plain searches take over for a while, up to 64 lookups. bench/bench_assignments.py shows both ends.

    On a CPU; elsewhere, and for float64, every row is searched in full. A cache, not a state: it belongs in no
    checkpoint, and an empty one returns the same codes.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self, num_rows: int, codebook_size: int, dim: int, *, num_codebooks: int = 1, neighbours: int = 32
    ) -> None:
        for name, value in (
            ("num_rows", num_rows),
            ("codebook_size", codebook_size),
            ("dim", dim),
            ("num_codebooks", num_codebooks),
            ("neighbours", neighbours),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_rows, self.codebook_size, self.dim = num_rows, codebook_size, dim
        self.num_codebooks, self.neighbours = num_codebooks, min(neighbours, codebook_size)
        self.reset()

    def reset(self) -> None:
        """Clear the cache and the statistics."""
        self._bounds = RowBounds.empty(
            rows=self.num_rows,
            heads=self.num_codebooks,
            codes=self.codebook_size,
            dim=self.dim,
            neighbours=self.neighbours,
        )
        self._rows, self._work = 0, LookupWork(0, 0, 0)

    @property
    def stats(self) -> AssignmentStats:
        distances, proven, searched = self._work
        return AssignmentStats(self._rows, proven, searched, distances, self._rows * self.codebook_size)

    @torch.no_grad()
    def lookup(self, ids: Tensor, x: Tensor, codebook: Tensor) -> Tensor:
        """The nearest code of each row, the same as ``nearest_codeword(x, codebook).indices``.

        ids: int64 [N] in [0, num_rows), which rows these are; repeats may differ. x: [N, dim], or
        [num_codebooks, N, dim]; codebook: [codebook_size, dim], or [num_codebooks, codebook_size, dim].
        float32, float16, bfloat16 or float64.

        Returns int64 [N] or [num_codebooks, N]. Not differentiable; not to be traced or called under torch.func.
        Raises TypeError or ValueError for arguments of another dtype, shape or device, and ids out of range.
        """
        indices, work = bounded_lookup_(self._bounds, ids, x, codebook)
        self._rows += indices.numel()
        self._work = LookupWork(*map(sum, zip(self._work, work, strict=True)))
        return indices
