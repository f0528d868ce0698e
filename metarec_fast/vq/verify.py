"""Proof in float64 that indices name the nearest codes, at a small part of the definition's cost.

Per head, with m a vector near the codes, X = x - m, C = c - m (float64, each element rounded once), R >= ||X|| and
u = 2^-53, the scores s_k = ||C_k||^2 - 2 <X, C_k> order the codes as the distances do. A product of matrices in
float64, in any order of summation, gives every score within (D + 4) u (||C_k||^2 + 2 R ||C_k||) of its real value; the
definition's own sum is within (D + 3) u (R + ||C_k||)^2 of the real distance. So with

    E_k = 2 (D + 4) u (R + ||C_k||)^2 (1 + 2^-6) + what may underflow

a code with s_k - E_k > min_j (s_j + E_j) is farther than another by the definition as well. The slack 2^-6 holds the
second-order terms and the roundings of R, ||C_k|| and E_k for D < 2^40. What is left, nearly always one code a row, is
compared by the definition's own sum. Rows whose squares might overflow are left to that sum entirely.

For the largest product nothing is centred: s_k = -<x, c_k>, and a product of matrices and the definition's sum are each
within D u ||x|| ||c_k|| of the real value, so that E_k = 2 (D + 4) u ||x|| ||c_k|| (1 + 2^-6) + what may underflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast.ops.codebook_checks import Metric, add_head, check_metric, check_pair
from metarec_fast.ops.exact_costs import exact_costs
from metarec_fast.ops.register import check_is_tensor, check_tensor

_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
)
CHUNK_ELEMENTS = 1 << 18  # scores in memory at a time, and elements of the pairs that are compared by the definition
_LARGEST_NORM = 1e140  # squares of sums below this do not overflow


class Verification(NamedTuple):
    """Result of `verify`. True in a condition if every index is right, as is ``ok``.

    checked: number of rows, over all heads. wrong: number of those whose index is not the definition's.
    rows: int64 [wrong], or [wrong, d] of places in ``indices`` if it has d > 1 dimensions, ascending.
    expected: int64 [wrong], the right indices.
    excess: float64 [wrong], how much larger the squared distance to the given code is, or how much smaller its product:
        0 at a tie that should have gone to a lower index, infinite for an index out of range or a code that is not
        finite.
    """

    checked: int
    wrong: int
    rows: Tensor
    expected: Tensor
    excess: Tensor

    @property
    def ok(self) -> bool:
        return self.wrong == 0

    def __bool__(self) -> bool:
        return self.ok


@torch.no_grad()
def verify(x: Tensor, codebook: Tensor, indices: Tensor, *, metric: Metric = "distance") -> Verification:
    """Whether ``indices`` are the lowest k of least real-valued ||x - c_k||^2, with float64 as the referee near ties.

    x: [..., D], float32, float16, bfloat16 or float64: the values that were quantized (for cosine similarity the
        normalized rows). codebook: [K, D], or [H, K, D] for x [H, N, D]; K >= 1. indices: integers [...].
    metric: "product" for the largest real-valued <x, c_k>, as FastVQ has it with use_cosine_sim.

    Returns a `Verification`, true if no index is wrong; wrong are those that ``reference.nearest_codeword`` does not
    give. Memory: a chunk of the scores, and float64 copies of the codebook. An index outside [0, K) is wrong.
    Raises TypeError or ValueError for arguments of another dtype, shape or device, and for an unknown ``metric``.
    """
    check_is_tensor(x, "x")
    check_is_tensor(codebook, "codebook")
    check_is_tensor(indices, "indices")
    if codebook.dim() == 2 and x.dim() > 2:
        result = verify(x.flatten(0, -2), codebook, _matching(indices, x).flatten(), metric=metric)
        return result._replace(rows=torch.stack(torch.unravel_index(result.rows, x.shape[:-1]), -1))
    check_pair(x, codebook)
    check_metric(metric)
    indices = _matching(indices, x)
    given_HN = indices if x.dim() == 3 else indices[None]
    of_heads = [_verify_head(*head, metric) for head in zip(add_head(x), add_head(codebook), given_HN, strict=True)]
    rows, expected, excess = _concatenate(of_heads, x.device)
    if x.dim() == 3:
        wrong = torch.tensor([len(rows) for rows, _, _ in of_heads], dtype=torch.int64, device=x.device)
        rows = torch.stack((torch.arange(len(of_heads), device=x.device).repeat_interleave(wrong), rows), -1)
    return Verification(indices.numel(), len(rows), rows, expected, excess)


def _matching(indices: Tensor, x: Tensor) -> Tensor:
    """``indices`` as int64, checked to be one for each row of ``x``."""
    check_tensor(indices, "indices", dtypes=_INTEGERS, dims=x.dim() - 1, device=x.device)
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must be {list(x.shape[:-1])} to match x, got {tuple(indices.shape)}")
    return indices.long()


def _concatenate(outcomes: list[tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    none = torch.empty(0, dtype=torch.int64, device=device)
    return tuple(torch.cat(parts) for parts in zip((none, none, none.double()), *outcomes, strict=True))


def _verify_head(x_ND: Tensor, codebook_KD: Tensor, given_N: Tensor, metric: Metric) -> tuple[Tensor, ...]:
    """Rows of wrong indices, the right ones, and the excess costs."""
    candidates = _Candidates(codebook_KD.double(), metric)
    outcomes = []
    rows = max(1, CHUNK_ELEMENTS // max(len(candidates.code), x_ND.shape[1]))
    for first in range(0, len(x_ND), rows):
        x_nD, given_n = x_ND[first : first + rows].double(), given_N[first : first + rows]
        expected_n = candidates.nearest(x_nD)
        wrong = (given_n != expected_n).nonzero()[:, 0]
        if len(wrong):
            excess = _excess(x_nD[wrong], candidates.codebook, given_n[wrong], expected_n[wrong], metric)
            outcomes.append((first + wrong, expected_n[wrong], excess))
    return _concatenate(outcomes, x_ND.device)


def _excess(x_nD: Tensor, codebook: Tensor, given_n: Tensor, expected_n: Tensor, metric: Metric) -> Tensor:
    inside = (given_n >= 0) & (given_n < len(codebook))
    given, least = (_pair_costs(x_nD, codebook[k], metric) for k in (torch.where(inside, given_n, 0), expected_n))
    excess = torch.where(given == least, 0.0, given - least)  # both may be infinite
    return torch.where(inside, excess, float("inf"))


def _pair_costs(x_PD: Tensor, code_PD: Tensor, metric: Metric) -> Tensor:
    """The definition's cost for each pair, [P]."""
    # transposed, as the definition reads an element of every pair at a time
    x_PD, code_PD = x_PD.T.contiguous().T, code_PD.T.contiguous().T
    return exact_costs(x_PD[:, None], code_PD[:, None], metric).view(-1)


def _first_of_equal(codebook_KD: Tensor, code: Tensor) -> Tensor:
    """``code``, ascending indices, without those whose codes equal one before.

    Equal codes have equal keys. Others may have equal keys too, which at worst leaves a duplicate in.
    """
    weight_D = torch.arange(1, codebook_KD.shape[1] + 1, device=code.device).sqrt()
    codes = codebook_KD[code]
    order = (codes * weight_D).sum(1).argsort(stable=True)
    codes = codes[order]
    first = torch.ones_like(code, dtype=torch.bool)
    first[1:] = (codes[1:] != codes[:-1]).any(1)
    return code[order[first]].sort().values


class _Candidates:
    """One head's codes that can be nearest: finite, and the lowest index of those that are equal."""

    def __init__(self, codebook_KD: Tensor, metric: Metric) -> None:
        D = codebook_KD.shape[1]
        self.codebook, self.metric = codebook_KD, metric
        self.code = _first_of_equal(codebook_KD, codebook_KD.isfinite().all(1).nonzero()[:, 0])  # ascending
        codes = codebook_KD[self.code]
        # Any vector near the codes will do; the median of some does not follow a far code as a mean would.
        some = codes[:: max(1, len(codes) // 64)]
        centred = len(codes) and metric == "distance"
        self.centre = some.median(0).values if centred else codebook_KD.new_zeros(D)
        self.centred = codes - self.centre
        self.square = self.centred.square().sum(1)
        self.norm = self.square.sqrt()
        self.most = self.norm.amax() if len(codes) else codebook_KD.new_zeros(())
        self.unit = 2 * (D + 4) * 2.0**-53 * (1 + 2.0**-6)
        self.underflow = (D + 4) * 2.0**-1060

    def nearest(self, x_nD: Tensor) -> Tensor:
        """The definition's index of each row, int64 [n]."""
        if len(self.code) == 0:
            return torch.zeros(len(x_nD), dtype=torch.int64, device=x_nD.device)
        centred = x_nD - self.centre
        radius_n = centred.square().sum(1).sqrt()
        if self.metric == "product":
            score_nk = -(centred @ self.centred.T)
        else:
            score_nk = torch.addmm(self.square, centred, self.centred.T, alpha=-2)
        least_n, candidate_n = score_nk.min(1)
        reach_n = radius_n + self.most
        bound_n = least_n + 2 * self._error(radius_n, self.most)
        proven_n = ((score_nk <= bound_n[:, None]).sum(1) == 1) & (reach_n < _LARGEST_NORM)
        index_n = self.code[candidate_n]
        undecided = (~proven_n).nonzero()[:, 0]
        if len(undecided):
            possible = self._possible(score_nk[undecided], radius_n[undecided])
            # The only possible code has the least score; but if its distance is infinite, the index is 0.
            several = (possible.sum(1) > 1) | ~(reach_n[undecided] < _LARGEST_NORM)
            undecided = undecided[several]
            index_n[undecided] = self._refine(x_nD, undecided, possible[several])
        return index_n

    def _error(self, radius: Tensor, norm: Tensor) -> Tensor:
        """E of rows within ``radius`` and codes within ``norm``."""
        size = radius * norm if self.metric == "product" else (radius + norm).square()
        return size.mul_(self.unit).add_(self.underflow)

    def _possible(self, score_nk: Tensor, radius_n: Tensor) -> Tensor:
        """Which codes can be nearest, by each code's own bound: bool [n, k]."""
        error_nk = self._error(radius_n[:, None], self.norm)
        bound_n = (score_nk + error_nk).amin(1)
        # so that NaN is possible too
        return ~(score_nk - error_nk > bound_n[:, None]) | ~(radius_n + self.most < _LARGEST_NORM)[:, None]

    def _refine(self, x_nD: Tensor, rows: Tensor, possible_rk: Tensor) -> Tensor:
        """The first of the least sums among the possible codes of each row."""
        least = x_nD.new_full((len(rows),), float("inf"))
        index = torch.full((len(rows),), len(self.codebook), device=rows.device)
        for row_P, code_P, cost_P in self._costs(x_nD, rows, possible_rk):
            before = least.clone()
            least.scatter_reduce_(0, row_P, cost_P, "amin")
            index[least < before] = len(self.codebook)
            nearest = cost_P == least[row_P]
            index.scatter_reduce_(0, row_P[nearest], code_P[nearest], "amin")
        return torch.where(least.isinf(), 0, index)  # every code is infinitely far, also those that are not candidates

    def _costs(self, x_nD: Tensor, rows: Tensor, possible_rk: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row, code, cost) of the possible pairs, a chunk at a time."""
        row, candidate = possible_rk.nonzero().unbind(1)
        pairs = max(1, CHUNK_ELEMENTS // x_nD.shape[1])
        for row_P, candidate_P in zip(row.split(pairs), candidate.split(pairs), strict=True):
            code_P = self.code[candidate_P]
            yield row_P, code_P, _pair_costs(x_nD[rows[row_P]], self.codebook[code_P], self.metric)
