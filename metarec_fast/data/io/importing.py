"""Files of interactions that are larger than memory -> the folder of a domain, in one pass."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from metarec_fast.checks import check_flag
from metarec_fast.data.csr import offsets as csr_offsets
from metarec_fast.data.domain import Domain, ReadReport
from metarec_fast.data.io.columns import Columns
from metarec_fast.data.io.folder import DOMAIN, ArrayFile, DomainWriter, load_domain
from metarec_fast.data.io.formats import split_suffix, tables
from metarec_fast.data.io.grouping import Duplicates, group, stable_argsort
from metarec_fast.data.io.numbering import Numbering
from metarec_fast.data.io.read import check_choices, lookalikes, tied_share, warn
from metarec_fast.data.io.rows import TimeCount, Usable, nothing_usable, rejection, usable
from metarec_fast.data.io.tables import QuotesMislead, Rejects, Table
from metarec_fast.files import replacing, write_all

PIECE = 8 << 20  # bytes of text read at a time; larger pieces outgrow the cache
PIECE_COST = 24  # bytes of memory at work for a byte of a piece
EVENT_COST = 96  # bytes of memory at work for an event that is sorted
PART = 1 << 21  # events sorted at a time, at most; more outgrow the cache too
LEAST_MEMORY = 4 << 20
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Progress:
    """How far an import is. share: of the file while "reading", of the events while "grouping"; None if unknown."""

    stage: Literal["reading", "grouping"]
    rows: int
    share: float | None


def import_file(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    name: str | None = None,
    format: Literal["inter", "csv", "tsv", "jsonl", "parquet"] | None = None,
    separator: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    duplicates: Duplicates = "keep",
    memory: int | str = "1GB",
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Domain:
    """Write the domain that ``read`` gives for a file into ``folder``, whatever the file's size; return it mapped.

    user to duplicates: as in ``read``, and so are the rules for rows, ids, order and times.
    memory: bytes, or "500MB", "2GB", "1GiB", for what is at work on rows, at least 4 MiB. Beside it there are the ids
        (an integer takes 40 to 90 bytes, a string 60 to 120 and twice its length), the largest user's events
        (96 bytes each), and a row group of a Parquet file.
    overwrite: replace the domain that ``folder`` may hold, which stays whole until the new one is. A folder that holds
        anything else is never touched.
    progress: called now and then.

    Disk: beside the result (12 bytes an event with times, 4 without), 32 bytes an event while at work (16 where one
    part fits in memory), without times half; in a hidden folder beside ``folder`` that is gone when this returns or
    raises. ``folder`` comes into being whole, at the end.

    The file is read once, so it may be a pipe (then with ``format``), with two exceptions where what comes late tells
    that what came early was misread, and a file is read again: times that look like numbers in the first piece and
    are mostly dates in all, or the other way round; and a misplaced quote after a line break within quotes.

    With on_error="raise" the import stops at the first piece with a bad row, and names those of that piece.

    Raises ValueError as ``read`` does, and for a ``folder`` that is not empty; OSError where it cannot be written.
    """
    from metarec_fast.data.io.polars_errors import failures_of

    check_choices(on_error, duplicates)
    check_flag(overwrite, "overwrite")
    budget = _bytes(memory)
    path = Path(path)
    stem, format = split_suffix(path, format)
    os.stat(path)  # before anything is made
    source = _Source(path, format, {"user": user, "item": item, "time": time}, separator, on_error, budget)
    with replacing(folder, DOMAIN, overwrite=overwrite) as partial:
        scratch = partial / "scratch"
        scratch.mkdir()
        with failures_of(path):
            log = source.spill(scratch, progress)
        if not log.num_events:
            raise ValueError(nothing_usable(path, log.unit, log.rejects.count, log.rejects))
        writer = DomainWriter(partial)
        counts = _write_sequences(writer, log, scratch, duplicates, min(budget // EVENT_COST, PART), progress)
        shutil.rmtree(scratch)
        users, items = log.users.vocabulary(), log.items.vocabulary()
        notes = log.columns.notes()
        report = ReadReport(
            path=str(path),
            rows=log.num_events + log.rejects.count,
            rejected=log.rejects.count,
            examples=log.rejects.first(),
            duplicates=counts.duplicates,
            dropped=log.num_events - counts.kept,
            tied=tied_share(counts.tied, counts.neighbours) if log.timed else None,
            notes=notes + lookalikes("user", users) + lookalikes("item", items),
            columns=log.columns.chosen,
            unit=log.unit,
        )
        writer.finish(
            stem if name is None else name,
            users,
            items,
            report,
            num_items=len(items),
            ordered_by=report.columns.get("time"),
        )
    warn(path, notes)
    return load_domain(folder, mmap=True)


def _bytes(memory: int | str) -> int:
    size = memory
    if isinstance(memory, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]?I?B?)", memory.strip().upper())
        size = int(float(match[1]) * UNITS[match[2]]) if match and match[2] in UNITS else -1
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST_MEMORY:
        raise ValueError(f"memory must be bytes or as '500MB', and at least {LEAST_MEMORY >> 20} MiB, got {memory!r}")
    return size


# The file -> events in its order, on disk


class _Log:
    """Events in the order of the file: three columns on disk, and what is known of them all."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.users, self.items = Numbering(), Numbering()
        self.counts = np.zeros(0, np.int64)  # events of each user, and room for more
        self.rejects = Rejects()
        self.columns: Columns | None = None  # of the file, once a table is read
        self.unit = "line"
        self.num_events = 0
        self.time_dtype: np.dtype | None = None  # int64, or float64 once one piece has fractions
        self._pieces: list[tuple[int, np.dtype | None]] = []  # events and dtype of times

    @property
    def timed(self) -> bool:
        return self.time_dtype is not None

    def __enter__(self) -> _Log:
        columns = ("users", "items", "times")
        self._files = [open(self._folder / column, "wb", buffering=0) for column in columns]  # noqa: SIM115
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def add(self, users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> None:
        if len(self.users) > len(self.counts):
            self.counts = np.concatenate([self.counts, np.zeros(len(self.users), np.int64)])
        np.add.at(self.counts, users, 1)
        self.num_events += len(users)
        dtype = None if times is None else times.dtype
        self.time_dtype = dtype if self.time_dtype is None else np.promote_types(self.time_dtype, dtype)
        self._pieces.append((len(users), dtype))
        for file, values in zip(self._files, (users, items, times), strict=True):
            if values is not None:
                write_all(file, memoryview(np.ascontiguousarray(values)).cast("B"))

    def blocks(self, events: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """The events again, about so many at a time."""
        with (
            open(self._folder / "users", "rb") as users,
            open(self._folder / "items", "rb") as items,
            open(self._folder / "times", "rb") as times,
        ):
            block, size = [], 0
            for i, (count, dtype) in enumerate(self._pieces):
                when = None if dtype is None else np.fromfile(times, dtype, count).astype(self.time_dtype, copy=False)
                block.append((np.fromfile(users, np.int32, count), np.fromfile(items, np.int32, count), when))
                size += count
                if size >= events or i == len(self._pieces) - 1:
                    yield tuple(None if c[0] is None else np.concatenate(c) for c in zip(*block, strict=True))
                    block, size = [], 0

    def remove(self) -> None:
        for column in ("users", "items", "times"):
            (self._folder / column).unlink()


@dataclass(frozen=True)
class _Source:
    path: Path
    format: str
    wanted: dict[str, str | None]
    separator: str | None
    on_error: str
    memory: int

    def spill(self, scratch: Path, progress: Callable[[Progress], None] | None) -> _Log:
        """The usable events of the file, numbered and on disk."""
        by_line, dates = False, None
        while True:
            log, times = _Log(scratch), TimeCount()
            try:
                with log:
                    for table in self._tables(scratch, by_line):
                        good = usable(table, dates=dates)
                        times.add(good.counts)
                        if dates is None and times.rows:
                            dates = times.are_dates
                        self._add(log, table, good)
                        if progress is not None:
                            progress(Progress("reading", log.num_events + log.rejects.count, self._share(table)))
            except QuotesMislead:
                by_line = True
                self._check_rereadable("a quote is misplaced after a line break within quotes")
                continue
            if dates is None or dates == times.are_dates:
                return log
            dates = not dates
            self._check_rereadable("most times are " + ("dates" if dates else "no dates") + ", unlike the first ones")

    def _tables(self, scratch: Path, by_line: bool) -> Iterator[Table]:
        size = min(PIECE, max(self.memory // PIECE_COST, 1))
        return tables(self.path, self.format, self.wanted, self.separator, size=size, by_line=by_line, scratch=scratch)

    def _add(self, log: _Log, table: Table, good: Usable) -> None:
        log.columns, log.unit = table.columns, table.unit
        log.rejects.extend(table.rejects)
        if log.rejects.count and self.on_error == "raise":
            among = " among those read so far"
            raise ValueError(rejection(self.path, table.unit, log.rejects, among=among))
        users = log.users.add(good.users, text="user" in table.text)
        items = log.items.add(good.items, text="item" in table.text)
        log.add(users, items, good.times)

    def _share(self, table: Table) -> float | None:
        if table.total is not None:
            return table.read / max(table.total, 1)
        size = os.stat(self.path).st_size
        return min(table.read / size, 1.0) if size else None

    def _check_rereadable(self, reason: str) -> None:
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ValueError(f"{self.path}: {reason}: this cannot be read again, so put it in a file")


# Events in the order of the file -> sequences


@dataclass
class _Counts:
    kept: int = 0
    duplicates: int = 0
    tied: int = 0
    neighbours: int = 0


def _write_sequences(
    writer: DomainWriter,
    log: _Log,
    scratch: Path,
    duplicates: Duplicates,
    most: int,
    progress: Callable[[Progress], None] | None,
) -> _Counts:
    """Offsets, items and times from the log, about ``most`` events in memory at a time; the log is gone then."""
    counts = _Counts()
    expected = log.counts[: len(log.users)]
    lengths = expected.copy()
    with writer.array("items", np.int32) as items, _times_file(writer, log) as times:
        for first, part in _parts(log, scratch, csr_offsets(expected), most):
            grouped = group(*part, duplicates)
            items.append(grouped.items)
            if times is not None:
                times.append(grouped.times)
            if duplicates != "keep" and len(grouped.users):
                kept = np.bincount(grouped.users - first)
                lengths[first : first + len(kept)] = kept
            counts.kept += len(grouped.items)
            counts.duplicates += grouped.duplicates
            counts.tied += grouped.tied
            counts.neighbours += grouped.neighbours
            if progress is not None:
                progress(Progress("grouping", counts.kept, counts.kept / max(log.num_events, 1)))
    writer.write("offsets", csr_offsets(lengths))
    return counts


def _times_file(writer: DomainWriter, log: _Log) -> AbstractContextManager[ArrayFile | None]:
    return writer.array("times", log.time_dtype) if log.timed else nullcontext()


def _parts(
    log: _Log, scratch: Path, offsets: np.ndarray, most: int
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]]]:
    """(first user, events of that user and the next ones, in the order of the file); about ``most`` events at a time.

    offsets: int64 [U+1], of each user's events among those sorted by user.
    """
    bounds = _bounds(offsets, most)
    if len(bounds) == 2:
        for block in log.blocks(log.num_events):
            yield 0, block
        log.remove()
        return
    columns = {"users": np.dtype(np.int32), "items": np.dtype(np.int32)}
    if log.timed:
        columns["times"] = log.time_dtype
    with ExitStack() as stack:
        files = [stack.enter_context(open(scratch / f"{name}.parts", "w+b", buffering=0)) for name in columns]
        _scatter(log, files, bounds, offsets, most)
        log.remove()
        for first, last in itertools.pairwise(bounds.tolist()):
            count = int(offsets[last] - offsets[first])
            part: list[np.ndarray | None] = []
            for file, dtype in zip(files, columns.values(), strict=True):
                file.seek(int(offsets[first]) * dtype.itemsize)
                part.append(np.fromfile(file, dtype, count))
            yield first, (part[0], part[1], part[2] if log.timed else None)
    for name in columns:
        (scratch / f"{name}.parts").unlink()


def _bounds(offsets: np.ndarray, most: int) -> np.ndarray:
    """Users at which parts begin, and their number: each part has at most ``most`` events, or a single user."""
    num_users = len(offsets) - 1
    bounds = [0]
    while bounds[-1] < num_users:
        end = int(np.searchsorted(offsets, offsets[bounds[-1]] + most, side="right")) - 1
        bounds.append(max(end, bounds[-1] + 1))
    return np.array(bounds if num_users else [0, 0])


def _scatter(log: _Log, files: list[BinaryIO], bounds: np.ndarray, offsets: np.ndarray, most: int) -> None:
    """Write each part's events to its place in the files, in the order of the log."""
    parts = len(bounds) - 1
    part_of = np.repeat(np.arange(parts, dtype=np.int32), np.diff(bounds))  # user -> part
    place = offsets[bounds[:-1]].copy()  # where the next event of each part goes
    for block in log.blocks(most):
        part = part_of[block[0]]
        order = stable_argsort(part)
        columns = [values[order] for values in block if values is not None]
        ends = np.cumsum(np.bincount(part, minlength=parts))
        for p in np.flatnonzero(np.diff(ends, prepend=0)).tolist():
            begin, end = int(ends[p - 1]) if p else 0, int(ends[p])
            for file, values in zip(files, columns, strict=True):
                file.seek(int(place[p]) * values.itemsize)
                write_all(file, memoryview(values[begin:end]).cast("B"))
            place[p] += end - begin
