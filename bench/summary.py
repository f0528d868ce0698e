"""The figures of this device's results in one view: geometric means over the sizes of bench/shapes.py, and the goals.

python -m bench summary [results/<device>.csv]
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.shapes import SHAPES  # noqa: E402

NAMES = [f"{N}x{D}x{K}" for N, D, K, _ in SHAPES]


class Goal(NamedTuple):
    """Least geometric mean, and least single ratio if any, of rows by subject and the start of the baseline's name."""

    title: str
    subject: str
    baseline: str
    mean: float | None = None
    least: float | None = None


GOALS = (
    Goal("lookup against faiss", "nearest_codeword", "faiss", 2.0, 1.2),
    Goal("lookup against torch addmm + argmin", "nearest_codeword", "torch addmm"),
    *(
        Goal(f"training step, {gradient}, against {who}", f"FastVQ training step, {gradient}", baseline, mean)
        for gradient in ("rotation", "straight_through")
        for who, baseline, mean in (
            ("vector_quantize_pytorch", "vector_quantize_pytorch", 20.0),
            ("compiled plain torch", "torch.compile", 3.0),
        )
    ),
    Goal("eval forward against vector_quantize_pytorch", "FastVQ in eval mode", "vector_quantize_pytorch", 15.0),
    Goal("lookup, share of the multiply-add peak", "nearest_codeword", "multiply-add peak"),
)


def least_ratios(rows: list[dict[str, str]], goal: Goal) -> dict[str, dict[str, str]]:
    """The row of least ratio for each size: of a baseline measured in several ways, its fastest."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["subject"] == goal.subject and row["baseline"].startswith(goal.baseline) and row["shape"] in NAMES:
            known = found.get(row["shape"])
            if known is None or float(row["ratio"]) < float(known["ratio"]):
                found[row["shape"]] = row
    return found


def verdict(goal: Goal, ratios: list[float]) -> tuple[float, str]:
    """Geometric mean, and what it says about the goal."""
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    if goal.mean is None:
        return mean, ""
    wanted = f"goal {goal.mean:g}" + (f", never below {goal.least:g}" if goal.least else "")
    met = mean >= goal.mean and (goal.least is None or min(ratios) >= goal.least)
    if len(ratios) < len(NAMES):
        return mean, f"{wanted}: {len(ratios)} of {len(NAMES)} sizes measured"
    return mean, f"{wanted}: {'met' if met else 'NOT met'}"


def summary(rows: list[dict[str, str]]) -> str:
    lines = []
    for goal in GOALS:
        found = least_ratios(rows, goal)
        if not found:
            lines.append(f"{goal.title}: not measured")
            continue
        mean, words = verdict(goal, [float(row["ratio"]) for row in found.values()])
        lines.append(f"{goal.title}: geometric mean {mean:.3g} {words}".rstrip())
        for shape in NAMES:
            if row := found.get(shape):
                spread = f"{float(row['ratio']):.3g} ({float(row['p5']):.3g} to {float(row['p95']):.3g})"
                times = f"{row['fast_ms']} ms, {row['baseline_ms']} ms"
                where = f"{row['baseline']}; {row['isa']}, {row['threads']} threads, {row['commit']}"
                lines.append(f"    {shape:<16} {spread:<26} {times:<24} {where}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, help="results/<device>.csv; this device's by default")
    path = parser.parse_args().file
    if path is None:
        from bench.machine import RESULTS, device_name, slug

        path = RESULTS / f"{slug(device_name('cpu'))}.csv"
    if not path.exists():
        print(f"{path} does not exist: run `make bench` first, or name a file of bench/results", file=sys.stderr)
        return 2
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print(f"{rows[0]['device'] if rows else path.name}\n{summary(rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
