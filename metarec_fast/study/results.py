"""What a study found: one tidy table of its cells, paired comparisons over users, Markdown and plots."""

from __future__ import annotations

import csv
import glob
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from metarec_fast.data.domain import Catalogue
from metarec_fast.evaluation import Difference, expected_metric, holm, no_verdict, paired_bootstrap
from metarec_fast.evaluation.verdict import FEWEST
from metarec_fast.files import write_atomically
from metarec_fast.report.plot import Interval, Point, interval_chart, line_chart
from metarec_fast.study.grid import Cell, Comparison, Study
from metarec_fast.study.run import AMONG_ALL, RANKS, cell_stem
from metarec_fast.text import markdown

CUTOFF = 10
METRICS = (f"ndcg@{CUTOFF}", f"recall@{CUTOFF}")
MASKS = {"": "history not masked", "_masked": "history masked"}
ALL_ITEMS = "_all_items"  # ends the columns of figures among all items, beside those among the cell's own catalogue
FIGURES = tuple(metric + suffix for suffix in MASKS for metric in METRICS)
COLUMNS = (
    *("arm", "group", "target", "fraction", "seed"),
    *FIGURES,
    *(column + ALL_ITEMS for column in FIGURES),
    *(
        "catalogue",
        "targets_outside",
        "skipped_steps",
        "valid_ndcg@10",
        "seconds",
        "cpu_seconds",
        "steps",
        "peak_memory_mib",
        "threads",
    ),
    *("config_hash", "code_version", "data_hash", "file"),
)
LEVEL = 0.05  # of p after Holm's adjustment
SHARE = 0.8  # of the cells that a consistent gain must win
FEW = 0.1  # share of the users up to which transfer is expected to help
LOSS = 0.01  # relative, that it must exceed in none


@dataclass(frozen=True)
class Contrast:
    """An arm against another in one target x fraction, over all test users, each user's values averaged over seeds."""

    target: str
    fraction: float
    arm: str
    baseline: str
    seeds: int
    arm_mean: float
    baseline_mean: float
    difference: Difference
    p: float
    """After Holm's adjustment over the cells of the comparison; 1 without a verdict."""
    no_verdict: str | None = None
    """Why the difference says nothing, whatever its interval (`evaluation.no_verdict`)."""

    @property
    def gain(self) -> float:
        """Relative to the baseline's mean."""
        return self._relative(self.difference.mean)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain, the baseline's mean taken as given."""
        return self._relative(self.difference.low), self._relative(self.difference.high)

    @property
    def wins(self) -> bool:
        return self.difference.mean > 0 and self.clear

    @property
    def loses(self) -> bool:
        return self.difference.mean < 0 and self.clear

    @property
    def clear(self) -> bool:
        """Whether there is a verdict, and p is below .05."""
        return self.no_verdict is None and self.p < LEVEL

    def _relative(self, value: float) -> float:
        return value / self.baseline_mean if self.baseline_mean else 0.0


def consistent(contrasts: Sequence[Contrast]) -> bool:
    """Whether an arm wins at least 80 % of the cells with an adjusted p < .05 and loses none by more than 1 %."""
    wins = sum(c.wins for c in contrasts)
    return bool(contrasts) and wins >= SHARE * len(contrasts) and all(c.gain >= -LOSS for c in contrasts)


class Results:
    """The finished cells of a study in a folder, whose data need not be at hand.

    Of cells that differ in their data alone, the newest counts. Raises ValueError for a cell's file that is damaged.
    """

    def __init__(self, study: Study, out: str | Path) -> None:
        self.study, self.out = study, Path(out)
        self.expected = 0
        self.records: dict[tuple[str, str, float, int], dict[str, Any]] = {}
        self._paths: dict[tuple[str, str, float, int], Path] = {}
        for cell in study.cells():
            self.expected += 1
            files = (self.out / "cells").glob(f"{glob.escape(cell_stem(cell))}-*.json")
            for path in sorted(files, key=lambda p: p.stat().st_mtime):
                try:
                    record = json.loads(path.read_text(encoding="utf-8"))
                    known = study.hash(cell, record["data"]) == record["config_hash"]
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path} is damaged; remove it to run the cell again: {error!r}") from error
                if known:
                    self.records[_key(cell)], self._paths[_key(cell)] = record, path

    @property
    def complete(self) -> bool:
        return len(self.records) == self.expected

    def rows(self) -> list[dict[str, Any]]:
        """One row a finished cell, by COLUMNS."""
        rows = []
        for (arm, target, fraction, seed), record in self.records.items():
            cost = record["cost"]
            rows.append(
                {
                    "arm": arm,
                    "group": record["arm"]["group"],
                    "target": target,
                    "fraction": fraction,
                    "seed": seed,
                    **{column: figure(record, column) for column in FIGURES},
                    **{column + ALL_ITEMS: figure(record, column + ALL_ITEMS) for column in FIGURES},
                    "catalogue": catalogue_of(record),
                    "targets_outside": record["test"]["history not masked"].get("targets_outside", 0),
                    "skipped_steps": record.get("history", {}).get("skipped_steps", 0),
                    "valid_ndcg@10": record["valid"],
                    **{key: cost[key] for key in COLUMNS if key in cost},
                    "config_hash": record["config_hash"],
                    "code_version": record["code_version"],
                    "data_hash": "+".join(record["data"].values()),
                    "file": str(self._paths[arm, target, fraction, seed].relative_to(self.out)),
                }
            )
        return rows

    def per_user(self, arm: str, target: str, fraction: float, seed: int, *, column: str = "ndcg@10") -> np.ndarray:
        """[cases] values of the test users, in the order of the target's users. column: a metric of COLUMNS."""
        return expected_metric(column.partition("_")[0], *self._ranks(arm, target, fraction, seed, column=column))

    def _ranks(self, arm: str, target: str, fraction: float, seed: int, *, column: str) -> np.ndarray:
        """Items above and items equal to each target, [2, cases]."""
        key = arm, target, fraction, seed
        ranks = np.load(self._paths[key].with_suffix(".npy"), allow_pickle=False)
        name = "greater, history masked" if "_masked" in column else "greater"
        if column.endswith(ALL_ITEMS) and catalogue_of(self.records[key]) == "training":
            name += ", all items"
        at = (*RANKS, *AMONG_ALL).index(name)
        return ranks[at : at + 2]

    def values(self, arm: str, target: str, fraction: float, key: Callable[[dict[str, Any]], float]) -> list[float]:
        """A figure of each finished seed."""
        return [
            key(self.records[arm, target, fraction, seed])
            for seed in self.study.seeds
            if (arm, target, fraction, seed) in self.records
        ]

    def baseline(self, comparison: Comparison, target: str, fraction: float) -> str | None:
        """Of those that an arm is compared with, the one of the highest mean validation NDCG@10; None if none ran.

        While seeds are missing, one of the arms that finished the most: means of other seeds are not comparable.
        """
        valid = {name: self.values(name, target, fraction, lambda f: f["valid"]) for name in comparison.against}
        most = max(map(len, valid.values()))
        done = {name: mean(figures) for name, figures in valid.items() if figures and len(figures) == most}
        return max(done, key=lambda name: done[name]) if done else None

    def contrasts(self, comparison: Comparison, *, column: str = "ndcg@10", samples: int = 10_000) -> list[Contrast]:
        """The comparison in every target x fraction where both arms have finished a common seed."""
        found = []
        for target in self.study.targets:
            for fraction in sorted(self.study.fractions):
                name = self.baseline(comparison, target, fraction)
                both = (comparison.arm, name)
                seeds = [s for s in self.study.seeds if all((a, target, fraction, s) in self.records for a in both)]
                if name is None or not seeds:
                    continue
                if len({catalogue_of(self.records[a, target, fraction, s]) for a in both for s in seeds}) > 1:
                    column = column.removesuffix(ALL_ITEMS) + ALL_ITEMS  # what both arms have
                metric = column.partition("_")[0]
                ranks = [[self._ranks(arm, target, fraction, seed, column=column) for seed in seeds] for arm in both]
                a, b = (np.mean([expected_metric(metric, *one) for one in of], axis=0) for of in ranks)
                difference = paired_bootstrap(a, b, seed=0, samples=samples)
                reason = self._not_run(both, target, fraction, seeds)
                reason = reason or no_verdict(*ranks, difference, metric=metric)
                means = float(a.mean()), float(b.mean())
                p = 1.0 if reason else difference.p
                found.append(Contrast(target, fraction, *both, len(seeds), *means, difference, p, reason))
        adjusted = holm([contrast.p for contrast in found])
        return [replace(c, p=float(p)) for c, p in zip(found, adjusted, strict=True)]

    def _not_run(self, arms: Sequence[str], target: str, fraction: float, seeds: Sequence[int]) -> str | None:
        """In words, the first stage of these cells of which no step was finite; None if all ran."""
        for arm in arms:
            for seed in seeds:
                for stage in self.records[arm, target, fraction, seed].get("history", {}).get("stages_not_run", ()):
                    return f"no step of {stage} was finite in {arm}, seed {seed}"
        return None

    # files

    def write(self) -> list[Path]:
        """Tables: results.csv, comparisons.csv, tables.md; where arms are compared, plots: gains.svg, <target>.svg."""
        compared = [(c, found) for c in self.study.comparisons if (found := self.contrasts(c))]
        files = {
            "results.csv": _csv(COLUMNS, self.rows()),
            "comparisons.csv": _csv(CONTRAST_COLUMNS, [_row(c, contrast) for c, many in compared for contrast in many]),
            "tables.md": self.markdown(compared),
        }
        if compared:
            intervals = [
                Interval(f"{label(c)}: {_place(x)}", x.gain, *x.interval, strong=x.wins)
                for c, many in compared
                for x in many
            ]
            files["gains.svg"] = interval_chart(intervals, title="Gain in NDCG@10 with 95 % interval", percent=True)
            for target in {x.target: None for _, many in compared for x in many}:
                files[f"{Path(target).name}.svg"] = self._curves(target, compared)
        self.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(self.out / name, text.encode())
        return [self.out / name for name in files]

    def archive(self) -> Path:
        """Write cells.tar.xz: the finished cells at about a hundredth of their size, from which all tables follow.

        Unpacked into a folder, they are cells of the study like any other: judged beside new ones, and not run again.
        Of ranks below the tables' cutoff no more is kept than that they are below.
        """
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:xz") as tar:

            def add(path: Path, data: bytes) -> None:
                member = tarfile.TarInfo(str(path.relative_to(self.out)))
                member.size, member.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(member, io.BytesIO(data))

            for key, path in self._paths.items():
                ranks = np.load(path.with_suffix(".npy"), allow_pickle=False)
                greater, equal = ranks[1::2], ranks[2::2]  # of RANKS
                equal[greater >= CUTOFF] = 0
                np.minimum(greater, CUTOFF, out=greater)
                array = io.BytesIO()
                np.save(array, ranks, allow_pickle=False)
                add(path.with_suffix(".npy"), array.getvalue())
                add(path, json.dumps(self.records[key] | {"ranks_up_to": CUTOFF}, indent=1).encode())
        path = self.out / "cells.tar.xz"
        write_atomically(path, packed.getvalue())
        return path

    def _curves(self, target: str, compared: list[tuple[Comparison, list[Contrast]]]) -> str:
        lines: dict[str, list[Point]] = {}
        for comparison, contrasts in compared:
            for x in (x for x in contrasts if x.target == target):
                for name, value in ((comparison.arm, x.arm_mean), (_against(comparison), x.baseline_mean)):
                    point = Point(f"{x.fraction:.0%}", value)
                    line = lines.setdefault(name, [])
                    if point not in line:
                        line.append(point)
        return line_chart(lines, title=f"NDCG@10 on {target} by share of its users", y_from_zero=True)

    def markdown(self, compared: list[tuple[Comparison, list[Contrast]]]) -> str:
        records = list(self.records.values())
        if not records:
            return f"# {markdown(self.study.name)}\n\nNo cell is finished.\n"
        versions = sorted({f["code_version"] for f in records})
        torches = sorted({f["versions"]["torch"] for f in records})
        parts = [
            f"# Study {markdown(self.study.name)}",
            f"{len(records)} of {self.expected} cells, seeds {', '.join(map(str, self.study.seeds))}; code "
            f"{', '.join(versions)}, torch {', '.join(torches)}. Figures are means over seeds ± standard deviation, of "
            f"all test users; {_ranked(records)}; models are chosen by validation alone.",
        ]
        if len(versions) > 1:
            parts.append("**Cells of different code versions stand side by side.**")
        columns = [*FIGURES]
        if any(catalogue_of(f) == "training" for f in records):
            columns += [column + ALL_ITEMS for column in FIGURES]
        left_out = [
            f"{row['skipped_steps']:,} of {row['arm']} on {row['target']}, {row['fraction']:.0%}, seed {row['seed']}"
            for row in self.rows()
            if row["skipped_steps"]
        ]
        if left_out:
            parts.append(f"**Training steps were left out because they were not finite**: {', '.join(left_out)}.")
        for column in columns:
            mask = MASKS["_masked" if "_masked" in column else ""]
            title = column.partition("_")[0].replace("ndcg", "NDCG").replace("recall", "Recall")
            parts += [
                f"## {title}, {mask}{', among all items' if column.endswith(ALL_ITEMS) else ''}",
                self._grid(lambda f, c=column: figure(f, c), lambda v: f"{v:.4f}", spread=True),
            ]
        parts += [
            "## Validation NDCG@10, by which models are chosen",
            self._grid(lambda f: f["valid"], lambda v: f"{v:.4f}", spread=True),
            "## Cost: seconds of training and choosing",
            self._grid(lambda f: f["cost"]["seconds"], lambda v: f"{v:,.0f}"),
            "## Cost: optimizer steps",
            self._grid(lambda f: f["cost"]["steps"], lambda v: f"{v:,.0f}"),
            "## Cost: peak memory of the process, MiB",
            self._grid(lambda f: f["cost"]["peak_memory_mib"], lambda v: f"{v:,.0f}"),
        ]
        if compared:
            parts.append("## Comparisons, NDCG@10, history not masked")
            parts.append(
                "Paired bootstrap over users, 10,000 resamples, each user's values averaged over seeds first; p after "
                "Holm's adjustment over the cells of a comparison. Of several baselines, the one that validation likes "
                f"best. No verdict where fewer than {FEWEST} cases have a hit or make the difference, where the order "
                "of ties alone decides its sign, or where a training stage did not run. Consistent: at least 80 % of "
                "the cells won with p < .05 and none lost by more than 1 %."
            )
        for comparison, contrasts in compared:
            parts += [f"### {markdown(label(comparison))}", contrast_table(contrasts), summary(contrasts)]
        weights = self._weights()
        if weights:
            parts += ["## Weights of sources", weights]
        return "\n\n".join(parts) + "\n"

    def _grid(self, key: Callable[[dict[str, Any]], Any], form: Callable[[float], str], spread: bool = False) -> str:
        places = [(t, f) for t in self.study.targets for f in sorted(self.study.fractions)]
        head = "| arm | " + " | ".join(f"{markdown(t)}, {f:.0%}" for t, f in places) + " |"
        lines = [head, "|---|" + "--:|" * len(places)]
        for arm in self.study.arms:
            cells = []
            for target, fraction in places:
                figures = [v for v in self.values(arm.name, target, fraction, key) if v is not None]
                text = form(mean(figures)) if figures else ""
                cells.append(text + (f" ± {form(stdev(figures))}" if spread and len(figures) > 1 else ""))
            lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _weights(self) -> str:
        lines = []
        for arm in self.study.arms:
            for target in self.study.targets:
                for fraction in sorted(self.study.fractions):
                    found = self.source_means(arm.name, target, fraction, "weight")
                    if found:
                        listed = ", ".join(f"{markdown(name)} {value:.3f}" for name, value in found.items())
                        lines.append(f"- {arm.name}, {markdown(target)}, {fraction:.0%}: {listed}")
        return "\n".join(lines)

    def source_means(self, arm: str, target: str, fraction: float, key: str) -> dict[str, float]:
        """Mean "weight" or "similarity" of each source over the seeds; empty for an arm that has none.

        Of the co-occurrence scorer, or where there is none of the encoder, over the later half of its meta stage.
        """
        found = self.values(arm, target, fraction, lambda f: _of_sources(f, key))
        return {name: mean(values[name] for values in found) for name in (found[0] if found else ())}


def catalogue_of(record: dict[str, Any]) -> Catalogue:
    """What a cell ranked. Cells from before there was a choice ranked all items."""
    return record.get("catalogue", "all")


def figure(record: dict[str, Any], column: str) -> float:
    """A cell's figure of a column of FIGURES, or of one among all items."""
    found = record["test"][MASKS["_masked" if "_masked" in column else ""]]
    if column.endswith(ALL_ITEMS):
        found = found.get("among_all", found)
    return found["metrics"][column.partition("_")[0]]


def _ranked(records: Sequence[dict[str, Any]]) -> str:
    """In words, what the tables' figures are among."""
    kinds = {catalogue_of(f) for f in records}
    if kinds == {"all"}:
        return "all items are ranked, also those known from held-out events alone"
    words = "ranked are the items of training events, another target is a miss"
    return words if kinds == {"training"} else f"{words} (in some cells all items)"


def _of_sources(record: dict[str, Any], key: str) -> dict[str, float]:
    cooccurrence = record.get("history", {}).get("cooccurrence", {}).get("sources", {})
    return {name: values[key] for name, values in cooccurrence.items()} or record.get("transfer", {}).get(key, {})


def label(comparison: Comparison) -> str:
    return comparison.title or f"{comparison.arm} against {_against(comparison)}"


def _against(comparison: Comparison) -> str:
    many = len(comparison.against) > 1
    return f"best of {', '.join(comparison.against)}" if many else comparison.against[0]


def contrast_table(contrasts: Sequence[Contrast]) -> str:
    lines = ["| target, users | against | NDCG@10 | its NDCG@10 | gain | 95 % interval | p (Holm) |"]
    lines.append("|---|---|--:|--:|--:|---|--:|")
    for c in contrasts:
        low, high = c.interval
        p = f"{c.p:.4f}" if c.no_verdict is None else f"no verdict: {c.no_verdict}"
        figures = f"{c.arm_mean:.4f} | {c.baseline_mean:.4f} | {c.gain:+.1%} | {low:+.1%} to {high:+.1%} | {p}"
        lines.append(f"| {markdown(_place(c))} | {c.baseline} | {figures} |")
    return "\n".join(lines)


def summary(contrasts: Sequence[Contrast]) -> str:
    """The verdict over the cells, a sentence for those of few users and one for the others."""
    few = [c for c in contrasts if c.fraction <= FEW]
    many = [c for c in contrasts if c.fraction > FEW]
    if not (few and many):
        return _summary(contrasts)
    return f"Up to {FEW:.0%} of users: {_summary(few)}\n\nMore users: {_summary(many)}"


def _summary(contrasts: Sequence[Contrast]) -> str:
    wins = sum(c.wins for c in contrasts)
    losses, open_ = sum(c.loses for c in contrasts), sum(c.no_verdict is not None for c in contrasts)
    verdict = "consistent" if consistent(contrasts) else "not consistent"
    return (
        f"Wins {wins} and loses {losses} of {len(contrasts)} cells with p < .05"
        f"{f', {open_} without a verdict' if open_ else ''}; mean gain "
        f"{mean(c.gain for c in contrasts):+.1%}, worst {min(c.gain for c in contrasts):+.1%}: {verdict}."
    )


CONTRAST_COLUMNS = (
    *("comparison", "target", "fraction", "arm", "baseline", "seeds", "arm_ndcg@10", "baseline_ndcg@10"),
    *("difference", "low", "high", "p", "p_holm", "gain", "gain_low", "gain_high", "wins", "no_verdict"),
)


def _row(comparison: Comparison, c: Contrast) -> dict[str, Any]:
    values = (label(comparison), c.target, c.fraction, c.arm, c.baseline, c.seeds, c.arm_mean, c.baseline_mean)
    given = c.no_verdict is None
    *interval, p = c.difference
    figures = (*interval, p if given else "", c.p if given else "", c.gain, *c.interval, c.wins, c.no_verdict or "")
    return dict(zip(CONTRAST_COLUMNS, (*values, *figures), strict=True))


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _place(contrast: Contrast) -> str:
    return f"{contrast.target}, {contrast.fraction:.0%}"


def _key(cell: Cell) -> tuple[str, str, float, int]:
    return cell.arm.name, cell.target, cell.fraction, cell.seed
