"""The results table of a run: the same rows for people, README and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metarec_fast.evaluation import Metrics

COLUMNS = ("Recall@5", "Recall@10", "Recall@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")


@dataclass(frozen=True)
class Row:
    """One method's figures. trained: False for a baseline that has no parameters to learn."""

    method: str
    metrics: Metrics
    trained: bool = True
    seconds: float | None = None


def values(metrics: Metrics) -> dict[str, float]:
    """Metrics by the names of COLUMNS."""
    named = {f"Recall@{k}": v for k, v in metrics.recall.items()} | {f"NDCG@{k}": v for k, v in metrics.ndcg.items()}
    return {**named, "MRR": metrics.mrr}


def markdown(rows: Sequence[Row], *, columns: Sequence[str] = ("Recall@10", "NDCG@10", "MRR")) -> str:
    """A Markdown table with the protocol under it."""
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for row in rows:
        cells = [f"{values(row.metrics)[c]:.4f}" for c in columns]
        lines.append(f"| {row.method}{'' if row.trained else ' (untrained)'} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", rows[0].metrics.protocol]) if rows else ""
