"""Ranks by counting, tie-aware metrics, baselines, and the protocols by name."""

from metarec_fast.evaluation.baselines import Popularity, Transitions, baselines, best_baseline, item_neighbours
from metarec_fast.evaluation.catalogue import choice_catalogue, inside
from metarec_fast.evaluation.evaluate import (
    Difference,
    evaluate,
    holm,
    paired_bootstrap,
)
from metarec_fast.evaluation.metrics import Metrics, expected_metric
from metarec_fast.evaluation.ranks import NonFiniteScoresError, target_ranks
from metarec_fast.evaluation.scorer import LinearScorer, Scorer, ScoreTile
from metarec_fast.evaluation.top_k import top_k_items
from metarec_fast.evaluation.verdict import no_verdict

__all__ = [
    "Difference",
    "LinearScorer",
    "Metrics",
    "NonFiniteScoresError",
    "Popularity",
    "ScoreTile",
    "Scorer",
    "Transitions",
    "baselines",
    "best_baseline",
    "choice_catalogue",
    "evaluate",
    "expected_metric",
    "holm",
    "inside",
    "item_neighbours",
    "no_verdict",
    "paired_bootstrap",
    "target_ranks",
    "top_k_items",
]
