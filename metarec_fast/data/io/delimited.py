"""Text with a separator -> tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from metarec_fast.data.io.columns import SAMPLE, Columns
from metarec_fast.data.io.pieces import LONGEST, Piece
from metarec_fast.data.io.tables import QuotesMislead, Rejects, Table

NEWLINE, QUOTE, CARRIAGE_RETURN = b'\n"\r'
DIGIT = np.isin(np.arange(256), list(b"0123456789"))  # of a byte
TEXT = frozenset(("user", "item"))


class Delimited:
    """Pieces of a text with a separator -> tables. The first piece begins with the header."""

    def __init__(
        self, path: Path, wanted: dict[str, str | None], separator: str | None, quoted: bool, tab: bool, by_line: bool
    ):
        if separator is not None and (len(separator.encode()) != 1 or separator in '\n\r"'):
            raise ValueError(f"separator must be one ASCII character, got {separator!r}")
        self._path, self._wanted, self._separator = path, wanted, "\t" if tab and separator is None else separator
        self._quoted = quoted
        self._by_line = by_line
        self._breaks_in_quotes = False  # in a table given so far
        self._header: list[str] | None = None
        self._columns: Columns | None = None
        self._names: dict[str, str] = {}  # role -> our name of its column

    def record_end(self, data: bytes) -> int:
        """After the last line break that is not within quotes. ``data`` begins with a record."""
        end = data.rfind(b"\n")
        if not self._quoted or self._by_line:
            return end + 1
        quotes = data.count(b'"', 0, end + 1)
        while end >= 0 and quotes % 2:
            before = data.rfind(b"\n", 0, end)
            quotes -= data.count(b'"', before + 1, end)
            end = before
        if end < 0 and len(data) > LONGEST:  # a quote that was never closed
            self._read_by_line()
            return data.rfind(b"\n") + 1
        return end + 1

    def _read_by_line(self) -> None:
        if self._breaks_in_quotes:
            raise QuotesMislead
        self._by_line = True

    def table(self, piece: Piece) -> Table:
        data = piece.data if piece.data.endswith(b"\n") else piece.data.removesuffix(b"\r")
        headed = self._header is None
        if headed:
            self._read_header(data[: self._header_end(data)])
        table = self._regular(data, piece.line, headed)
        if table is None:
            table = self._any(data, piece.line, headed)
        table.read, table.columns = piece.read, self._columns
        return table

    def _header_end(self, data: bytes) -> int:
        """Where the first line break outside quotes is; the first of all where quotes tell none."""
        first = end = data.find(b"\n")
        begin, inside = 0, False
        while end >= 0:
            inside ^= bool(data.count(b'"', begin, end) % 2)
            if not inside or not self._quoted or self._by_line:
                return end
            begin, end = end, data.find(b"\n", end + 1)
        return first if first >= 0 else len(data)

    def _read_header(self, line: bytes) -> None:
        if self._separator is None:
            self._separator = max(",\t;", key=lambda s: line.count(s.encode()))
        try:
            header = line.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self._path}:1: the header is not UTF-8") from None
        self._header = self._fields(header, 1)
        self._columns = Columns(self._path, self._header, self._wanted)
        self._names = {role: f"f{self._header.index(column)}" for role, column in self._columns.chosen.items()}

    def _fields(self, record: str, line: int) -> list[str]:
        if not self._quoted or '"' not in record:
            return record.split(self._separator)
        try:
            return next(csv.reader(io.StringIO(record, newline=""), delimiter=self._separator), [])
        except csv.Error as error:
            raise ValueError(f"{self._path}:{line}: {error}") from None

    def _look(self, records: Iterator[tuple[bytes, int]]) -> None:
        """Show columns that are not used the first records, without line ends, and their lines."""
        at = [self._header.index(name) for name in self._columns.unused]
        while self._columns.wants_rows and (record := next(records, None)) is not None:
            fields = self._fields(record[0].decode(), record[1])
            self._columns.look([[fields[i] for i in at]])

    def _regular(self, data: bytes, line: int, headed: bool) -> Table | None:
        """The table of rows among which none can be bad for its form; None where that takes a closer look."""
        if (self._quoted and b'"' in data) or b"\r" in data or not _is_utf8(data):
            return None
        if headed:
            data, line = data[data.find(b"\n") + 1 :] if b"\n" in data else b"", line + 1
        buffer = np.frombuffer(data if data.endswith(b"\n") or not data else data + b"\n", np.uint8)
        ends = np.flatnonzero((buffer == ord(self._separator)) | (buffer == NEWLINE))
        width = len(self._header)
        if len(ends) % width:
            return None
        ends = ends.reshape(-1, width)
        breaks = buffer[ends] == NEWLINE
        if not breaks[:, -1].all() or breaks[:, :-1].any():
            return None
        integers = []
        for name in self._names.values():
            c = int(name[1:])
            starts = np.concatenate([[0], ends[:-1, -1] + 1])[: len(ends)] if c == 0 else ends[:, c - 1] + 1
            if _look_decimal(buffer, starts, ends[:, c]):
                integers.append(name)
        frame = self._parse(data, integers)
        if len(frame) != len(ends):
            return None
        if self._columns.wants_rows:
            first = data.split(b"\n", SAMPLE)[: min(SAMPLE, len(ends))]
            self._look((record, line + i) for i, record in enumerate(first))
        return Table(frame, np.arange(line, line + len(ends)), unit="line", text=TEXT)

    def _any(self, data: bytes, line: int, headed: bool) -> Table:
        """The table of any rows."""
        rejects = Rejects()
        records = _Records(data, ord(self._separator), self._quoted and b'"' in data, self._by_line)
        if records.by_line and not self._by_line:
            self._read_by_line()
        self._breaks_in_quotes |= records.breaks_in_quotes
        lines = records.lines + (line - 1)
        body = np.flatnonzero(records.ends > records.starts)  # blank lines are no rows
        body = body[body > 0] if headed else body
        bad = np.zeros(len(records.ends), bool)

        def reject(which: np.ndarray, reason: str | Callable[[int], str]) -> None:
            fresh = body[which[body] & ~bad[body]]
            rejects.add(lines[fresh], reason if isinstance(reason, str) else lambda i: reason(fresh[i]))
            bad[fresh] = True

        width = len(self._header)
        reject(records.misquoted, "misplaced quote")
        if b"\r" in data:
            stray = (records.buffer == CARRIAGE_RETURN) & records.outside
            reject(records.count(stray) > 0, "carriage return in the row")
        reject(records.fields != width, lambda r: f"expected {width} fields, got {records.fields[r]}")
        if not data.isascii():
            reject(records.not_utf8(), "not UTF-8")

        good = body[~bad[body]]
        frame = self._parse(records.bytes_of(good), [])
        if len(frame) != len(good):
            raise ValueError(f"{self._path}: {len(good)} rows were expected and {len(frame)} parsed")
        if self._columns.wants_rows:
            self._look((data[records.starts[r] : records.ends[r]], int(lines[r])) for r in good[:SAMPLE].tolist())
        return Table(frame, lines[good], unit="line", text=TEXT, rejects=rejects)

    def _parse(self, body: bytes, integers: list[str]) -> pl.DataFrame:
        """Our columns of good rows: strings, but integers where all of those named are."""
        # Our own header: the file's may repeat a name, and what polars names columns without one has changed.
        own = self._separator.join(f"f{i}" for i in range(len(self._header))).encode() + b"\n"
        names = list(self._names.values())
        kinds = dict.fromkeys(names, pl.String) | dict.fromkeys(integers, pl.Int64)
        try:
            frame = pl.read_csv(
                io.BytesIO(own + body),
                separator=self._separator,
                quote_char='"' if self._quoted and b'"' in body else None,
                columns=names,
                schema_overrides=kinds,
            )
        except pl.exceptions.PolarsError:
            if not integers:
                raise
            return self._parse(body, [])
        return frame.select(pl.col(name).alias(role) for role, name in self._names.items())


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _look_decimal(buffer: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Every field from a start to an end is the canonical decimal of an integer, if it is one of an integer at all."""
    if not DIGIT[buffer[starts[:SAMPLE]]].all():
        return False
    first, length = buffer[starts], ends - starts
    fine = DIGIT[first] & DIGIT[buffer[ends - 1]] & (length > 0)
    fine &= (first != ord("0")) | (length == 1)
    return bool(fine.all())


class _Records:
    """Where the records of a text lie; record r is ``buffer[starts[r]:ends[r]]``, and record 0 the header.

    A line break within quotes does not end a record. Where a quote of the text is misplaced, quotes no longer tell
    what a line break is: then every line is a record, and those with misplaced quotes are `misquoted`. So it is also
    if `by_line` says so.
    """

    def __init__(self, data: bytes, separator: int, quoted: bool, by_line: bool):
        self._data = data
        self.buffer = np.frombuffer(data, np.uint8)
        newlines = np.flatnonzero(self.buffer == NEWLINE)
        self._set_bounds(newlines)
        self.lines = np.arange(1, len(self.ends) + 1)
        self.outside: np.ndarray | bool = True  # per byte: not within quotes
        self.misquoted = np.zeros(len(self.ends), bool)
        self.by_line = by_line
        self.breaks_in_quotes = False
        if quoted:
            # The parity of quotes so far; a doubled quote leaves and enters again. uint8 wraps, which keeps parity.
            parity = np.cumsum(self.buffer == QUOTE, dtype=np.uint8) & 1
            wrong = self._misplaced(parity, separator)
            self.by_line = by_line or len(wrong) > 0 or bool(parity[-1])
            if self.by_line:
                before = np.concatenate([parity[:1] * 0, parity])[self.starts]
                parity ^= np.repeat(before, self._lengths)
                odd = parity[np.minimum(self.ends, len(data)) - 1] == 1
                self.misquoted = odd & (self.ends > self.starts)
                wrong = self._misplaced(parity, separator)
                self.misquoted[np.searchsorted(self.ends, wrong)] = True
            else:
                self._set_bounds(newlines[parity[newlines] == 0])
                self.breaks_in_quotes = len(self.ends) < len(self.lines)
                self.lines = np.searchsorted(newlines, self.starts) + 1
                self.misquoted = np.zeros(len(self.ends), bool)
            self.outside = parity == 0
        self.fields = self.count((self.buffer == separator) & self.outside) + 1

    def _set_bounds(self, ends: np.ndarray) -> None:
        size = len(self.buffer)
        if not len(ends) or ends[-1] != size - 1:
            ends = np.append(ends, size)
        self.ends = ends
        self.starts = np.concatenate([[0], ends[:-1] + 1])
        self._lengths = np.minimum(ends + 1, size) - self.starts  # with the line break

    def _misplaced(self, parity: np.ndarray, separator: int) -> np.ndarray:
        """Positions of quotes that neither open a field, nor close one, nor are doubled."""
        at = np.flatnonzero(self.buffer == QUOTE)
        edge = np.zeros(256, bool)
        edge[[separator, NEWLINE, QUOTE]] = True
        opens = parity[at] == 1
        fine_before = (at == 0) | edge[self.buffer[np.maximum(at - 1, 0)]]
        last = len(self.buffer) - 1
        fine_after = (at == last) | edge[self.buffer[np.minimum(at + 1, last)]]
        return at[np.where(opens, ~fine_before, ~fine_after)]

    def count(self, mask: np.ndarray) -> np.ndarray:
        """Bytes of each record for which the mask holds: int64 [records]."""
        return np.add.reduceat(mask.view(np.uint8), self.starts, dtype=np.int64)

    def not_utf8(self) -> np.ndarray:
        bad = np.zeros(len(self.ends), bool)
        try:
            self._data.decode()
        except UnicodeDecodeError:
            for r in np.flatnonzero(self.count(self.buffer >= 128)):
                try:
                    self._data[self.starts[r] : self.ends[r]].decode()
                except UnicodeDecodeError:
                    bad[r] = True
        return bad

    def bytes_of(self, records: np.ndarray) -> bytes:
        keep = np.zeros(len(self.ends), bool)
        keep[records] = True
        if keep[1:].all():
            return self._data if keep[0] else self._data[self._lengths[0] :]
        return self.buffer[np.repeat(keep, self._lengths)].tobytes()
