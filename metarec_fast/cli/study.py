"""metarec-fast study and audit-transfer: grids of runs, resumed, with tables and verdicts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from metarec_fast.checks import (
    SEED,
    SHARE,
    Checked,
    Range,
    check_count,
    check_number,
    nearest,
)
from metarec_fast.cli.options import Reading, config_of
from metarec_fast.cli.show import notes_in_report, show_domain
from metarec_fast.config import Config
from metarec_fast.report.console import plain_console
from metarec_fast.text import file_name, printable

if TYPE_CHECKING:
    from metarec_fast.study import Cell, Domains, Results, Study

PROCESSES = Range(1, 1024)


@dataclass(frozen=True, kw_only=True)
class StudyRun(Checked):
    """Run a grid of arms, targets, fractions and seeds, or what is left of it; tables, intervals and plots."""

    study: Annotated[str, tyro.conf.Positional]
    """smoke, short, published, or a JSON file that describes a study."""
    folder: Path = Path(os.environ.get("METAREC_FAST_DATA", "."))
    """Where named domains lie; METAREC_FAST_DATA sets the default."""
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
    out: Path | None = None
    """Folder of the cells and results; runs/study-<name> if not given. Finished cells in it are not run again."""
    overwrite: bool = False
    """Replace the tables of another study that the folder holds; its cells stay."""
    processes: int = 1
    """Cells at a time; each gets its share of the cores."""
    arms: tuple[str, ...] = ()
    """Only these; as with the others, all if none is given."""
    targets: tuple[str, ...] = ()
    fractions: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    report_only: bool = False
    """Run nothing; write tables and plots of what is finished."""
    archive: bool = False
    """Also write cells.tar.xz, small enough to publish: unpacked into --out, what is in it is finished."""
    describe: bool = False
    """Run nothing; print the study as the JSON that can be changed and given back."""

    def check(self) -> None:
        check_count(self.processes, "processes", PROCESSES)
        for fraction in self.fractions:
            check_number(fraction, "fractions", SHARE)
        for seed in self.seeds:
            check_count(seed, "seeds", SEED)


def study(command: StudyRun) -> int:
    from metarec_fast.files import write_atomically
    from metarec_fast.study import PRESETS, Domains, Results, Study
    from metarec_fast.study.results import contrast_table, label, summary
    from metarec_fast.study.run import refuse_other

    given = command.study
    if given in PRESETS:
        plan = PRESETS[given]()
    elif Path(given).is_file():
        plan = Study.load(given)
    else:
        raise ValueError(f"STUDY must be {', '.join(PRESETS)} or a JSON file, got {given!r}{nearest(given, PRESETS)}")
    chosen = plan.only(arms=command.arms, targets=command.targets, fractions=command.fractions, seeds=command.seeds)
    if command.describe:
        print(chosen.to_json())
        return 0
    out, started = command.out or Path("runs") / file_name(f"study-{plan.name}"), time.perf_counter()
    if command.report_only:
        refuse_other(plan, out, overwrite=command.overwrite)
        status, results = 0, Results(plan, out)
        results.write()
        if not (out / "study.json").exists():
            write_atomically(out / "study.json", plan.to_json().encode())
    else:
        domains, cells = Domains(command.folder, on_error=command.on_error), list(chosen.cells())
        if plan.synthetic is None:
            with notes_in_report():
                for name in dict.fromkeys(
                    name for c in cells for name in (c.target, *plan.sources_of(c.target, c.arm))
                ):
                    show_domain(domains.load(plan, name))
        status, results = run_study(plan, out, domains, command.processes, cells, overwrite=command.overwrite)
    if command.archive:
        results.archive()
    for comparison in plan.comparisons:
        contrasts = results.contrasts(comparison)
        if contrasts:
            print(f"\n{label(comparison)}\n{contrast_table(contrasts)}\n{summary(contrasts)}")
    seconds = time.perf_counter() - started
    print(f"\n{len(results.records)} of {results.expected} cells; tables and plots: {printable(out)}   ", end="")
    print(f"total {seconds:.0f} s")
    return status


@dataclass(frozen=True, kw_only=True)
class AuditTransfer(Reading, Config):
    """Does transfer help on your domains? Target only, your sources, and controls made of them; a verdict in words."""

    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same, once for each source."""
    seeds: tuple[int, ...] = (0, 1, 2)
    weights: bool = True
    """One more arm with all kinds of sources together, for the weights that they get."""
    leave_out: bool = False
    """One more arm for each source, trained without it: what it is worth beside the others."""
    out: Path | None = None
    """Folder of the cells and results; runs/audit-<target> if not given. Finished cells in it are not run again."""
    overwrite: bool = False
    """Replace the tables of another study that the folder holds; its cells stay."""
    processes: int = 1
    """Cells at a time; each gets its share of the cores."""

    def check(self) -> None:
        super().check()
        check_count(self.processes, "processes", PROCESSES)


def audit_transfer(command: AuditTransfer) -> int:
    from metarec_fast.inputs import check_device
    from metarec_fast.study import Domains, audit_study, audit_verdict

    check_device(config_of(command))
    plan = audit_study(
        command.target,
        command.source,
        config_of(command),
        seeds=command.seeds,
        weights=command.weights,
        leave_out=command.leave_out,
    )
    columns = tuple((role, getattr(command, role)) for role in ("user", "item", "time"))
    domains = Domains(command.folder, columns, command.on_error)
    with notes_in_report():
        for name in (command.target, *command.source):
            show_domain(domains.load(plan, name))
    out = command.out or Path("runs") / file_name(f"audit-{domains.load(plan, command.target).name}")
    status, results = run_study(plan, out, domains, command.processes, overwrite=command.overwrite)
    if results.complete:
        print("\n" + "\n".join(audit_verdict(results)))
    print(f"tables and plots: {printable(out)}")
    return status


def run_study(
    plan: Study,
    out: Path,
    domains: Domains,
    processes: int,
    cells: Sequence[Cell] | None = None,
    *,
    overwrite: bool = False,
) -> tuple[int, Results]:
    """Run what is left of a study, a line a cell, and write its tables and plots: the exit status, and the results."""
    from metarec_fast.study import Results, run
    from metarec_fast.study.results import figure
    from metarec_fast.train.stop import Interrupted, StopRequested

    console, status = plain_console(), 0

    def show(cell: Cell, record: dict, done: int, total: int) -> None:
        cost = record["cost"]
        left_out = record.get("history", {}).get("skipped_steps", 0)
        skipped = f" ({left_out:,} left out, not finite)" if left_out else ""
        memory = "" if cost["peak_memory_mib"] is None else f", {cost['peak_memory_mib']:,.0f} MiB"
        console.print(
            f"{done}/{total}  {printable(cell)}: NDCG@10 {figure(record, 'ndcg@10'):.4f} "
            f"(validation {record['valid']:.4f})  {cost['seconds']:.0f} s, {cost['steps']:,} steps{skipped}{memory}",
            soft_wrap=True,
        )

    with StopRequested() as stop:
        try:
            failures = run(
                plan,
                out,
                domains,
                cells=cells,
                processes=processes,
                overwrite=overwrite,
                on_cell=show,
                should_stop=stop,
            )
        except Interrupted:
            status, failures = 130, []
            console.print(f"stopped; finished cells are in {printable(out)}. The same command goes on.", soft_wrap=True)
    for cell, reason in failures:
        status = 1
        print(f"metarec-fast: {printable(cell)} failed: {printable(reason)}", file=sys.stderr)
    results = Results(plan, out)
    results.write()
    return status, results
