"""metarec-fast train and demo: train methods on one budget and compare them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metarec_fast import __version__
from metarec_fast.cli.options import Reading, RunFolder, config_of
from metarec_fast.cli.show import load_named, show_how_to_resume, show_rows, show_transfer
from metarec_fast.config import Config
from metarec_fast.report.console import ConsoleReporter, plain_console
from metarec_fast.text import file_name, printable

Method = Literal["target_only", "pretrain", "joint", "metarec"]


@dataclass(frozen=True, kw_only=True)
class Demo(RunFolder, Config):
    """Train on the embedded synthetic domains and show what transfer gives."""

    out: Path | None = None
    """Run folder; runs/demo if not given, where a new demo replaces the one before."""
    profile: bool = False
    """Show where the time of a step goes, and put profile.json and profile.svg into the run folder."""
    methods: tuple[Method, ...] = ("target_only", "pretrain", "metarec")


@dataclass(frozen=True, kw_only=True)
class Train(RunFolder, Reading, Config):
    """Train a recommender of one target domain with the help of source domains."""

    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same, once for each source."""
    methods: tuple[Method, ...] = ()
    """Methods to compare on the same budget; the one of --train.method if none is given."""
    profile: bool = False
    """Show where the time of a step goes, and put profile.json and profile.svg into the run folder."""


def demo(command: Demo) -> int:
    from metarec_fast.data import synthetic
    from metarec_fast.train import run_folder

    out, overwrite = command.out or Path("runs/demo"), command.overwrite
    if command.out is None and not command.resume and (before := is_demo(out)):
        overwrite = True  # it is made again from nothing but its options
        plain_console().print(f"replacing the demo in {printable(out)}, {before}")
    run_folder.refuse(out, resume=command.resume, overwrite=overwrite)
    domains = synthetic(target_users=1000, target_items=120, seed=command.train.seed)
    return train_and_show(
        domains.sources,
        domains.target,
        config_of(command),
        command.methods,
        out,
        resume=command.resume,
        overwrite=overwrite,
        profile=command.profile,
        title="synthetic domains: transfer against target only",
    )


def is_demo(folder: Path) -> str | None:
    """When the run in ``folder`` was begun, if it is one of the demo."""
    from metarec_fast.train import run_folder

    about = run_folder.run_in(folder)
    names = [] if about is None else [one["name"] for one in (*about["sources"], about["target"])]
    return f"begun {about['started']}" if names == ["source0", "source1", "target"] else None


def train(command: Train) -> int:
    from metarec_fast.api import check_methods
    from metarec_fast.inputs import check_device
    from metarec_fast.train import run_folder

    config = config_of(command)
    check_device(config)
    if command.out is not None:
        run_folder.refuse(command.out, resume=command.resume, overwrite=command.overwrite)
    methods = check_methods(command.methods or (command.train.method,))
    if not command.source and set(methods) != {"target_only"}:
        raise ValueError(f"--source must name at least one source for {', '.join(methods)}, got none")
    target, *sources = load_named([command.target, *command.source], command)
    out = command.out or Path("runs") / file_name(target.name)
    return train_and_show(
        sources,
        target,
        config,
        methods,
        out,
        resume=command.resume,
        overwrite=command.overwrite,
        profile=command.profile,
        title=f"target {target.name}",
    )


def train_and_show(
    sources: list,
    target: object,
    config: Config,
    methods: Sequence[str],
    out: Path,
    *,
    resume: bool,
    overwrite: bool,
    profile: bool,
    title: str,
) -> int:
    """Train, print the table, write the run folder. Returns the exit status."""
    from metarec_fast.api import compare
    from metarec_fast.files import write_atomically
    from metarec_fast.profiling.steps import StepProfiler
    from metarec_fast.report import profile as profile_report
    from metarec_fast.report.table import COLUMNS, markdown
    from metarec_fast.train.stop import Interrupted, StopRequested

    profiler = StepProfiler() if profile else None
    console = plain_console()
    started = time.perf_counter()
    with StopRequested() as stop:
        try:
            with ConsoleReporter(log=out / "log.jsonl", console=console) as reporter:
                rows, models = compare(
                    sources,
                    target,
                    config=config,
                    methods=methods,
                    run_dir=out,
                    resume=resume,
                    overwrite=overwrite,
                    reporter=reporter,
                    should_stop=stop,
                    profiler=profiler,
                )
        except Interrupted as reason:
            show_how_to_resume(console, reason, out)
            return 130
    if profiler is not None:
        profile_report.show(profiler.stages, console)
        profile_report.write(profiler.stages, out)
    show_rows(console, rows, title)
    for method, model in models.items():
        show_transfer(console, model, out / method)
    write_atomically(out / "config.json", config.to_json().encode())
    write_atomically(out / "metrics.json", json.dumps(run_folder_record(config, rows, models), indent=2).encode())
    write_atomically(out / "table.md", markdown(rows, columns=COLUMNS).encode())
    console.print(f"run folder: {printable(out)}   total {time.perf_counter() - started:.0f} s", soft_wrap=True)
    return 0


def run_folder_record(config: Config, rows: Sequence, models: dict) -> dict:
    import numpy
    import torch

    from metarec_fast.ops import backend_info
    from metarec_fast.report.table import values

    return {
        "results": [
            {
                "method": r.method,
                "trained": r.trained,
                "seconds": r.seconds,
                **values(r.metrics),
                **({} if r.metrics.among_all is None else {"all_items": values(r.metrics.among_all)}),
                "targets_outside": r.metrics.outside,
            }
            for r in rows
        ],
        "protocol": rows[0].metrics.protocol,
        "history": {name: model.history.to_dict() for name, model in models.items()},
        "seed": config.train.seed,
        "versions": {
            "metarec_fast": __version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "backends": backend_info(),
    }
