"""What CodebookAssignments saves over a whole run of the transfer trainer, each lookup checked against a full search.

    python bench/assignments_run.py --folder DATA --target amazon14_office --source amazon14_toys amazon14_video_games

Distances are counted as in AssignmentStats. "distinct" is a full search that looks every item of a batch up once.
Then the wall time of a step with and without the option, in two trainers that take turns. Everything goes to
bench/results/assignments_<target>.json, the tables beside it as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec_fast import Config, backend_info, read
from metarec_fast.api import build, split_domain
from metarec_fast.data import find_domain
from metarec_fast.ops import nearest_codeword
from metarec_fast.train.trainer import Trainer
from metarec_fast.vq import CodebookAssignments

RESULTS = Path(__file__).parent / "results"


class Checked:
    """Compares every lookup with a full search, and books what both took."""

    def __init__(self, assignments: CodebookAssignments, domain: str, trainer: CheckedTrainer) -> None:
        self.assignments, self.domain, self.trainer = assignments, domain, trainer

    def lookup(self, ids: Tensor, x: Tensor, codebook: Tensor) -> Tensor:
        before, begin = self.assignments.stats, time.perf_counter()
        indices = self.assignments.lookup(ids, x, codebook)
        middle = time.perf_counter()
        full = nearest_codeword(x, codebook, with_margin=False).indices
        end = time.perf_counter()
        if not torch.equal(indices, full):
            wrong = int((indices != full).sum())
            raise AssertionError(f"{wrong} of {full.numel()} codes of {self.domain} differ at {self.trainer.where}")
        took = {n: a - b for (n, a), b in zip(self.assignments.stats._asdict().items(), before, strict=True)}
        took["distinct_evaluations"] = len(ids.unique()) * len(codebook) * codebook.shape[1]
        took |= {"lookups": 1, "seconds": middle - begin, "full_seconds": end - middle}
        book = self.trainer.books.setdefault((*self.trainer.where, self.domain), dict.fromkeys(took, 0))
        for name, amount in took.items():
            book[name] += amount
        return indices


class CheckedTrainer(Trainer):
    """A trainer whose lookups are checked and booked by (stage, step, domain)."""

    def __init__(self, *args: Any, neighbours: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.books: dict[tuple[str, int, str], dict[str, float]] = {}
        self.where = ("", 0)
        self.model.remember_codes(neighbours=neighbours)
        self.model.assignments = [
            Checked(a, name, self) for a, name in zip(self.model.assignments, self.model.domains, strict=True)
        ]

    def train_step(self, stage: str, step: int) -> dict[str, Any]:
        self.where = (stage, step)
        return super().train_step(stage, step)


def gather(books: dict, groups: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each group of bookings: ``groups`` names a row and says which (stage, step, domain) belong to it."""
    out = []
    for title, belongs in groups.items():
        chosen = [book for key, book in books.items() if belongs(*key)]
        if chosen:
            row = {name: sum(book[name] for book in chosen) for name in chosen[0]}
            row |= {"group": title, "fewer": row["full_evaluations"] / row["evaluations"]}
            row["fewer_than_distinct"] = row["distinct_evaluations"] / row["evaluations"]
            out.append(row | {"time_ratio": row["full_seconds"] / row["seconds"]})
    return out


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| steps | lookups | rows | distances: full search / ours | distinct rows / ours | proven by bounds | searched "
        "in full | time: full search / ours |",
        "|---|" + "--:|" * 7,
    ]
    lines += [
        f"| {r['group']} | {r['lookups']} | {r['rows']} | **{r['fewer']:.1f}** | {r['fewer_than_distinct']:.1f} | "
        f"{r['proven'] / r['rows']:.1%} | {r['searched'] / r['rows']:.1%} | {r['time_ratio']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def trainer(domains: list, config: Config, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    splits = {d.name: split_domain(d, config) for d in domains}
    *sources, target = splits.values()
    model = build(config, [*sources, target])
    return kind(model, {s.domain.name: s for s in sources}, target, config, **options)


def step_ratio(domains: list, config: Config, stage: str, steps: int) -> dict[str, float]:
    """Time of a step without the option over one with it: median and 5 to 95 % over steps taken in turns."""
    pair = [trainer(domains, config.replace(train={"remember_codes": on})) for on in (False, True)]
    times = []
    for step in range(steps):
        row = [0.0, 0.0]
        for which in ((0, 1), (1, 0))[step % 2]:
            begin = time.perf_counter()
            pair[which].train_step(stage, step)
            row[which] = time.perf_counter() - begin
        times.append(row)
    ratios = [plain / remembering for plain, remembering in times[10:]]
    cuts = statistics.quantiles(ratios, n=20)
    plain_ms = 1e3 * statistics.median(row[0] for row in times)
    return {"ratio": statistics.median(ratios), "p5": cuts[0], "p95": cuts[-1], "steps": steps, "plain_ms": plain_ms}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--source", nargs="+", required=True)
    parser.add_argument("--neighbours", type=int, default=32)
    parser.add_argument("--codebook-size", type=int, default=Config().model.codebook_size)
    parser.add_argument("--codebook-heads", type=int, default=Config().model.codebook_heads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window", type=int, default=50, help="steps of a row of the table over time")
    parser.add_argument("--timed-steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = {"codebook_size": options.codebook_size, "codebook_heads": options.codebook_heads}
    config = Config().replace(train={"seed": options.seed}, model=model)
    domains = [read(find_domain(name, Path(options.folder))) for name in (*options.source, options.target)]
    run = trainer(domains, config, CheckedTrainer, neighbours=options.neighbours)
    progress = run.run()

    taken = {stage.name: 1 + max((s for n, s, _ in run.books if n == stage.name), default=-1) for stage in run.stages}
    groups: dict[str, Any] = {"the whole run": lambda stage, step, domain: True}
    for name, steps in taken.items():
        for title, is_target in (("sources", False), (options.target, True)):
            groups[f"{name}, {steps} steps, {title}"] = lambda stage, step, domain, n=name, t=is_target: (
                stage == n and (domain == options.target) == t
            )
    over_time: dict[str, Any] = {}
    for name, steps in taken.items():
        for first in range(0, steps, options.window):
            over_time[f"{name} {first + 1}-{min(first + options.window, steps)}"] = (
                lambda stage, step, domain, n=name, f=first: stage == n and f <= step < f + options.window
            )
    result = {
        "options": {name: value for name, value in vars(options).items() if name != "folder"},
        "machine": backend_info()["cpu"],
        "torch": torch.__version__,
        "best_validation_ndcg@10": progress.best,
        "total": gather(run.books, groups),
        "over_time": gather(run.books, over_time),
    }
    if options.timed_steps:
        result["step_time"] = {s: step_ratio(domains, config, s, options.timed_steps) for s in ("warmup", "meta")}
    size = f"{options.codebook_heads} codebooks of {options.codebook_size} codes"
    text = f"{options.target}, {size}, {options.neighbours} neighbours, {options.threads} thread(s); every code checked"
    text += "\n\n" + table(result["total"]) + "\n\n" + table(result["over_time"]) + "\n"
    for stage, r in result.get("step_time", {}).items():
        text += (
            f"\nA {stage} step without / with: {r['ratio']:.3f} ({r['p5']:.3f}-{r['p95']:.3f}), {r['plain_ms']:.0f} ms"
        )
    default = Config().model.codebook_size == options.codebook_size
    name = f"assignments_{options.target}" + ("" if default else f"_{options.codebook_heads}x{options.codebook_size}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text.rstrip() + "\n")
    print(text)
