"""The command ``metarec-fast``: parse, call the API, print."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Table

from metarec_fast import __version__
from metarec_fast.checks import (
    POSITIVE_COUNT,
    SEED,
    SHARE,
    Checked,
    Range,
    check_choice,
    check_count,
    check_number,
    nearest,
    postponed,
)
from metarec_fast.config import PRESETS, SECTIONS, Config
from metarec_fast.report.console import ConsoleReporter, plain_console
from metarec_fast.text import file_name, printable

if TYPE_CHECKING:
    from rich.console import Console

    from metarec_fast.api import MetaRec
    from metarec_fast.data import Domain
    from metarec_fast.study import Cell, Domains, Results, Study

PROCESSES = Range(1, 1024)
Method = Literal["target_only", "pretrain", "joint", "metarec"]


@dataclass(frozen=True, kw_only=True)
class Demo(Config):
    """Train on the embedded synthetic domains and show what transfer gives."""

    out: Path | None = None
    """Run folder; runs/demo if not given, where a new demo replaces the one before."""
    resume: bool = False
    """Go on from the run folder's checkpoints."""
    overwrite: bool = False
    """Replace the run that the run folder holds."""
    profile: bool = False
    """Show where the time of a step goes, and put profile.json and profile.svg into the run folder."""
    methods: tuple[Method, ...] = ("target_only", "pretrain", "metarec")


@dataclass(frozen=True, kw_only=True)
class Train(Config):
    """Train a recommender of one target domain with the help of source domains."""

    target: str
    """A file, the folder that import made of one, or the name of either in --folder."""
    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same, once for each source."""
    folder: Path = Path(os.environ.get("METAREC_FAST_DATA", "."))
    """Where named domains lie; METAREC_FAST_DATA sets the default."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
    methods: tuple[Method, ...] = ()
    """Methods to compare on the same budget; the one of --train.method if none is given."""
    out: Path | None = None
    """Run folder; runs/<target> if not given."""
    resume: bool = False
    """Go on from the run folder's checkpoints."""
    overwrite: bool = False
    """Replace the run that the run folder holds."""
    profile: bool = False
    """Show where the time of a step goes, and put profile.json and profile.svg into the run folder."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Turn a file of any size into a domain's folder, memory-mapped from then on; in bounded memory."""

    file: Annotated[Path, tyro.conf.Positional]
    """RecBole .inter, CSV, TSV, JSON lines or Parquet, perhaps gzipped; or a pipe, with --format."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it comes into being whole, or not at all."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    name: str | None = None
    """Name of the domain; the file's if not given."""
    format: Literal["inter", "csv", "tsv", "jsonl", "parquet"] | None = None
    """Told by the file's suffix if not given."""
    separator: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
    duplicates: Literal["keep", "drop", "drop_pairs"] = "keep"
    """Rows that repeat user, item and time: keep them, drop them, or drop all that repeat user and item."""
    memory: str = "1GB"
    """For the rows at work; the distinct ids come on top."""
    overwrite: bool = False
    """Replace the domain that the folder holds."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Full-ranking metrics of a saved model."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    split: Literal["valid", "test"] = "test"
    mask_history: bool | None = None
    """Leave the user's history out of the ranking; as in training if not given."""
    catalogue: Literal["training", "all"] | None = None
    """Rank the items of training events, or every item of the domain; as in training if not given."""


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """A recommender of another domain from a saved model, without the data of its sources."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    target: str
    """A file, the folder that import made of one, or the name of either in --folder."""
    folder: Path = Path(os.environ.get("METAREC_FAST_DATA", "."))
    """Where named domains lie; METAREC_FAST_DATA sets the default."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
    steps: int | None = None
    """Of the encoder's fine-tuning, at most; as in the model's training if not given, and so for the others."""
    lr: float | None = None
    scope: Literal["gradual", "all", "table"] | None = None
    """table: leave the shared parameters as they are. all: move them from the first step on. gradual: the item table
    alone for half of the steps, then everything. As in the model's training if not given."""
    seed: int | None = None
    threads: int | None = None
    device: str | None = None
    """As in the model's training if not given and it is here; the CPU otherwise."""
    compare_target_only: bool = False
    """Train on the target alone too, with as many steps, and keep what validation likes better."""
    out: Path | None = None
    """Run folder; runs/<target> if not given."""
    resume: bool = False
    """Go on from the run folder's checkpoints."""
    overwrite: bool = False
    """Replace the run that the run folder holds."""


@dataclass(frozen=True, kw_only=True)
class Recommend(Checked):
    """The best items for users, or for a history of items."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    users: tuple[str, ...] = ()
    """User ids of the target domain."""
    history: tuple[str, ...] = ()
    """Item ids, oldest first."""
    k: int = 10
    include_seen: bool = False
    catalogue: Literal["training", "all"] | None = None
    """Recommend items of training events, or of every item of the domain; as in training if not given."""
    json: bool = False
    """Print JSON instead of a table."""

    def check(self) -> None:
        check_count(self.k, "k", POSITIVE_COUNT)
        if bool(self.users) == bool(self.history):
            raise ValueError("give either --users or --history, and not both")


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


@dataclass(frozen=True, kw_only=True)
class AuditTransfer(Config):
    """Does transfer help on your domains? Target only, your sources, and controls made of them; a verdict in words."""

    target: str
    """A file, the folder that import made of one, or the name of either in --folder."""
    source: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The same, once for each source."""
    folder: Path = Path(os.environ.get("METAREC_FAST_DATA", "."))
    """Where named domains lie; METAREC_FAST_DATA sets the default."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
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


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What runs the operators here, and whether anything is missing."""


COMMANDS = {
    "demo": Demo,
    "import": Import,
    "train": Train,
    "adapt": Adapt,
    "evaluate": Evaluate,
    "recommend": Recommend,
    "study": StudyRun,
    "audit-transfer": AuditTransfer,
    "doctor": Doctor,
}


def usage() -> str:
    lines = ["usage: metarec-fast COMMAND [options]   (COMMAND --help lists them)", ""]
    lines += [f"  {name:<14} {command.__doc__}" for name, command in COMMANDS.items()]
    lines += [
        "",
        f"  train, demo and audit-transfer take --preset {{{','.join(PRESETS)}}} or --config FILE; "
        "other options change those",
    ]
    return "\n".join(lines)


def split_flag(given: str) -> list[str]:
    """``--preset=demo`` as ``--preset demo``; anything else as it is."""
    return given.split("=", 1) if given.startswith(("--preset=", "--config=")) else [given]


def parse(arguments: Sequence[str]) -> object:
    """The command with its options; --preset and --config choose where the options start from."""
    name, rest = arguments[0], list(arguments[1:])
    command, default = COMMANDS[name], None
    if issubclass(command, Config):
        start = PRESETS["demo" if name == "demo" else "default"]()
        rest = [part for given in rest for part in split_flag(given)]
        for flag in ("--preset", "--config"):
            if flag not in rest[:-1]:
                continue
            at = rest.index(flag)
            value = rest[at + 1]
            if flag == "--preset":
                check_choice(value, flag, PRESETS)
            start = PRESETS[value]() if flag == "--preset" else Config.load(value)
            del rest[at : at + 2]
        sections = {f.name: getattr(start, f.name) for f in fields(Config)}
        with postponed():
            default = command(**sections, **({"target": tyro.MISSING} if command is not Demo else {}))
    with postponed():  # tyro would tell what is wrong in the words of Python
        made = tyro.cli(command, args=rest, default=default, prog=f"metarec-fast {name}", description=command.__doc__)
    if isinstance(made, Checked):
        made.check()
    return made


ALIASES: dict[type, dict[str, str]] = {
    Adapt: {
        **{f"train.finetune_{name}": f"--{name}" for name in ("steps", "lr", "scope")},
        **{f"train.{name}": f"--{name}" for name in ("seed", "threads", "device")},
    },
    Recommend: {"histories": "--history", "exclude_seen": "--include-seen"},
}
ARGUMENTS = {"run_dir": "out", "sources": "source"}  # of the API, by the commands' names of them


def flags_of(command: type) -> dict[str, str]:
    """How the command line spells the arguments of Python and the options of a configuration."""
    flags = {}
    for field in fields(command):
        if field.name in SECTIONS:
            flags |= {
                f"{field.name}.{one.name}": f"--{field.name}.{one.name}".replace("_", "-")
                for one in fields(SECTIONS[field.name])
            }
        else:
            positional = "Positional" in str(field.type)
            flags[field.name] = field.name.upper() if positional else "--" + field.name.replace("_", "-")
    flags |= {argument: flags[name] for argument, name in ARGUMENTS.items() if name in flags}
    return flags | ALIASES.get(command, {})


def in_flags(message: str, command: type) -> str:
    """An error of the API in the command's words: options of its own, and arguments it has too, by their flags.

    Options are recognised by their section. Names of arguments are often ordinary words: they count with a value (k=3),
    or at the beginning with a requirement (k must be).
    """

    def in_words(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        flag = flags[name]
        if value is None or not flag.startswith("--"):
            return flag if value is None else f"{flag} {value}"
        if value in ("True", "False"):
            return flag if value == "True" else re.sub(r"([\w-]+)$", r"no-\1", flag)
        return f"{flag} {value.strip(chr(39))}"

    flags = flags_of(command)
    options = "|".join(re.escape(name) for name in flags if "." in name)
    arguments = "|".join(re.escape(name) for name in flags if "." not in name)
    value = r"=(?P<value>'[^']*'|[\w.+-]*\w)"
    if options:
        message = re.sub(rf"(?<![\w.-])(?P<name>{options})(?:{value})?(?!\w)", in_words, message)
    if arguments:
        message = re.sub(rf"(?<![\w.'-])(?P<name>{arguments}){value}", in_words, message)
        said = r"(?P<value>(?!))?(?=(\[\d+\])* (must|needs|holds|is given|has)\b)"
        message = re.sub(rf"^(?P<name>{arguments}){said}", in_words, message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)  # said in both ways: --resume (resume=True)


def config_of(command: Config) -> Config:
    return Config(**{f.name: getattr(command, f.name) for f in fields(Config)})


def show_rows(console: Console, rows: Sequence, title: str) -> None:
    from metarec_fast.report.table import values

    columns = ("Recall@10", "NDCG@10", "MRR")
    all_items = any(row.metrics.among_all is not None for row in rows)
    table = Table(title=printable(title))
    table.add_column("method")
    for column in (*columns, *(("NDCG@10, all items",) if all_items else ()), "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{values(row.metrics)[c]:.4f}" for c in columns]
        if all_items:
            figures.append(f"{(row.metrics.among_all or row.metrics).ndcg[10]:.4f}")
        name = row.method if row.trained else f"{row.method} (untrained)"
        table.add_row(printable(name), *figures, "" if row.seconds is None else f"{row.seconds:.0f}")
    console.print(table)
    console.print(printable(rows[0].metrics.protocol))


def show_transfer(console: Console, model: MetaRec, out: Path) -> None:
    """The verdict and key figures of a transfer report, if the model has one, and where the whole of it lies."""
    from metarec_fast.api import METHODS
    from metarec_fast.report.transfer import lines

    report = model.history.transfer_report
    if report is None:
        return
    text = [
        f"{METHODS[report['method']]}: {report['verdict']}",
        *lines(report),
        f"  report: {printable(out / 'report.html')}",
    ]
    console.print("\n".join(text), soft_wrap=True)


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


def tell_how_to_go_on(console: Console, reason: Exception, out: Path) -> None:
    console.print(f"{reason}; saved in {printable(out)}. Go on with the same command and --resume.", soft_wrap=True)


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
            tell_how_to_go_on(console, reason, out)
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


def is_demo(folder: Path) -> str | None:
    """When the run in ``folder`` was begun, if it is one of the demo."""
    from metarec_fast.train import run_folder

    about = run_folder.run_in(folder)
    names = [] if about is None else [one["name"] for one in (*about["sources"], about["target"])]
    return f"begun {about['started']}" if names == ["source0", "source1", "target"] else None


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


def load_named(names: Sequence[str], command: Train | Adapt) -> list[Domain]:
    """Domains by their files, folders or names, with the command's columns; all there before any is read."""
    from metarec_fast.data import find_domain, load_domain, read

    paths = [find_domain(name, command.folder) for name in names]
    places = [path.resolve() for path in paths]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"--target and --source must be domains of different names, got {name!r} twice")
    columns = {role: getattr(command, role) for role in ("user", "item", "time")}
    domains = []
    for path in paths:
        if path.is_dir():
            domain = load_domain(path)
        else:
            with notes_in_report():
                domain = read(path, **columns, on_error=command.on_error)
        show_domain(domain)
        domains.append(domain)
    return domains


def show_domain(domain: Domain, *, always: bool = False) -> None:
    """Its summary; and its report, always or if rows were left out or are repeated, or a column was guessed."""
    lines = [domain.summary()]
    if domain.report is not None and (always or domain.report.remarkable):
        lines += map(printable, str(domain.report).split("\n"))
    plain_console().print("\n".join(lines), soft_wrap=True)


@contextmanager
def notes_in_report() -> Iterator[None]:
    """Readers' warnings are left to the report, which is printed."""
    from metarec_fast.data import DataWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        yield


def train(command: Train) -> int:
    from metarec_fast.api import check_device, check_methods
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


def adapt(command: Adapt) -> int:
    from metarec_fast.api import METHODS, MetaRec, baseline_row, check_device
    from metarec_fast.report.table import Row
    from metarec_fast.train import run_folder
    from metarec_fast.train.stop import Interrupted, StopRequested

    if command.out is not None:
        run_folder.refuse(command.out, resume=command.resume, overwrite=command.overwrite)
    model = MetaRec.from_pretrained(command.model)
    given = {
        "finetune_steps": command.steps,
        "finetune_lr": command.lr,
        "finetune_scope": command.scope,
        "seed": command.seed,
        "threads": command.threads,
        "device": command.device,
    }
    train = {name: value for name, value in given.items() if value is not None}
    if command.steps is not None:
        train["finetune_passes"] = 0.0  # which would ask for more of them
    config = model.adapt_config().replace(train=train)
    check_device(config)
    (target,) = load_named([command.target], command)
    out = command.out or Path("runs") / file_name(target.name)
    console = plain_console()
    with StopRequested() as stop:
        try:
            with ConsoleReporter(log=out / "log.jsonl", console=console) as reporter:
                reporter.begin(f"from {model.domain.name}")
                adapted = model.adapt(
                    target,
                    config=config,
                    compare_target_only=command.compare_target_only,
                    run_dir=out,
                    resume=command.resume,
                    overwrite=command.overwrite,
                    reporter=reporter,
                    should_stop=stop,
                )
        except Interrupted as reason:
            tell_how_to_go_on(console, reason, out)
            return 130
    name = METHODS[adapted.config.train.method]
    if adapted.history.adapted_from is not None:
        name += f", adapted from {model.domain.name}"
    rows = [
        baseline_row(adapted.split, mask_history=config.data.mask_history, catalogue=config.data.catalogue),
        Row(name, adapted.evaluate(), seconds=adapted.history.seconds),
    ]
    show_rows(console, rows, f"target {target.name}")
    show_transfer(console, adapted, out)
    console.print(f"model: {printable(out / 'model')}", soft_wrap=True)
    return 0


def import_(command: Import) -> int:
    from metarec_fast.data import Progress, import_file

    console, started = plain_console(), time.perf_counter()
    options = {f.name: getattr(command, f.name) for f in fields(Import) if f.name not in ("file", "folder")}

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)  # what is half-written is removed then too
    try:
        with console.status("reading") as line:

            def show(progress: Progress) -> None:
                share = "" if progress.share is None else f" {progress.share:.0%}"
                rate = progress.rows / (time.perf_counter() - started)
                counted = f"{progress.rows:,} rows" + (f", {rate:,.0f} a second" if progress.stage == "reading" else "")
                line.update(f"{progress.stage}{share}: {counted}")

            with notes_in_report():
                domain = import_file(command.file, command.folder, **options, progress=show)
    except KeyboardInterrupt:
        print("metarec-fast: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds = time.perf_counter() - started
    show_domain(domain, always=True)
    rate = domain.report.rows / seconds
    console.print(f"folder: {printable(command.folder)}   {seconds:.1f} s, {rate:,.0f} rows a second", soft_wrap=True)
    return 0


def evaluate(command: Evaluate) -> int:
    from metarec_fast.api import METHODS, MetaRec, baseline_row
    from metarec_fast.report.table import Row

    model = MetaRec.from_pretrained(command.model)
    catalogue = command.catalogue or model.config.data.catalogue
    metrics = model.evaluate(command.split, mask_history=command.mask_history, catalogue=catalogue)
    rows = [Row(METHODS[model.config.train.method], metrics)]
    if command.split == "test":
        mask = model.config.data.mask_history if command.mask_history is None else command.mask_history
        rows.insert(0, baseline_row(model.split, mask_history=mask, catalogue=catalogue))
    show_rows(plain_console(), rows, f"{model.domain.name}, {command.split}")
    return 0


def recommend(command: Recommend) -> int:
    from metarec_fast.api import MetaRec

    model = MetaRec.from_pretrained(command.model)
    options = {"k": command.k, "exclude_seen": not command.include_seen, "catalogue": command.catalogue}
    flag, ids = ("--users", model.domain.users) if command.users else ("--history", model.domain.items)
    known, unknown = [], []
    for text in command.users or command.history:
        try:
            (value,) = ids.parse([text])
            ids.encode([value])
            known.append((text, value))
        except ValueError as reason:
            unknown.append(str(reason))
    if not known:
        raise ValueError(f"{flag}: {'; '.join(unknown)}")
    if command.users:
        queries, results = [text for text, _ in known], model.recommend([value for _, value in known], **options)
    else:
        queries, results = ["history"], model.recommend(histories=[[value for _, value in known]], **options)
    if command.json:
        print(json.dumps(dict(zip(queries, results, strict=True)), ensure_ascii=False))
    else:
        table = Table("for", "rank", "item", "score")
        for who, answer in zip(queries, results, strict=True):
            for rank, (item, score) in enumerate(answer, 1):
                table.add_row(printable(who), str(rank), printable(item), f"{score:.3f}")
        plain_console().print(table)
    for reason in unknown:
        print(f"metarec-fast: {flag}: {printable(reason)}; left out", file=sys.stderr)
    return 1 if unknown else 0


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


def audit_transfer(command: AuditTransfer) -> int:
    from metarec_fast.api import check_device
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


def doctor(command: Doctor) -> int:
    import numpy
    import torch

    table = Table("part", "state", "why")
    table.add_row("metarec_fast", __version__, f"python {platform.python_version()}, numpy {numpy.__version__}")
    table.add_row("torch", torch.__version__, f"{torch.get_num_threads()} threads")
    try:
        from metarec_fast.ops import backend_info

        info = backend_info()
    except (ValueError, ImportError) as error:
        table.add_row("C++ operators", "not usable", printable(error))
        plain_console().print(table)
        print(f"metarec-fast: {printable(error)}", file=sys.stderr)
        return 1
    cpu, gpu = info["cpu"], info["gpu"]
    table.add_row("C++ operators", cpu["isa"], f"{cpu['why']}; supported {', '.join(cpu['supported_isas'])}")
    table.add_row("threads of C++", str(cpu["threads"]), "torch's OpenMP runtime")
    table.add_row("GPU", gpu["device"] or "none", gpu["why"])
    table.add_row("Triton", "installed" if gpu["triton"] else "not installed", "needed for GPU kernels only")
    plain_console().print(table)
    return 0


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"metarec-fast: warning: {printable(message)}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where a part failed, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal's encoding does not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"metarec-fast {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"unknown command {printable(name)!r}{nearest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    run = {
        "demo": demo,
        "import": import_,
        "train": train,
        "adapt": adapt,
        "evaluate": evaluate,
        "recommend": recommend,
        "study": study,
        "audit-transfer": audit_transfer,
        "doctor": doctor,
    }
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            return run[name](parse(arguments))
        except (ValueError, OSError, ImportError) as error:
            lines = in_flags(str(error), COMMANDS[name]).split("\n")
            print("metarec-fast: " + "\n".join(map(printable, lines)), file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # while data is read, or the second one
            print("metarec-fast: interrupted", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
