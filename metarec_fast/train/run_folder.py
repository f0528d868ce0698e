"""A run folder: of one run at a time, and of one run alone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metarec_fast.config import Config
from metarec_fast.data.domain import Domain
from metarec_fast.data.identity import difference, identity
from metarec_fast.files import (
    COUNT,
    LIST,
    OBJECT,
    SHA256,
    TEXT,
    Damaged,
    Field,
    check_fields,
    check_seal,
    now,
    only_here,
    read_json,
    sealed,
    write_atomically,
)
from metarec_fast.persistence import MODEL
from metarec_fast.train import checkpoint

FORMAT = 1
DESCRIPTION = "run.json"
METHOD_FOLDERS = ("target_only", "pretrain", "joint", "metarec")
PARTS = (*(f"{method}/target_only" for method in METHOD_FOLDERS), *METHOD_FOLDERS)  # folders of runs within a run's
CHECKPOINTS = {"encoder": "checkpoint", "cooccurrence": "checkpoint_cooccurrence"}  # folders, by objective
LOSABLE = (*CHECKPOINTS.values(), "model", "metrics.json", "table.md", "report.html")  # what work has gone into
OWN = (*LOSABLE, "config.json", "log.jsonl", "profile.json", "profile.svg", DESCRIPTION)
TEXT_OR_NULL = Field("a string or null", lambda v: v is None or TEXT.fits(v))
FIELDS = {
    "format": COUNT,
    "command": TEXT,
    "method": TEXT,
    "sources": LIST,
    "target": OBJECT,
    "times": Field("true or false", lambda v: isinstance(v, bool)),
    "started": TEXT,
    "finished": TEXT_OR_NULL,
    "checksum": SHA256,
}
DOMAIN_FIELDS = {
    "name": TEXT,
    "num_users": COUNT,
    "num_items": COUNT,
    "num_interactions": COUNT,
    "events": TEXT,
    "times": TEXT_OR_NULL,
    "users": TEXT,
    "items": TEXT,
}
# options of which a run that goes on may have others: they change how it is computed, not what
FREE = ("train.threads", "train.device", "train.compile", "train.capture")
FREE += ("train.compare_target_only",)  # adds a run, and changes none


def data_of(sources: Sequence[Domain], target: Domain, config: Config) -> dict[str, Any]:
    """What a run is about, for JSON: its domains by ``identity``, and whether it reads their times."""
    return {
        "sources": [identity(domain) for domain in sources],
        "target": identity(target),
        "times": config.data.split == "time",
    }


def check_data(found: Any, where: str) -> None:
    """Raises Damaged, naming the field, for what ``data_of`` cannot have made."""
    check_fields(found, {key: FIELDS[key] for key in ("sources", "target", "times")}, where, exact=False)
    for domain in (*found["sources"], found["target"]):
        check_fields(domain, DOMAIN_FIELDS, f"{where}: a domain")


def other_data(data: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """In words, how the domains of a run differ from those of before; None if they do not."""
    return difference([data["target"]], [before["target"]], role="target", times=data["times"]) or difference(
        data["sources"], before["sources"], role="source", times=data["times"]
    )


def other_options(config: Config, before: Mapping[str, Any]) -> str | None:
    """In words, which options differ from those of before and matter; None if none does."""
    given, were = flat(dataclasses.asdict(config)), flat(before)
    for name in sorted({*given, *were} - set(FREE)):
        value, was = given.get(name, "not known"), were.get(name, "not known")
        if value != was:
            return f"{name} is {value}, was {was}"
    return None


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by "section.name", sequences as lists."""
    return {
        f"{section}.{name}": list(value) if isinstance(value, tuple) else value
        for section, options in config.items()
        for name, value in (options.items() if isinstance(options, Mapping) else [("", options)])
    }


@contextmanager
def claimed(
    folder: Path | None, command: str, method: str, data: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """The folder for one run, which its description names; nothing is done for None.

    resume: go on with the run that is there, if it is this one. overwrite: remove the run that is there, its model
    when the new one takes its place.
    Raises ValueError for a folder that holds a run, unless one of both is given; that holds another run than the one
    to resume; or that a process is at work in.
    """
    if folder is None:
        yield
        return
    refuse(folder, resume=resume, overwrite=overwrite)
    with only_here(folder):
        refuse(folder, resume=resume, overwrite=overwrite)  # a process that has just finished may have filled it
        about = {"format": FORMAT, "command": command, "method": method, **data, "started": now(), "finished": None}
        before = _read(folder) if resume else None
        if before is not None:
            other = other_data(data, before)
            if before["command"] != command:
                other = f"made by {before['command']}, not by {command}"
            if other:
                raise ValueError(
                    f"{folder} holds another run ({describe(folder)}): {other}; use another run folder, or start again "
                    "with --overwrite (overwrite=True)"
                )
            about["started"] = before["started"]
        if not resume:
            _clear(folder, [f"{part}/model" for part in method.split(", ")] if command == "compare" else ["model"])
        if before is None or before["method"] != method:  # a resume that is refused leaves what is there as it was
            write_atomically(folder / DESCRIPTION, sealed(about))
        yield
        write_atomically(folder / DESCRIPTION, sealed({**about, "finished": now()}))


def refuse(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError for a folder that holds a run, unless ``resume`` or ``overwrite``; also if both are given."""
    if resume and overwrite:
        raise ValueError(
            "--resume (resume=True) goes on with a run and --overwrite (overwrite=True) replaces it: give one"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder for the run")
    if (other := _other_than_a_run(folder)) is not None:
        raise ValueError(f"{folder} holds {other}, which is of no run; move it away, or give another folder")
    if not (resume or overwrite) and (found := describe(folder)) is not None:
        raise ValueError(
            f"{folder} holds a run already: {found}; --overwrite (overwrite=True) replaces it, "
            "--resume (resume=True) goes on with it"
        )


def describe(folder: Path) -> str | None:
    """In words, the run that ``folder`` holds; None if there is nothing to lose in it."""
    try:
        about = _read(folder)
    except ValueError:
        about = None
    # a run that ended before it had anything to keep may be started again
    names = LOSABLE if about is not None else OWN
    there = [name for name in names if (folder / name).exists()]
    parts = [name for name in METHOD_FOLDERS if any((folder / name / one).exists() for one in LOSABLE)]
    if not there and not parts:
        return None
    if about is None:
        return "files " + ", ".join([*there, *parts])
    when = f"finished {about['finished']}" if about["finished"] else f"started {about['started']}, not finished"
    sources = ", ".join(one["name"] for one in about["sources"])
    return f"target {about['target']['name']!r}, method {about['method']}, sources {sources or 'none'}, {when}"


def _other_than_a_run(folder: Path) -> str | None:
    """A name that a run would write or remove, and that somebody else's file or folder has; None if there is none."""
    at_work = (folder / DESCRIPTION).exists()
    for part in ("", *PARTS):
        states, model = [folder / part / name for name in CHECKPOINTS.values()], folder / part / "model"
        kept = [(state, checkpoint.is_in(state), checkpoint.owns) for state in states]
        for path, whole, owns in (*kept, (model, MODEL.is_in(model), None)):
            at_work = at_work or whole
            if whole or not path.exists():
                continue
            if not path.is_dir() or not all(owns is not None and owns(one.name) for one in path.iterdir()):
                return str(path.relative_to(folder))
    return None if at_work else next((name for name in OWN if name not in OWN[:2] and (folder / name).exists()), None)


def run_in(folder: Path) -> dict[str, Any] | None:
    """What the description in ``folder`` says, or None if there is none that can be read."""
    try:
        return _read(folder)
    except ValueError:
        return None


def _read(folder: Path) -> dict[str, Any] | None:
    if not (folder / DESCRIPTION).exists():
        return None
    try:
        about = read_json(folder, DESCRIPTION)
        check_fields(about, FIELDS, DESCRIPTION)
        check_data(about, DESCRIPTION)
        check_seal(about, DESCRIPTION)
    except Damaged as error:
        raise ValueError(f"{folder} is damaged: {error}; start again with --overwrite (overwrite=True)") from error
    return about


def _clear(folder: Path, renewed: Sequence[str]) -> None:
    """Remove a run's files, but for the models at ``renewed``, which stay until a new one takes their place."""
    parts = [part for part in PARTS if any((folder / part / name).exists() for name in (*LOSABLE, DESCRIPTION))]
    if describe(folder) is None and run_in(folder) is None:
        return  # whatever is there is not ours
    for name in (*OWN, *(f"{part}/{name}" for part in parts for name in OWN)):
        if name not in renewed:
            _remove(folder / name)
    for part in parts:
        if not any((folder / part).iterdir()):
            (folder / part).rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
