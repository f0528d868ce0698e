"""A domain as a folder: NumPy arrays that can be memory-mapped, and a description that says they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from metarec_fast.data.domain import Domain, ReadReport, Sequences
from metarec_fast.data.vocabulary import Vocabulary

FORMAT = 2
DESCRIPTION = "domain.json"
SUFFIXES = (".inter", ".csv", ".tsv", ".jsonl", ".parquet")
MAPPED = 1 << 28  # bytes of arrays from which on they are mapped rather than read
CORE = {"offsets": ("int64",), "items": ("int32", "int64"), "times": ("int64", "float64")}
NAMES = {*CORE, *(f"{role}.{key}" for role in ("users", "items") for key in ("integers", "utf8", "offsets"))}


def is_domain(folder: str | Path) -> bool:
    """Whether ``save_domain`` or ``import_file`` has finished a domain in ``folder``."""
    return (Path(folder) / DESCRIPTION).is_file()


def find_domain(name: str, folder: Path) -> Path:
    """The file or the domain's folder itself, or the one of that name in ``folder``."""
    if Path(name).is_file() or is_domain(name):
        return Path(name)
    if is_domain(folder / name):
        return folder / name
    found = [p for s in SUFFIXES for z in ("", ".gz") if (p := folder / f"{name}{s}{z}").is_file()]
    if not found:
        known = ", ".join(s + "[.gz]" for s in SUFFIXES)
        raise ValueError(
            f"domain {name!r} is neither a file nor in {folder} with one of {known}, nor a domain's folder"
        )
    return found[0]


def save_domain(domain: Domain, folder: str | Path) -> None:
    """Write ``domain`` into ``folder``, in place of the domain that may be there; whole, or not at all.

    Its report stays behind: it names the file that the domain was read from, and rows of it.

    Raises ValueError for a folder that holds anything else, OSError where it cannot be written.
    """
    with replacing(folder, overwrite=True) as partial:
        writer = DomainWriter(partial)
        sequences = domain.sequences
        for name in CORE:
            if (values := getattr(sequences, name)) is not None:
                writer.write(name, values)
        writer.finish(
            domain.name,
            domain.users,
            domain.items,
            None,
            num_items=sequences.num_items,
            ordered_by=domain.ordered_by,
        )


def load_domain(folder: str | Path, *, mmap: bool | Literal["auto"] = "auto", verify: bool = False) -> Domain:
    """Read what ``save_domain`` or ``import_file`` wrote.

    mmap: leave the arrays on disk, mapped read-only, rather than read them; "auto" does so from 256 MiB on. Ids that
        are strings are then decoded as they are asked for; only a look-up by id reads all of them.
    verify: read every byte and compare checksums. Without it, files that are missing, cut short or of another type
        than described are found, but not a changed byte.

    Raises ValueError if the folder is incomplete, damaged or of an unknown format.
    """
    folder = Path(folder)
    if not is_domain(folder):
        raise ValueError(f"{folder} holds no whole domain: {DESCRIPTION} is missing")
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        found = facts.get("format")
        if found != FORMAT:
            raise ValueError(f"{folder} has format {found}, this version reads {FORMAT}")
        described = facts["arrays"]
        if unknown := set(described) - NAMES:
            raise _Damaged(f"{DESCRIPTION} names arrays that no domain has: {sorted(unknown)}")
        if mmap == "auto":
            mmap = sum(array["bytes"] for array in described.values()) >= MAPPED
        arrays = {name: _load_array(folder, name, array, mmap, verify) for name, array in described.items()}
        vocabularies = [
            Vocabulary.from_arrays(
                {key.removeprefix(role): value for key, value in arrays.items() if key.startswith(role)}, distinct=True
            )
            for role in ("users.", "items.")
        ]
        sequences = Sequences(arrays["offsets"], arrays["items"], facts["num_items"], arrays.get("times"))
        domain = Domain(
            facts["name"], sequences, *vocabularies, report=_report(facts["source"]), ordered_by=_ordered_by(facts)
        )
        _check(domain)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {DESCRIPTION}: {type(error).__name__}: {error}") from error
    except _Damaged as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return domain


class _Damaged(Exception):
    """What is wrong with a domain's folder."""


def _load_array(folder: Path, name: str, described: Mapping[str, Any], mmap: bool, verify: bool) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        size = path.stat().st_size
        if size != described["bytes"]:
            raise _Damaged(f"{path.name} has {size} bytes, expected {described['bytes']}")
        array = np.load(path, mmap_mode="r" if mmap and described["length"] else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _Damaged(f"{path.name}: {error}") from error
    if array.ndim != 1 or array.dtype.str != described["dtype"] or len(array) != described["length"]:
        raise _Damaged(
            f"{path.name} holds {array.dtype.str} {array.shape}, expected {described['dtype']} ({described['length']},)"
        )
    if verify:
        digest = hashlib.sha256()
        for first in range(0, len(array), 1 << 20):
            digest.update(array[first : first + (1 << 20)].tobytes())
        if digest.hexdigest() != described["sha256"]:
            raise _Damaged(f"{path.name} has another checksum than when it was written")
    return array


def _check(domain: Domain) -> None:
    """Arrays fit each other, as far as their ends tell."""
    s = domain.sequences
    for name, kinds in CORE.items():
        array = getattr(s, name)
        if array is not None and array.dtype.name not in kinds:
            raise _Damaged(f"{name} must be {' or '.join(kinds)}, got {array.dtype.name}")
    if not len(s.offsets) or s.offsets[0] != 0 or s.offsets[-1] != len(s.items):
        raise _Damaged(f"offsets must rise from 0 to {len(s.items)}")
    if s.times is not None and len(s.times) != len(s.items):
        raise _Damaged(f"{len(s.times)} times for {len(s.items)} items")
    if len(domain.users) != len(s) or len(domain.items) != s.num_items:
        raise _Damaged(
            f"{len(domain.users)} user ids for {len(s)} users, {len(domain.items)} item ids for {s.num_items} items"
        )


def _ordered_by(facts: Mapping[str, Any]) -> str | None:
    column = facts.get("ordered_by")  # absent in what earlier versions wrote
    if column is not None and not isinstance(column, str):
        raise _Damaged(f"{DESCRIPTION}: ordered_by must be the name of a column or null, got {column!r}")
    return column


def _report(source: Mapping[str, Any] | None) -> ReadReport | None:
    if source is None:
        return None
    examples = tuple((line, reason) for line, reason in source["examples"])
    return ReadReport(**{**source, "examples": examples, "notes": tuple(source["notes"])})


@contextmanager
def replacing(folder: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside ``folder`` that takes its name when the block ends well, and is gone when it does not.

    Raises ValueError, before anything is written, for a folder that holds something: a domain unless ``overwrite``,
    and anything else always. A write that fails raises OSError with the folder's name.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file, expected a folder")
        if is_domain(folder):
            if not overwrite:
                raise ValueError(f"{folder} holds a domain already; --overwrite (overwrite=True) replaces it")
        elif any(folder.iterdir()):
            raise ValueError(f"{folder} holds files but no domain; give an empty or a new folder")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        name = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
        name.mkdir()
        partial = name
        yield partial
        _sync(partial)
        _take_place(partial, folder)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, f"{error.strerror or error}; nothing is left there", str(folder)) from error
        raise


def _take_place(partial: Path, folder: Path) -> None:
    if is_domain(folder):
        old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
        os.rename(folder, old)
        try:
            os.rename(partial, folder)
        except BaseException:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, folder)  # an empty folder gives way
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Names of files in ``folder`` reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DomainWriter:
    """The files of a domain, the description last."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._arrays: dict[str, dict[str, Any]] = {}

    def array(self, name: str, dtype: np.dtype) -> ArrayFile:
        """An array to append to; it counts once it is closed without an error."""
        return ArrayFile(self._folder / f"{name}.npy", np.dtype(dtype), self._arrays)

    def write(self, name: str, values: np.ndarray) -> None:
        with self.array(name, values.dtype) as file:
            for first in range(0, len(values), 1 << 20):
                file.append(values[first : first + (1 << 20)])

    def finish(
        self,
        name: str,
        users: Vocabulary,
        items: Vocabulary,
        report: ReadReport | None,
        *,
        num_items: int,
        ordered_by: str | None,
    ) -> None:
        for role, vocabulary in (("users", users), ("items", items)):
            for key, values in vocabulary.to_arrays().items():
                self.write(f"{role}.{key}", values)
        facts = {
            "format": FORMAT,
            "name": name,
            "num_users": len(users),
            "num_items": num_items,
            "ordered_by": ordered_by,
            "num_interactions": self._arrays["items"]["length"],
            "arrays": self._arrays,
            "source": None if report is None else asdict(report),
        }
        with open(self._folder / DESCRIPTION, "w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2)
            file.flush()
            os.fsync(file.fileno())


class ArrayFile:
    """A one-dimensional .npy file that grows; its header, of a fixed length, is completed at the end."""

    def __init__(self, path: Path, dtype: np.dtype, described: dict[str, dict[str, Any]]):
        self._path, self._dtype, self._described = path, dtype, described
        self._length = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> ArrayFile:
        self._file = open(self._path, "wb", buffering=0)
        self._write_header()
        return self

    def append(self, values: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(values, self._dtype)).cast("B")
        self._length += len(values)
        self._digest.update(data)
        write_all(self._file, data)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._file as file:
            if error is not None:
                return
            end = file.tell()
            file.seek(0)
            self._write_header()
            os.fsync(file.fileno())
        self._described[self._path.stem] = {
            "dtype": self._dtype.str,
            "length": self._length,
            "bytes": end,
            "sha256": self._digest.hexdigest(),
        }

    def _write_header(self) -> None:
        npy.write_array_header_1_0(
            self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        )


def write_all(file: Any, data: memoryview) -> None:
    """An unbuffered file takes as much of a write as fits."""
    while len(data):
        data = data[file.write(data) :]
