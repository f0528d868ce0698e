"""Full-catalogue evaluation of a scorer, and whether two of them differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data import _csr
from metarec_fast.data.domain import Cases, Sequences
from metarec_fast.evaluation.metrics import Metrics
from metarec_fast.evaluation.ranks import TILE, NonFiniteScoresError, target_ranks
from metarec_fast.evaluation.scorer import Scorer, ScoreTile


def evaluate(
    scorer: Scorer, cases: Cases, *, mask_history: bool, protocol: str, batch_size: int = 1024, tile: int = TILE
) -> Metrics:
    """Rank each case's target among all items, ``batch_size`` cases and ``tile`` items at a time.

    mask_history: leave the items of a case's history out of its candidates (never the target).
    protocol: the split in words, kept beside the figures (``split.protocol``).

    Memory does not grow with the catalogue beyond what the scorer needs. The figures do not depend on batch_size or
    tile, as far as the scorer's own rounding does not.
    Warns if ties decide the figures: more than one a case, and NDCG@10 a tenth higher at their best order than at their
    worst. Raises ValueError for no cases, another catalogue, or scores that are not finite.
    """
    greater, equal = np.empty((2, len(cases)), np.int64)
    for batch in batches(scorer.num_items, cases, batch_size, mask_history=mask_history):
        with torch.no_grad():
            score_tile = scorer.prepare(batch.histories, batch.users)
        greater[batch.pick], equal[batch.pick] = _ranks(score_tile, batch, tile=tile)
    metrics = Metrics(protocol, mask_history, scorer.num_items, cases.users, greater, equal)
    low, high = metrics.bounds("ndcg@10")
    if metrics.mean_equal > 1 and high > 1.1 * low:
        warnings.warn(
            f"{metrics.mean_equal:.1f} items tie with the target on average: NDCG@10 is between {low:.4f} and "
            f"{high:.4f} depending on the order of ties; the expectation is reported",
            RuntimeWarning,
            stacklevel=2,
        )
    return metrics


class Batch(NamedTuple):
    """The cases of these numbers, ``pick``; what is seen is no candidate."""

    pick: np.ndarray
    histories: Sequences
    users: np.ndarray
    targets: Tensor
    seen: tuple[Tensor, Tensor] | None


def batches(num_items: int, cases: Cases, batch_size: int, *, mask_history: bool) -> Iterator[Batch]:
    """All cases, ``batch_size`` at a time, for a scorer of ``num_items``."""
    if len(cases) == 0:
        raise ValueError("cases must have at least one case, got none")
    if num_items != cases.histories.num_items:
        raise ValueError(f"scorer must rank the {cases.histories.num_items} items of cases, got {num_items}")
    # Neighbouring targets lie in one tile, which then gives their scores and is counted without a second look.
    order = np.argsort(cases.targets, kind="stable")
    for begin in range(0, len(cases), batch_size):
        pick = order[begin : begin + batch_size]
        histories = _take(cases.histories, pick)
        seen = (torch.from_numpy(histories.offsets), torch.from_numpy(histories.items)) if mask_history else None
        yield Batch(pick, histories, cases.users[pick], torch.from_numpy(cases.targets[pick]), seen)


def _ranks(score_tile: ScoreTile, batch: Batch, *, tile: int = TILE) -> tuple[np.ndarray, np.ndarray]:
    """`target_ranks` of a batch; scores that are not finite are laid to a user."""
    try:
        counts = target_ranks(
            score_tile, num_items=batch.histories.num_items, targets=batch.targets, seen=batch.seen, tile=tile
        )
    except NonFiniteScoresError as error:
        raise ValueError(f"user {batch.users[error.case]}: {error}") from error
    greater, equal = (count.cpu().numpy() for count in counts)
    return greater, equal


def _take(sequences: Sequences, rows: np.ndarray) -> Sequences:
    """The sequences of these rows, without their times."""
    lengths = sequences.lengths[rows]
    events = _csr.positions(sequences.offsets[rows], lengths)
    return Sequences(_csr.offsets(lengths), sequences.items[events], sequences.num_items)


class Difference(NamedTuple):
    """Mean of a - b, its 95 % bootstrap interval, and the two-sided p of a difference of zero."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, seed: int, samples: int = 10_000) -> Difference:
    """Resample the users of two evaluations of the same cases: percentile interval of the mean difference.

    a, b: values per user, [N], in the same order (``metrics.per_user("ndcg@10")``).
    p = 2 min(P(mean <= 0), P(mean >= 0)) over the samples, each count plus one so that it is never zero.
    """
    if np.shape(a) != np.shape(b) or np.ndim(a) != 1 or len(a) == 0:
        raise ValueError(f"a and b must be [N] values of the same users, got shapes {np.shape(a)} and {np.shape(b)}")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    # Most users' targets stay below any cutoff under both: how many of the others are drawn is binomial.
    N, differs = len(difference), difference[difference != 0]
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(N, len(differs) / N, size=samples)
    means = np.zeros(samples)
    step = max(1, 2**20 // max(1, len(differs)))  # samples held at a time
    for begin in range(0, samples, step):
        counts = drawn[begin : begin + step]
        some = np.flatnonzero(counts)
        if len(some):
            values = differs[rng.integers(len(differs), size=counts.sum())]
            means[begin + some] = np.add.reduceat(values, (np.cumsum(counts) - counts)[some]) / N
    low, high = np.quantile(means, (0.025, 0.975))
    p = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (samples + 1)
    return Difference(float(difference.mean()), float(low), float(high), float(min(1.0, p)))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's adjustment of several p: those below a level are together wrong with at most that probability."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result
