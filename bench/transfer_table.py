"""The README's table: does transfer help on a real target? Resumable; two runs side by side, one thread each.

    python bench/transfer_table.py --folder DATA --target amazon14_office --source amazon14_toys amazon14_video_games

Every method gets the same number of optimizer steps and the same stopping rule, and is chosen by validation. Rows go to
bench/results/transfer_<target>.json as they are finished, the table beside it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from metarec_fast import Config, compare, read
from metarec_fast.data import find_domain
from metarec_fast.report.table import values

RESULTS = Path(__file__).parent / "results"
METRICS = ("Recall@10", "NDCG@10")


def run(job: dict) -> list[dict]:
    """All methods on one fraction and seed, with their figures at test."""
    domains = [read(find_domain(name, Path(job["folder"]))) for name in (*job["source"], job["target"])]
    config = Config().replace(train={"seed": job["seed"], "threads": 1}, data={"target_fraction": job["fraction"]})
    rows, models = compare(domains[:-1], domains[-1], config=config)
    facts = {"fraction": job["fraction"], "seed": job["seed"], "protocol": rows[0].metrics.protocol}
    out = [{**facts, "method": r.method, "trained": r.trained, "seconds": r.seconds, **values(r.metrics)} for r in rows]
    for row, model in zip(rows[1:], models.values(), strict=True):
        alone = model.evaluate(transitions=False)
        out.append({**facts, "method": f"{row.method}, without transition evidence", "trained": True, **values(alone)})
        out[-1]["history"] = {k: v for k, v in model.history.items() if k != "transfer"}
        trace = model.history["transfer"]
        if trace:
            last = trace[len(trace) // 2 :]
            out[-1]["mean weight"] = {n: statistics.mean(t["weight"][n] for t in last) for n in last[0]["weight"]}
            out[-1]["mean similarity"] = {
                n: statistics.mean(t["similarity"][n] for t in last) for n in last[0]["similarity"]
            }
    return out


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over seeds, a column pair for each fraction."""
    fractions = sorted({r["fraction"] for r in rows})
    order = [
        "target only",
        "pretrain, then fine-tune",
        "MetaRec",
        *(f"{m}, without transition evidence" for m in ("target only", "pretrain, then fine-tune", "MetaRec")),
    ]
    names = ["best untrained floor, chosen by validation", *order]
    head = [f"{m}, {f:.0%} of users" for f in fractions for m in METRICS]
    lines = ["| method | " + " | ".join(head) + " |", "|---|" + "--:|" * len(head)]
    for name in names:
        cells = []
        for fraction in fractions:
            chosen = [
                r
                for r in rows
                if r["fraction"] == fraction and (r["method"] == name if name in order else not r["trained"])
            ]
            for metric in METRICS:
                figures = [r[metric] for r in chosen]
                spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
                cells.append(f"{statistics.mean(figures):.4f} ± {spread:.4f}" if figures else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--source", nargs="+", required=True)
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    path = RESULTS / f"transfer_{options.target}.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    done = {(r["fraction"], r["seed"]) for r in rows}
    common = {"folder": options.folder, "target": options.target, "source": options.source}
    jobs = [
        {**common, "fraction": f, "seed": s} for s in options.seeds for f in options.fractions if (f, s) not in done
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        for future in as_completed(pool.submit(run, job) for job in jobs):
            rows += future.result()
            path.write_text(json.dumps(rows, indent=1))
            print(table(rows), flush=True)
    (RESULTS / f"transfer_{options.target}.md").write_text(table(rows) + "\n")
