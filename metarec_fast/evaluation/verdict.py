"""When no verdict can be given on a difference, whatever its p: few cases make it, or the order of ties does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metarec_fast.evaluation.evaluate import Difference
from metarec_fast.evaluation.metrics import expected_metric

FEWEST = 10  # cases that a difference must rest on: with fewer, resampling them says nothing of others
Ranks = tuple[np.ndarray, np.ndarray]


def no_verdict(
    a: Sequence[Ranks], b: Sequence[Ranks], difference: Difference, *, metric: str = "ndcg@10"
) -> str | None:
    """Why nothing can be said of the difference of two models, in words; None if its interval and p say it.

    a, b: greater and equal [N] of the same cases, once for each seed. difference: of the values averaged over seeds.
    There is no verdict if

    - fewer than FEWEST cases are expected to have their target within the cutoff under either model,
    - fewer than FEWEST cases make the difference: (sum of |d|)**2 / sum of d**2, for the differences d of the cases,
    - or with all ties broken for one model or all for the other the difference has either sign, and this range is more
      than half as wide as the interval over cases.

    Models that differ in no case are equal, which is a verdict.
    """
    cutoff = metric.partition("@")[2] or "10"
    (of_a, of_b), N = (_mean(ranks, metric) for ranks in (a, b)), len(a[0][0])
    d = of_a - of_b
    hits = float(np.maximum(*(_mean(ranks, f"recall@{cutoff}") for ranks in (a, b))).sum())
    if hits < FEWEST:
        return f"{hits:.1f} of {N:,} targets are expected among the first {cutoff} of either model, fewer than {FEWEST}"
    low, high = (
        float((_mean(for_a, metric) - _mean(for_b, metric)).mean())
        for for_a, for_b in ((_worst(a), _best(b)), (_best(a), _worst(b)))
    )
    if low <= 0 <= high and high - low > (difference.high - difference.low) / 2 and high > low:
        return f"the order of ties alone moves the difference in {metric} from {low:+.4f} to {high:+.4f}"
    if d.any() and (made := float(np.abs(d).sum() ** 2 / (d**2).sum())) < FEWEST:
        return f"{made:.1f} of {N:,} cases make the difference, fewer than {FEWEST}"
    return None


def _mean(ranks: Sequence[Ranks], metric: str) -> np.ndarray:
    return np.mean([expected_metric(metric, greater, equal) for greater, equal in ranks], axis=0)


def _best(ranks: Sequence[Ranks]) -> list[Ranks]:
    return [(greater, np.zeros_like(equal)) for greater, equal in ranks]


def _worst(ranks: Sequence[Ranks]) -> list[Ranks]:
    # equal is 0 where greater stands for a target outside the catalogue
    return [(np.asarray(greater, np.int64) + equal, np.zeros_like(equal)) for greater, equal in ranks]
