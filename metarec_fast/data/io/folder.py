"""A domain as a folder: NumPy arrays that can be memory-mapped, and a description that says they are whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from metarec_fast.checks import check_flag
from metarec_fast.data.domain import Domain, ReadReport, Sequences
from metarec_fast.data.vocabulary import Vocabulary
from metarec_fast.files import (
    COUNT,
    FINITE,
    LIST,
    OBJECT,
    SHA256,
    TEXT,
    Damaged,
    Field,
    Kind,
    check_fields,
    check_format,
    check_seal,
    inside,
    read_json,
    replacing,
    sealed,
    write_all,
    write_atomically,
)

FORMAT = 3
DESCRIPTION = "domain.json"
SUFFIXES = (".inter", ".csv", ".tsv", ".jsonl", ".parquet")
MAPPED = 1 << 28  # bytes of arrays from which on they are mapped rather than read
CORE = {"offsets": ("int64",), "items": ("int32", "int64"), "times": ("int64", "float64")}
NAMES = {*CORE, *(f"{role}.{key}" for role in ("users", "items") for key in ("integers", "utf8", "offsets"))}


def _described(folder: Path) -> str:
    try:
        manifest = read_json(folder, DESCRIPTION)
        return f"{manifest['name']!r} of {manifest['num_users']:,} users and {manifest['num_items']:,} items"
    except (ValueError, KeyError, TypeError):
        return "its description cannot be read"


DOMAIN = Kind(
    "domain",
    DESCRIPTION,
    owns=lambda name: name == DESCRIPTION or (name.endswith(".npy") and name[:-4] in NAMES),
    describe=_described,
)


def is_domain(folder: str | Path) -> bool:
    """Whether ``save_domain`` or ``import_file`` has finished a domain in ``folder``."""
    return DOMAIN.is_in(folder)


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


def save_domain(domain: Domain, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write ``domain`` into ``folder``: whole, or not at all.

    overwrite: replace the domain that ``folder`` may hold, which stays whole until the new one is. Files in it that
        are no domain's stay.
    The domain's report stays behind: it names the file that the domain was read from, and rows of it.

    Raises ValueError for a folder that holds a domain already, or anything else; OSError where it cannot be written.
    """
    check_flag(overwrite, "overwrite")
    with replacing(folder, DOMAIN, overwrite=overwrite) as partial:
        write_domain(domain, partial)


def write_domain(domain: Domain, folder: Path) -> None:
    """The files of ``save_domain`` in a folder that is empty."""
    writer = DomainWriter(folder)
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


def load_domain(
    folder: str | Path, *, mmap: bool | Literal["auto"] = "auto", verify: bool | Literal["auto"] = "auto"
) -> Domain:
    """Read what ``save_domain`` or ``import_file`` wrote.

    mmap: leave the arrays on disk, mapped read-only, rather than read them; "auto" does so from 256 MiB on. Ids that
        are strings are then decoded as they are asked for; only a look-up by id reads all of them.
    verify: read every byte and compare checksums; "auto" does so where arrays are read and not mapped. Without it,
        files that are missing, cut short or of another type than described are found, offsets that fall and items
        outside the catalogue, but not every changed byte.

    Raises ValueError, naming file and field, if the folder is incomplete, damaged or of another format.
    """
    folder = Path(folder)
    if not is_domain(folder):
        raise ValueError(f"{folder} holds no whole domain: {DESCRIPTION} is missing")
    try:
        manifest = read_json(folder, DESCRIPTION)
        check_format(manifest, FORMAT, str(folder), older="import or save the domain again")
        check_fields(manifest, FIELDS, DESCRIPTION)
        described = manifest["arrays"]
        if unknown := set(described) - NAMES:
            raise Damaged(f"{DESCRIPTION} names arrays that no domain has: {sorted(unknown)}")
        for name, array in described.items():
            check_fields(array, ARRAY_FIELDS, f"{DESCRIPTION}: array {name!r}")
        report = _report(manifest["source"])
        if missing := {"offsets", "items"} - set(described):
            raise Damaged(f"{DESCRIPTION} has no array {missing.pop()!r}")
        check_seal(manifest, DESCRIPTION)
        if mmap == "auto":
            mmap = sum(array["bytes"] for array in described.values()) >= MAPPED
        if verify == "auto":
            verify = not mmap
        arrays = {name: _load_array(folder, name, array, mmap, verify) for name, array in described.items()}
        users, items = (_vocabulary(role, arrays) for role in ("users", "items"))
        sequences = Sequences(arrays["offsets"], arrays["items"], manifest["num_items"], arrays.get("times"))
        domain = Domain(manifest["name"], sequences, users, items, report=report, ordered_by=manifest["ordered_by"])
        _check(domain, manifest)
    except Damaged as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return domain


NAME = Field("a string", lambda v: isinstance(v, str))  # of a file or a column: need not be Unicode
FIELDS = {
    "format": COUNT,
    "name": TEXT,
    "num_users": COUNT,
    "num_items": COUNT,
    "num_interactions": COUNT,
    "ordered_by": Field("the name of a column or null", lambda v: v is None or NAME.fits(v)),
    "arrays": OBJECT,
    "source": Field("an object or null", lambda v: v is None or isinstance(v, dict)),
    "checksum": SHA256,
}
ARRAY_FIELDS = {"dtype": TEXT, "length": COUNT, "bytes": COUNT, "sha256": SHA256}
SOURCE_FIELDS = {
    "path": NAME,
    "rows": COUNT,
    "rejected": COUNT,
    "examples": Field(
        "a list of lines with their reasons",
        lambda v: (
            LIST.fits(v)
            and all(LIST.fits(one) and len(one) == 2 and COUNT.fits(one[0]) and TEXT.fits(one[1]) for one in v)
        ),
    ),
    "duplicates": COUNT,
    "dropped": COUNT,
    "tied": Field("a share or null", lambda v: v is None or (FINITE.fits(v) and 0 <= v <= 1)),
    "notes": Field("a list of strings", lambda v: LIST.fits(v) and all(map(TEXT.fits, v))),
    "columns": Field("strings by role", lambda v: OBJECT.fits(v) and all(map(NAME.fits, v.values()))),
    "unit": TEXT,
}


def _report(source: Mapping[str, Any] | None) -> ReadReport | None:
    if source is None:
        return None
    check_fields(source, SOURCE_FIELDS, f"{DESCRIPTION}: 'source'")
    examples = tuple((line, reason) for line, reason in source["examples"])
    return ReadReport(**{**source, "examples": examples, "notes": tuple(source["notes"])})


def _load_array(folder: Path, name: str, described: Mapping[str, Any], mmap: bool, verify: bool) -> np.ndarray:
    file_name, length = f"{name}.npy", described["length"]
    path = inside(folder, file_name)
    size = path.stat().st_size
    if size != described["bytes"]:
        raise Damaged(f"{file_name} has {size} bytes, expected {described['bytes']}")
    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
        except Exception as error:  # NumPy parses it as Python, and lets through what that raises
            raise Damaged(f"{file_name} has no header of a NumPy array: {error}") from error
        if version != (1, 0) or shape != (length,) or dtype.hasobject or dtype.str != described["dtype"]:
            raise Damaged(f"{file_name} holds {dtype.str} {shape}, expected {described['dtype']} ({length},)")
        begin = file.tell()
        if size != begin + length * dtype.itemsize:
            raise Damaged(f"{file_name} has {size} bytes, expected {begin + length * dtype.itemsize}")
        if mmap and length:
            array = np.memmap(path, dtype, "r", begin, shape)
        else:
            array = np.fromfile(file, dtype, length)
    if verify:
        digest = hashlib.sha256()
        for block in _blocks(array):
            digest.update(np.ascontiguousarray(block))
        if digest.hexdigest() != described["sha256"]:
            raise Damaged(f"{file_name} has another checksum than when it was written")
    return array


def _blocks(array: np.ndarray, *, overlap: int = 0) -> Iterator[np.ndarray]:
    """An array piece by piece, each with the first ``overlap`` values of the next."""
    for first in range(0, len(array), 1 << 20):
        yield array[first : first + (1 << 20) + overlap]


def _vocabulary(role: str, arrays: Mapping[str, np.ndarray]) -> Vocabulary:
    own = {name.removeprefix(f"{role}."): values for name, values in arrays.items() if name.startswith(f"{role}.")}
    try:
        return Vocabulary.from_arrays(own, distinct=True)
    except ValueError as error:
        raise Damaged(f"ids of {role}: {error}") from error


def _check(domain: Domain, manifest: Mapping[str, Any]) -> None:
    """Arrays fit each other and the description."""
    s = domain.sequences
    for name, kinds in CORE.items():
        array = getattr(s, name)
        if array is not None and array.dtype.name not in kinds:
            raise Damaged(f"{name} must be {' or '.join(kinds)}, got {array.dtype.name}")
    decreasing = any((block[1:] < block[:-1]).any() for block in _blocks(s.offsets, overlap=1))
    if not len(s.offsets) or s.offsets[0] != 0 or s.offsets[-1] != len(s.items) or decreasing:
        raise Damaged(f"offsets must rise from 0 to {len(s.items)}")
    for block in _blocks(s.items):
        if block.min() < 0 or block.max() >= s.num_items:
            raise Damaged(f"items must be in [0, {s.num_items}), got {block.min()} to {block.max()}")
    if s.times is not None and len(s.times) != len(s.items):
        raise Damaged(f"{len(s.times)} times for {len(s.items)} items")
    if len(domain.users) != len(s) or len(domain.items) != s.num_items:
        raise Damaged(
            f"{len(domain.users)} user ids for {len(s)} users, {len(domain.items)} item ids for {s.num_items} items"
        )
    for name in ("num_users", "num_interactions"):
        if manifest[name] != getattr(domain, name):
            raise Damaged(f"{DESCRIPTION}: {name!r} is {manifest[name]}, the arrays have {getattr(domain, name)}")


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
        manifest = {
            "format": FORMAT,
            "name": name,
            "num_users": len(users),
            "num_items": num_items,
            "ordered_by": ordered_by,
            "num_interactions": self._arrays["items"]["length"],
            "arrays": self._arrays,
            "source": None if report is None else asdict(report),
        }
        write_atomically(self._folder / DESCRIPTION, sealed(manifest))


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
