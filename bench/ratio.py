"""How much faster: interleaved timing of two callables, and the one file a device's results are kept in."""

from __future__ import annotations

import csv
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

KEY = ("subject", "provider", "baseline", "threads", "dtype", "shape")
COLUMNS = (*KEY, "ratio", "p5", "p95", "rounds", "fast_ms", "baseline_ms", "device", "isa", "versions", "commit")


class Ratio(NamedTuple):
    """Time of the baseline over time of the fast one: median over the rounds and its 5 to 95 % range."""

    ratio: float
    p5: float
    p95: float
    fast_ms: float
    baseline_ms: float


def interleaved(
    fast: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
    shortest_s: float = 0.005,
) -> Ratio:
    """Run both in random order every round, after both have run once, and compare within rounds.

    What disturbs the machine disturbs both halves of a round: of two equal functions the interleaved ratio stays within
    2 % where medians of one after the other differ by 9 %. Calls shorter than ``shortest_s`` are timed several at once.
    """
    order = random.Random(0)

    def seconds(run: Callable[[], Any], calls: int) -> float:
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - begin) / calls

    pair = (fast, baseline)
    for run in pair:
        run()
    calls = [max(1, math.ceil(shortest_s / seconds(run, 1))) for run in pair]
    times = np.empty((rounds, 2))
    for row in times:
        for which in order.sample((0, 1), 2):
            row[which] = seconds(pair[which], calls[which])
    ratios = times[:, 1] / times[:, 0]
    fast_ms, baseline_ms = 1e3 * np.median(times, axis=0)
    return Ratio(float(np.median(ratios)), *np.quantile(ratios, (0.05, 0.95)).tolist(), fast_ms, baseline_ms)


def write_row(path: Path, row: dict[str, Any]) -> None:
    """Put ``row`` in the file, in place of the one that measured the same (equal in KEY), ordered by KEY."""
    row = {name: str(row[name]) for name in COLUMNS}
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [old for old in csv.DictReader(file) if any(old[name] != row[name] for name in KEY)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, row], key=lambda r: [r[name] for name in KEY]))
