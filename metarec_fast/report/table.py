"""The results table of a run: the same rows for people, README and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metarec_fast.evaluation import Metrics
from metarec_fast.text import markdown as markdown_text

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
    """A Markdown table with the protocol under it; the last column is among all items, where those were ranked too."""
    if not rows:
        return ""
    all_items = any(row.metrics.among_all is not None for row in rows)
    heads = [*columns, *(("NDCG@10, all items",) if all_items else ())]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for row in rows:
        cells = [f"{values(row.metrics)[c]:.4f}" for c in columns]
        if all_items:
            cells.append(f"{(row.metrics.among_all or row.metrics).ndcg[10]:.4f}")
        lines.append(
            f"| {markdown_text(row.method)}{'' if row.trained else ' (untrained)'} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, "", rows[0].metrics.protocol])
