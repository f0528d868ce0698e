"""Metrics of one target per case, from ranks: exact expectations over a random order of tied items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metarec_fast.data.domain import Catalogue

CUTOFFS = (5, 10, 20)
NAMES = (*(f"recall@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr")
OUTSIDE = 2**31 - 1  # in place of the items above a target that is outside the catalogue: a miss by every metric


def expected_metric(name: str, greater: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """The metric of each case, its target equally likely at any of the ranks ``greater`` + 1 to + ``equal`` + 1.

    name: "recall@K" (with one target the same as the hit rate), "ndcg@K" or "mrr". greater, equal: [N] counts;
    greater is OUTSIDE for a target that is no candidate, whose metric is 0.
    Returns float64 [N]. NDCG agrees with the tie-averaged `sklearn.metrics.ndcg_score` (McSherry & Najork, 2008).
    """
    kind, _, cutoff = name.partition("@")
    if kind not in ("recall", "ndcg", "mrr") or (cutoff == "") != (kind == "mrr") or not (cutoff or "1").isdecimal():
        raise ValueError(f"name must be recall@K, ndcg@K or mrr, got {name!r}")
    best, worst = np.asarray(greater, np.int64), np.asarray(greater, np.int64) + np.asarray(equal, np.int64) + 1
    if kind == "mrr":
        # sum of 1 / r over the ranks, as a difference of harmonic numbers
        gain = torch.digamma(torch.from_numpy(np.stack((best, worst)).astype(np.float64)) + 1).numpy()
        expected = np.where(worst == best + 1, 1 / worst, (gain[1] - gain[0]) / (worst - best))
        return np.where(best == OUTSIDE, 0, expected)
    k = int(cutoff)
    gain = np.ones(k) if kind == "recall" else 1 / np.log2(np.arange(2, k + 2))
    until = np.concatenate(([0.0], np.cumsum(gain)))  # summed gain of ranks 1 to r
    return (until[np.minimum(worst, k)] - until[np.minimum(best, k)]) / (worst - best)


@dataclass(frozen=True, eq=False)
class Metrics:
    """The outcome of an evaluation: two counts per case, from which every figure follows.

    split: in words. users, greater, equal: int64 [N], in the order of the cases; greater is OUTSIDE where the target is
    outside the catalogue. num_items: of the domain. num_ranked: of the catalogue, all items by default.
    among_all: the same cases ranked among all items, where both were asked for.
    """

    split: str
    history_masked: bool
    num_items: int
    users: np.ndarray
    greater: np.ndarray
    equal: np.ndarray
    num_ranked: int | None = None
    among_all: Metrics | None = None

    def __post_init__(self) -> None:
        if not len(self.users) == len(self.greater) == len(self.equal) > 0:
            raise ValueError(
                f"users, greater and equal must have one entry per case and at least one, got "
                f"{len(self.users)}, {len(self.greater)} and {len(self.equal)}"
            )

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, name: str) -> float:
        """Mean over the cases, in float64: ``metrics["ndcg@10"]``, any cutoff."""
        return float(self.per_user(name).mean())

    @property
    def recall(self) -> dict[int, float]:
        """Mean Recall@K by K; with one target a case the same as the hit rate."""
        return {k: self[f"recall@{k}"] for k in CUTOFFS}

    @property
    def ndcg(self) -> dict[int, float]:
        return {k: self[f"ndcg@{k}"] for k in CUTOFFS}

    @property
    def mrr(self) -> float:
        return self["mrr"]

    def per_user(self, name: str) -> np.ndarray:
        """Values of the cases, float64 [N]: what a bootstrap resamples."""
        return expected_metric(name, self.greater, self.equal)

    def bounds(self, name: str) -> tuple[float, float]:
        """The mean if every tie were broken against the target, and if every tie were broken for it."""
        none = np.zeros_like(self.equal)
        low, high = (expected_metric(name, g, none).mean() for g in (self.greater + self.equal, self.greater))
        return float(low), float(high)

    @property
    def tie_rate(self) -> float:
        """Share of cases in which another candidate scores exactly as the target."""
        return float((self.equal > 0).mean())

    @property
    def mean_equal(self) -> float:
        return float(self.equal.mean())

    @property
    def catalogue(self) -> Catalogue:
        """What was ranked: the items of training events, or all."""
        return "all" if self.num_ranked is None else "training"

    @property
    def outside(self) -> int:
        """Targets outside the catalogue: answers that could not be given, each a miss."""
        return int((self.greater == OUTSIDE).sum())

    @property
    def protocol(self) -> str:
        """In one line, to stand beside the figures."""
        history = "history masked" if self.history_masked else "history not masked"
        ranked = f"all {self.num_items:,} items ranked"
        if self.num_ranked is not None:
            outside = f"{self.outside:,} targets outside the catalogue count as misses"
            if self.outside == 1:
                outside = "1 target outside the catalogue counts as a miss"
            ranked = f"the {self.num_ranked:,} items of training events ranked (of {self.num_items:,} known), {outside}"
        return f"{self.split}; {ranked}, {history}; {len(self):,} cases"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: protocol, means and tie statistics, without the values of users."""
        return {
            "protocol": self.protocol,
            "split": self.split,
            "history_masked": self.history_masked,
            "num_items": self.num_items,
            "catalogue": self.catalogue,
            "items_ranked": self.num_items if self.num_ranked is None else self.num_ranked,
            "targets_outside": self.outside,
            "cases": len(self),
            "tie_rate": self.tie_rate,
            "mean_equal": self.mean_equal,
            "metrics": {name: self[name] for name in NAMES},
            "bounds": {name: self.bounds(name) for name in NAMES},
            **({} if self.among_all is None else {"among_all": self.among_all.to_dict()}),
        }

    @staticmethod
    def table_header() -> str:
        """The head of a Markdown table of `table_row`."""
        names = [name.replace("recall", "Recall").replace("ndcg", "NDCG").replace("mrr", "MRR") for name in NAMES]
        return f"| | {' | '.join(names)} | ties |\n|---|{'--:|' * (len(names) + 1)}"

    def table_row(self, label: str) -> str:
        """One row of a Markdown table: the means, then the share of cases with a tie."""
        return f"| {label} | {' | '.join(f'{self[name]:.4f}' for name in NAMES)} | {self.tie_rate:.1%} |"

    def __str__(self) -> str:
        text = "  ".join(f"{name} {self[name]:.4f}" for name in NAMES) + f"\n({self.protocol})"
        return text if self.among_all is None else f"{text}\namong all items:\n{self.among_all}"
