"""Ranks by counting, tie-aware metrics, floors, and the protocols by name."""

from metarec_fast.evaluation.best import best_items
from metarec_fast.evaluation.catalogue import choice_catalogue, inside
from metarec_fast.evaluation.evaluate import (
    Difference,
    evaluate,
    holm,
    paired_bootstrap,
)
from metarec_fast.evaluation.floors import Popularity, Transitions, best_floor, floors, item_neighbours
from metarec_fast.evaluation.metrics import Metrics, expected_metric
from metarec_fast.evaluation.mixture import FittedMixture, fit_mixture
from metarec_fast.evaluation.ranks import NonFiniteScoresError, target_ranks
from metarec_fast.evaluation.scorer import LinearScorer, MixtureScorer, Scorer, ScoreTile
from metarec_fast.evaluation.verdict import no_verdict

__all__ = [
    "Difference",
    "FittedMixture",
    "LinearScorer",
    "Metrics",
    "MixtureScorer",
    "NonFiniteScoresError",
    "Popularity",
    "ScoreTile",
    "Scorer",
    "Transitions",
    "best_floor",
    "best_items",
    "choice_catalogue",
    "evaluate",
    "expected_metric",
    "fit_mixture",
    "floors",
    "holm",
    "inside",
    "item_neighbours",
    "no_verdict",
    "paired_bootstrap",
    "target_ranks",
]
