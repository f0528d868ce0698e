"""What an outer step costs as it grows: more sources, larger catalogues, longer sequences, larger batches.

    python -m bench scaling [--quick] [--rounds 5] [--order 1] [--threads 2]

One axis grows while the others stay at 4 sources, 12,000 items in every domain, the last 50 events and batches of 128
windows. Domains are random; users have about as many events as the axis asks for (of length 50: about nine, as in
5-core Amazon data; a longer limit also gives longer sequences, so that the positions of a batch grow with it). Each
size is a process of its own, so that its peak of memory is its own; the rounds go through an axis's sizes again and
again, and the fitted exponent is of the medians over the upper half of the sizes, where the fixed cost no longer hides
it. Memory is what the resident size rises by during a step, from the kernel's high-water mark (Linux).

Writes results/scaling-<device>.csv and docs/scaling.svg.
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

FIXED = {"sources": 4, "items": 12_000, "length": 50, "batch": 128}
AXES = {
    "sources": (1, 2, 4, 6, 8),
    "items": (1_000, 3_000, 12_000, 50_000, 200_000, 1_000_000),
    "length": (20, 50, 100, 200, 500, 1_000),
    "batch": (64, 128, 256, 512, 1_024, 2_048),
}
QUICK = {
    "sources": (1, 4, 8),
    "items": (1_000, 12_000, 100_000),
    "length": (20, 100, 400),
    "batch": (64, 256, 1_024),
}
WORDS = {
    "sources": "source domains",
    "items": "items in each catalogue",
    "length": "longest window, positions",
    "batch": "windows in a batch",
}
COLUMNS = ("axis", "value", "positions", "ms", "p5", "p95", "rounds", "extra_mib", "exponent", "memory_exponent")
ENVIRONMENT = ("order", "threads", "device", "versions", "commit")


def mean_length(length: int) -> float:
    """Events of a user: nine for windows of up to 50, and as much longer as the window."""
    return 9 * length / 50


class Step:
    """One outer step of a size, ready to be taken again and again."""

    def __init__(self, *, sources: int, items: int, length: int, batch: int, order: int) -> None:
        import torch

        from bench.bench_meta import sequences
        from metarec_fast.config import MetaConfig, ModelConfig
        from metarec_fast.meta import Source, outer_step
        from metarec_fast.models.recommender import Recommender
        from metarec_fast.sampling.sampler import Sampler

        torch.manual_seed(0)
        names = [f"source{i}" for i in range(sources)] + ["target"]
        model = Recommender(ModelConfig(dropout=0.0, max_length=length), dict.fromkeys(names, items))
        model.init_codebook(names, seed=0)
        users = 2 * batch
        # never below five events, as 5-core data has it
        events = round(users * max(mean_length(length), 5.5))
        batches = {
            name: Sampler(sequences(users, items, events, seed=i), batch_size=batch, max_length=length).batch(0)
            for i, name in enumerate(names)
        }
        self.positions = sum(len(b.items) for b in batches.values())
        shared, config = model.shared_parameters(), MetaConfig(order=order)

        def run() -> Any:
            return outer_step(
                model.loss,
                shared,
                [Source(name, model.private_parameters(name), [batches[name]]) for name in names[:-1]],
                model.private_parameters("target"),
                batches["target"],
                config=config,
            )

        self.run = run


def worker(size: dict[str, int], order: int) -> None:
    """Take a step when reported to by a line, and tell its milliseconds, or its extra memory for the line "memory"."""
    from bench.memory import MIB, peak_rise

    step = Step(**size, order=order)
    step.run()
    print(json.dumps(step.positions), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps(peak_rise(step.run) / MIB), flush=True)
            continue
        begin = time.perf_counter()
        step.run()
        print(json.dumps(1e3 * (time.perf_counter() - begin)), flush=True)


class Process:
    """A worker in a process of its own. Raises RuntimeError if it dies."""

    def __init__(self, size: dict[str, int], order: int) -> None:
        # freed blocks go back at once, so that none hides in the next step's peak
        about = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--worker", json.dumps(size), "--order", str(order)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=about, cwd=ROOT
        )
        self.positions = self._read()

    def _read(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}")
        return json.loads(line)

    def ask(self, what: str) -> float:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of log cost over log size, by least squares over the upper half of the sizes."""
    upper = len(sizes) // 2
    x, y = np.log(sizes[upper:]), np.log(np.maximum(costs[upper:], 1e-9))
    return float(np.polyfit(x, y, 1)[0])


def measure(axis: str, values: tuple[int, ...], *, rounds: int, order: int) -> list[dict[str, Any]]:
    """Rows of one axis. The sizes take turns, so that what disturbs the machine disturbs all."""
    processes = [Process(FIXED | {axis: value}, order) for value in values]
    try:
        memory = [process.ask("memory") for process in processes]
        times = np.array([[process.ask("time") for process in processes] for _ in range(rounds)])
    finally:
        for process in processes:
            process.close()
    ms, (p5, p95) = np.median(times, 0), np.quantile(times, (0.05, 0.95), 0)
    slopes = {"exponent": exponent(values, ms), "memory_exponent": exponent(values, memory)}
    rows = []
    for i, value in enumerate(values):
        row = {"axis": axis, "value": value, "positions": processes[i].positions, "rounds": rounds}
        rows.append(row | {"ms": ms[i], "p5": p5[i], "p95": p95[i], "extra_mib": memory[i]} | slopes)
        print(f"{axis} {value}: {ms[i]:.1f} ms ({p5[i]:.1f} to {p95[i]:.1f}), {memory[i]:.1f} MiB", flush=True)
    print(f"{axis}: time grows as {axis}^{slopes['exponent']:.2f}, memory ^{slopes['memory_exponent']:.2f}", flush=True)
    return rows


def svg(rows: list[dict[str, Any]], caption: str) -> str:
    """One panel an axis, both scales logarithmic: time with its range in blue, memory in grey, a line of slope one."""
    width, height, left, top = 300, 210, 58, 40
    by_axis = defaultdict(list)
    for row in rows:
        by_axis[row["axis"]].append(row)
    body = []
    for panel, (axis, points) in enumerate(by_axis.items()):
        x0, y0 = left + (panel % 2) * (width + 110), top + (panel // 2) * (height + 90)
        xs = [math.log10(p["value"]) for p in points]
        series = {"time": [(p["ms"], p["p5"], p["p95"]) for p in points]}
        series["memory"] = [(max(p["extra_mib"], 0.1),) * 3 for p in points]
        low = math.floor(math.log10(min(v[1] for s in series.values() for v in s)))
        high = math.ceil(math.log10(max(v[2] for s in series.values() for v in s)))

        def at(x: float, y: float, *, x0=x0, y0=y0, xs=xs, low=low, high=high) -> tuple[float, float]:
            return x0 + (x - xs[0]) / (xs[-1] - xs[0]) * width, y0 + (high - y) / (high - low) * height

        body.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        slopes = f"time ^{points[0]['exponent']:.2f}, memory ^{points[0]['memory_exponent']:.2f}"
        body.append(f'<text x="{x0}" y="{y0 - 10}" font-weight="bold">{WORDS[axis]}: {slopes}</text>')
        for power in range(low, high + 1):
            y = at(xs[0], power)[1]
            body.append(f'<path d="M{x0} {y:.1f}h{width}" stroke="#e4e4e4"/>')
            body.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for x, point in zip(xs, points, strict=True):
            body.append(
                f'<text x="{at(x, low)[0]:.1f}" y="{y0 + height + 16}" text-anchor="middle">{point["value"]:,}</text>'
            )
        # slope one, ending at the last time
        start = math.log10(points[-1]["ms"]) - (xs[-1] - xs[0])
        begin = max(start, low)
        (xa, ya), (xb, yb) = at(xs[0] + begin - start, begin), at(xs[-1], math.log10(points[-1]["ms"]))
        body.append(f'<path d="M{xa:.1f} {ya:.1f}L{xb:.1f} {yb:.1f}" stroke="#c0392b" stroke-dasharray="4 3"/>')
        for (_, values), color in zip(series.items(), ("#1f5fa8", "#888888"), strict=True):
            dots = [at(x, math.log10(v[0])) for x, v in zip(xs, values, strict=True)]
            line = "L".join(f"{x:.1f} {y:.1f}" for x, y in dots)
            body.append(f'<path d="M{line}" fill="none" stroke="{color}" stroke-width="2"/>')
            for (x, y), (_, p5, p95) in zip(dots, values, strict=True):
                body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
                ends = [at(xs[0], math.log10(p))[1] for p in (p5, p95)]
                body.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{color}"/>')
    bottom = top + 2 * height + 90 + 50
    legend = "blue: ms (median, 5 to 95 %); grey: MiB above what was resident; dashed: in proportion to the axis"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{bottom + 30}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + f'\n<text x="{left}" y="{bottom}">{legend}</text>\n'
        + f'<text x="{left}" y="{bottom + 16}">{html.escape(caption)}</text>\n'
        + "</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes an axis, up to 100,000 items")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--order", type=int, default=1, choices=(1, 2))
    parser.add_argument("--threads", type=int, help="torch's own number if not given")
    parser.add_argument("--out", type=Path, help="folder of both files, in place of bench/results and docs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker), args.order)
        return
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the workers, and of torch here, which asks it
    import torch

    from bench.machine import RESULTS, commit, device_name, slug, versions

    about = {"order": args.order, "threads": torch.get_num_threads(), "device": device_name("cpu")}
    about |= {"versions": versions(), "commit": commit()}
    rows = []
    for axis, values in (QUICK if args.quick else AXES).items():
        rows += measure(axis, values, rounds=args.rounds, order=args.order)
    table = (args.out or RESULTS) / f"scaling-{slug(about['device'])}.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *ENVIRONMENT), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} | about)
    caption = f"Outer step, order {args.order}, {about['device']}, {about['threads']} threads, commit {about['commit']}"
    ((args.out or ROOT / "docs") / "scaling.svg").write_text(svg(rows, caption), encoding="utf-8")


if __name__ == "__main__":
    main()
