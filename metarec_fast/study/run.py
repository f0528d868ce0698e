"""Running a study: each cell is one file that is whole or absent, so that a run goes on where another ended."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from metarec_fast import __version__
from metarec_fast.api import MetaRec
from metarec_fast.checks import check_flag
from metarec_fast.config import Config
from metarec_fast.data import (
    DataWarning,
    Domain,
    Split,
    find_domain,
    fingerprint,
    load_domain,
    random_items,
    read,
    relabelled_copy,
    shuffled_order,
    shuffled_ties,
    synthetic,
)
from metarec_fast.evaluation import Metrics, Scorer, baselines, best_baseline, choice_catalogue, evaluate
from metarec_fast.files import only_here, write_atomically
from metarec_fast.inputs import split_domain
from metarec_fast.study.grid import FORMAT, Cell, Study
from metarec_fast.train.loop import Silent
from metarec_fast.train.stop import Interrupted

RANKS = ("users", "greater", "equal", "greater, history masked", "equal, history masked")  # rows of a cell's .npy
AMONG_ALL = tuple(f"{name}, all items" for name in RANKS[1:])  # the rows after them, of a cell that ranks fewer
TIE_SEED = 0  # one order of ties for all cells of a study


@dataclass(frozen=True)
class Domains:
    """Where a study's domains come from: a folder of files, or the synthetic process. Read once in each process."""

    folder: Path = Path(".")
    columns: tuple[tuple[str, str | None], ...] = ()
    """Of files: ("user", name), ("item", name), ("time", name) where they are not the usual ones."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with rows that cannot be read."""

    def load(self, study: Study, name: str) -> Domain:
        options = None if study.synthetic is None else json.dumps(study.synthetic, sort_keys=True)
        return _load(self, options, name, study.shuffle_ties)

    def fingerprint(self, study: Study, name: str) -> str:
        return _fingerprint(self.load(study, name))


@cache
def _load(where: Domains, options: str | None, name: str, shuffle: bool) -> Domain:
    if options is not None:
        made = _synthetic(options)
        known = {domain.name: domain for domain in (*made.sources, made.target, made.control)}
        if name not in known:
            raise ValueError(f"synthetic domains are {', '.join(known)}, got {name!r}")
        domain = known[name]
    else:
        path = find_domain(name, where.folder)
        domain = load_domain(path) if path.is_dir() else read(path, on_error=where.on_error, **dict(where.columns))
    return shuffled_ties(domain, seed=TIE_SEED) if shuffle and domain.sequences.times is not None else domain


@cache
def _synthetic(options: str) -> Any:
    return synthetic(**json.loads(options))


@cache
def _fingerprint(domain: Domain) -> str:
    return fingerprint(domain)


@cache
def code_version() -> str:
    """The version, and a digest of the package's Python files: two cells of one version were made by the same code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*.py") if p.relative_to(package).parts[0] != "kernels"):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def sources_of(study: Study, cell: Cell, domains: Domains) -> list[Domain]:
    """The source domains of an arm, kind after kind; what is random in them follows the cell's seed."""
    kinds = study.kinds(cell)
    names = study.sources_of(cell.target, cell.arm) if set(kinds) - {"copy"} else []
    related = [domains.load(study, name) for name in names]
    made: list[Domain] = []
    for kind in kinds:
        if kind == "copy":
            made.append(_copy(domains.load(study, cell.target), study.configs(cell)[0], cell))
        elif kind == "related":
            made += related
        else:
            change = shuffled_order if kind == "shuffled" else random_items
            made += [change(domain, seed=cell.seed) for domain in related]
    return made


def _copy(target: Domain, config: Config, cell: Cell) -> Domain:
    """The target's other users: users with validation cases should not be in the sources.

    Everybody where there are no others, and under a cut in time, which would fall elsewhere without them.
    """
    whole, counted = (split_domain(target, config, fraction=f).train.lengths > 0 for f in (1.0, cell.fraction))
    alone = config.data.split == "time" or not (whole & ~counted).any()
    return relabelled_copy(target, seed=cell.seed, without=None if alone else np.flatnonzero(counted))


class Outcome(NamedTuple):
    """What a cell found: record for JSON, and the counts of RANKS [5, cases] for every test user; or AMONG_ALL too."""

    record: dict[str, Any]
    ranks: np.ndarray


class _Steps(Silent):
    """Counts optimizer steps by stage."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def step(self, stage: str, step: int, total: int, record: dict[str, Any]) -> None:
        self.taken[stage] = self.taken.get(stage, 0) + 1


class _Peak:
    """The largest resident size from here on, where the system tells: Linux's mark, reset at the beginning."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._reported = True
        except OSError:
            self._reported = False

    def mebibytes(self) -> float | None:
        if not self._reported:
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(found[1]) / 1024


def run_cell(study: Study, cell: Cell, domains: Domains, *, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Train, choose by validation, and rank every test user's target, history masked and not.

    What is ranked is the catalogue of the cell's configuration, and all items beside it.

    Raises Interrupted if ``should_stop`` says so.
    """
    target = domains.load(study, cell.target)
    sources = sources_of(study, cell, domains)
    peak, steps = _Peak(), _Steps()
    started, cpu = time.perf_counter(), time.process_time()
    if cell.arm.baseline:
        (config,) = study.configs(cell)
        chosen = _fit_baseline(cell.arm.baseline, split_domain(target, config, fraction=cell.fraction), config)
    else:
        chosen = _fit_model(study.configs(cell), sources, target, steps, should_stop)
    cost = {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "steps": sum(steps.taken.values()),
        "steps_by_stage": steps.taken,
        "peak_memory_mib": peak.mebibytes(),
        "threads": torch.get_num_threads(),
    }
    split, among = chosen.split, chosen.split.candidates(chosen.config.data.catalogue)
    found = [
        _quietly(
            chosen.scorer,
            split.test,
            mask_history=mask,
            protocol=f"{split.protocol}; test",
            catalogue=among,
            among_all=True,
        )
        for mask in (False, True)
    ]
    record = {
        "valid": chosen.valid,
        "catalogue": chosen.config.data.catalogue,
        "test": {"history not masked": found[0].to_dict(), "history masked": found[1].to_dict()},
        "cost": cost,
        "config": dataclasses.asdict(chosen.config),
        **chosen.found,
    }
    ranked = found + [metrics.among_all for metrics in found if metrics.among_all is not None]
    rows = [found[0].users, *(counts for metrics in ranked for counts in (metrics.greater, metrics.equal))]
    return Outcome(record, np.stack(rows).astype(np.int32))


class _Chosen(NamedTuple):
    scorer: Scorer
    split: Split
    config: Config
    valid: float
    found: dict[str, Any]


def _fit_baseline(name: str, split: Split, config: Config) -> _Chosen:
    mask, catalogue = config.data.mask_history, config.data.catalogue
    if name == "best":
        name, scorer, table = best_baseline(split, mask_history=mask, catalogue=catalogue)
        return _Chosen(scorer, split, config, table[name]["ndcg@10"], {"baseline": name})
    scorer, among = baselines(split.train)[name], choice_catalogue(split, catalogue)
    valid = _quietly(scorer, split.valid, mask_history=mask, protocol="", catalogue=among)["ndcg@10"]
    return _Chosen(scorer, split, config, valid, {"baseline": name})


def _fit_model(
    configs: list[Config], sources: list[Domain], target: Domain, steps: _Steps, should_stop: Callable[[], bool]
) -> _Chosen:
    best, tried = None, []
    for config in configs:
        with warnings.catch_warnings():  # a control is a copy of the target by design
            warnings.filterwarnings("ignore", message=".*looks like a copy of the target", category=RuntimeWarning)
            model = MetaRec.fit(sources, target, config=config, reporter=steps, should_stop=should_stop)
        valid = model.evaluate("valid")["ndcg@10"]
        tried.append({"config": dataclasses.asdict(config), "valid_ndcg@10": valid, "seconds": model.history.seconds})
        if best is None or valid > best.valid:
            history = {key: value for key, value in model.history.to_dict().items() if key != "transfer"}
            found = {"history": history, "transfer": late_means(model.history.transfer)}
            best = _Chosen(model.scorer(), model.split, config, valid, found)
    assert best is not None
    return best._replace(found=best.found | {"tried": tried})


def late_means(trace: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean weight and similarity of each source over the later half of the meta stage; empty without one."""
    late = trace[len(trace) // 2 :]
    return {
        key: {name: float(np.mean([entry[key][name] for entry in late])) for name in late[0][key]}
        for key in (("weight", "similarity") if late else ())
    }


def _quietly(scorer: Scorer, *args: Any, **options: Any) -> Metrics:
    """Evaluate without the warning of ties, which baselines have by design; the cell's file has their share."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* items tie with the target", category=RuntimeWarning)
        return evaluate(scorer, *args, **options)


# files


def cell_stem(cell: Cell) -> str:
    """What the names of a cell's files begin with, whatever its options."""
    return f"{Path(cell.target).name}-{cell.fraction:g}-{cell.arm.name}-{cell.seed}"


def cell_path(out: Path, study: Study, cell: Cell, domains: Domains) -> Path:
    """Where a cell's file lies. Its name holds the hash, so that a changed arm is another cell."""
    names = [cell.target, *study.sources_of(cell.target, cell.arm)]
    digest = study.hash(cell, {name: domains.fingerprint(study, name) for name in names})
    return out / "cells" / f"{cell_stem(cell)}-{digest}.json"


def save_cell(path: Path, study: Study, cell: Cell, domains: Domains, outcome: Outcome) -> None:
    """The ranks, then the record: a cell whose JSON is there is whole."""
    names = [cell.target, *(study.sources_of(cell.target, cell.arm) if set(study.kinds(cell)) - {"copy"} else ())]
    record = {
        "format": FORMAT,
        "arm": dataclasses.asdict(cell.arm),
        "target": cell.target,
        "fraction": cell.fraction,
        "seed": cell.seed,
        "config_hash": path.stem.rsplit("-", 1)[1],
        "code_version": code_version(),
        "data": {name: domains.fingerprint(study, name) for name in names},
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "ranks": [*RANKS, *AMONG_ALL][: len(outcome.ranks)],
        **outcome.record,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, outcome.ranks, allow_pickle=False)
    write_atomically(path.with_suffix(".npy"), buffer.getvalue())
    write_atomically(path, json.dumps(record, indent=1).encode())


# the run


TABLES = ("results.csv", "comparisons.csv", "tables.md", "gains.svg", "cells.tar.xz")  # some of what Results writes


class Failure(NamedTuple):
    """A cell that could not be finished, and why."""

    cell: Cell
    reason: str


def run(
    study: Study,
    out: str | Path,
    domains: Domains | None = None,
    *,
    cells: Iterable[Cell] | None = None,
    processes: int = 1,
    overwrite: bool = False,
    on_cell: Callable[[Cell, dict[str, Any], int, int], None] = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Failure]:
    """Run the cells that ``out`` does not hold yet. Cells that fail are returned, and tried again by the next run.

    cells: those to run; all of the study if not given.
    processes: cells at a time; each process gets its share of the cores.
    overwrite: let this study have a folder that holds another one, whose tables it replaces and whose cells stay.
    on_cell: called with each finished cell, its record, how many are done and how many there are.
    Raises Interrupted if ``should_stop`` says so: what is finished stays, and nothing is half-written; ValueError for a
    folder that holds another study, or in which a process is at work.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    out, domains = Path(out), domains or Domains()
    wanted = [(cell, cell_path(out, study, cell, domains)) for cell in (study.cells() if cells is None else cells)]
    waiting = [(cell, path) for cell, path in wanted if not path.exists()]
    refuse_other(study, out, overwrite=overwrite)
    done, failures = len(wanted) - len(waiting), []
    run_all = _one_by_one if processes == 1 else _in_processes
    with only_here(out):
        write_atomically(out / "study.json", study.to_json().encode())
        for cell, path, reason in run_all(study, waiting, domains, processes, should_stop):
            if reason is not None:
                failures.append(Failure(cell, reason))
                continue
            done += 1
            on_cell(cell, json.loads(path.read_text(encoding="utf-8")), done, len(wanted))
    return failures


def refuse_other(study: Study, out: Path, *, overwrite: bool) -> None:
    """Raises ValueError, unless ``overwrite``, for a folder of a study of other targets or sources, or another name.

    Also for one of no study whose files have the names of its tables; an archive of cells may lie there unpacked.
    """
    check_flag(overwrite, "overwrite")
    refuse_older_cells(out)
    path = out / "study.json"
    if overwrite:
        return
    if not path.exists():
        if not (out / "cells").is_dir() and (found := [name for name in TABLES if (out / name).exists()]):
            raise ValueError(
                f"{out} holds {found[0]} and no study; --overwrite (overwrite=True) replaces it, or give another folder"
            )
        return
    try:
        before = Study.load(path)
    except ValueError as error:
        raise ValueError(f"{error}; --overwrite (overwrite=True) replaces it") from error
    for name in ("name", "targets", "sources"):
        was, now = getattr(before, name), getattr(study, name)
        # parts of a study, and additions to it, belong to it
        same = was == now if isinstance(was, str) else set(was) <= set(now) or set(now) <= set(was)
        if not same:
            was, now = (value if isinstance(value, str) else ", ".join(value) or "none" for value in (was, now))
            raise ValueError(
                f"{out} holds another study already: {name} {was}, not {now}; --overwrite (overwrite=True) "
                "replaces its tables and leaves its cells, or give another folder"
            )


def refuse_older_cells(out: Path) -> None:
    """Raises ValueError for a folder with a cell of another format, which would never be found and run again."""
    for path in (out / "cells").glob("*.json"):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))["format"]
        except (ValueError, KeyError, TypeError):
            continue  # `Results` names what is damaged, if the study asks for it
        if made != FORMAT:
            raise ValueError(
                f"{path} is a cell of format {made}, this version has {FORMAT}: its options had other names; "
                "give another folder, or read the cells with the version that wrote them"
            )


Finished = Iterator[tuple[Cell, Path, "str | None"]]


def _finish(study: Study, cell: Cell, path: Path, domains: Domains, should_stop: Callable[[], bool]) -> str | None:
    """Run and save a cell; the reason if it failed. One bad cell should not end a night's run."""
    try:
        save_cell(path, study, cell, domains, run_cell(study, cell, domains, should_stop=should_stop))
    except Interrupted:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _one_by_one(
    study: Study, waiting: list[tuple[Cell, Path]], domains: Domains, _: int, should_stop: Callable[[], bool]
) -> Finished:
    for cell, path in waiting:
        if should_stop():
            raise Interrupted("stopped between two cells")
        yield cell, path, _finish(study, cell, path, domains, should_stop)


def _in_processes(
    study: Study, waiting: list[tuple[Cell, Path]], domains: Domains, processes: int, should_stop: Callable[[], bool]
) -> Finished:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stop = context.Event()
    threads = max(1, len(os.sched_getaffinity(0)) // processes) if hasattr(os, "sched_getaffinity") else 1
    with ProcessPoolExecutor(processes, context, _begin_worker, (stop, threads)) as pool:
        jobs = {pool.submit(_work, study, cell, path, domains): (cell, path) for cell, path in waiting}
        try:
            with _stopping(stop, should_stop):
                for job in as_completed(jobs):
                    yield *jobs[job], job.result()
        except BrokenProcessPool as error:
            raise RuntimeError("a process of the study ended abruptly, perhaps for lack of memory") from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _stopping(stop: Any, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Pass a wish to stop on to the workers, who look for it before every step."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if should_stop():
                stop.set()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


class _Worker:
    """What a process of the pool keeps between cells."""

    stop: Any = None
    parent: Any = None

    @classmethod
    def should_stop(cls) -> bool:
        if not cls.parent.is_alive():
            os._exit(1)  # nobody is left to take the result
        return cls.stop.is_set()


def _begin_worker(stop: Any, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore", DataWarning)  # the parent has read the files too
    torch.set_num_threads(threads)
    _Worker.stop, _Worker.parent = stop, multiprocessing.parent_process()


def _work(study: Study, cell: Cell, path: Path, domains: Domains) -> str | None:
    if _Worker.should_stop():
        raise Interrupted("stopped before a cell")
    return _finish(study, cell, path, domains, _Worker.should_stop)
