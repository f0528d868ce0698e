"""Full-catalogue evaluation of a scorer, and whether two of them differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarec_fast.checks import POSITIVE_COUNT, SEED, check_count, check_flag
from metarec_fast.data.domain import Cases, Sequences
from metarec_fast.evaluation.catalogue import Candidates
from metarec_fast.evaluation.metrics import OUTSIDE, Metrics
from metarec_fast.evaluation.ranks import TILE, NonFiniteScoresError, target_ranks
from metarec_fast.evaluation.scorer import Scorer, ScoreTile


def evaluate(
    scorer: Scorer,
    cases: Cases,
    *,
    mask_history: bool,
    protocol: str,
    catalogue: np.ndarray | None = None,
    among_all: bool = False,
    batch_size: int = 1024,
    tile: int = TILE,
) -> Metrics:
    """Rank each case's target among all items or a catalogue's, ``batch_size`` cases and ``tile`` items at a time.

    mask_history: leave the items of a case's history out of its candidates (never the target).
    protocol: the split in words, kept beside the figures (``split.protocol``).
    catalogue: bool [V], the items to rank (``split.candidates``), by default all. A target outside is a miss; histories
        are read whole.
    among_all: beside a catalogue, rank all items too; scorers prepare once for both.

    Memory does not grow with the catalogue beyond what the scorer needs. The figures do not depend on batch_size or
    tile, as far as the scorer's own rounding does not.
    Warns if ties decide the figures: more than one a case, and NDCG@10 a tenth higher at their best order than at their
    worst. Raises ValueError for no cases, another catalogue, or scores that are not finite.
    """
    check_flag(mask_history, "mask_history")
    check_count(batch_size, "batch_size", POSITIVE_COUNT)
    check_count(tile, "tile", POSITIVE_COUNT)
    candidates = None if catalogue is None else Candidates(catalogue, scorer.num_items)
    chosen, whole = np.empty((2, 2, len(cases)), np.int64)
    for batch in batches(scorer.num_items, cases, batch_size, mask_history=mask_history):
        with torch.no_grad():
            score_tile = scorer.prepare(batch.histories, batch.users)
        if candidates is None or candidates.whole or among_all:
            whole[:, batch.pick] = _ranks(score_tile, batch, tile=tile)
        if candidates is not None and not candidates.whole:
            chosen[:, batch.pick] = _ranks_among(candidates, score_tile, batch, tile=tile)
    given = (protocol, mask_history, scorer.num_items, cases.users)
    if candidates is None:
        metrics = Metrics(*given, *whole)
    else:
        beside = Metrics(*given, *whole) if among_all else None
        counts = whole if candidates.whole else chosen
        metrics = Metrics(*given, *counts, num_ranked=len(candidates), among_all=beside)
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
        histories = cases.histories.take(pick)
        seen = (torch.from_numpy(histories.offsets), torch.from_numpy(histories.items)) if mask_history else None
        yield Batch(pick, histories, cases.users[pick], torch.from_numpy(cases.targets[pick]), seen)


def _ranks(
    score_tile: ScoreTile, batch: Batch, *, tile: int = TILE, candidates: Candidates | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`target_ranks` of a batch; scores that are not finite are laid to a user, and to an item by its own number."""
    num_items = batch.histories.num_items if candidates is None else len(candidates)
    try:
        counts = target_ranks(score_tile, num_items=num_items, targets=batch.targets, seen=batch.seen, tile=tile)
    except NonFiniteScoresError as error:
        if candidates is not None:
            error = error.of_item(int(candidates.items[error.item]))
        raise ValueError(f"user {batch.users[error.case]}: {error}") from error
    greater, equal = (count.cpu().numpy() for count in counts)
    return greater, equal


def _ranks_among(
    candidates: Candidates, score_tile: ScoreTile, batch: Batch, *, tile: int
) -> tuple[np.ndarray, np.ndarray]:
    """`_ranks` among the candidates; OUTSIDE for a target that is none of them."""
    targets = candidates.places(batch.targets)
    seen = None if batch.seen is None else candidates.seen(*batch.seen)
    inner = batch._replace(targets=targets.clamp_min(0), seen=seen)
    greater, equal = _ranks(candidates.scores(score_tile), inner, tile=tile, candidates=candidates)
    missed = (targets < 0).numpy()
    return np.where(missed, OUTSIDE, greater), np.where(missed, 0, equal)


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
    check_count(seed, "seed", SEED)
    check_count(samples, "samples", POSITIVE_COUNT)
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
