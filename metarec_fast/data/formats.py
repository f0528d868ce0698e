"""Files of interactions -> columns. Whatever the format, every row is either in the table or among the rejects."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

SUFFIXES = {
    ".inter": "inter",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
NEWLINE, QUOTE, CARRIAGE_RETURN = b'\n"\r'
LISTED = 100  # rejected rows that are kept with their reason
SAMPLE = 100  # JSON rows that are looked at for column names and types

COMMON_NAMES = {  # lower case, by preference
    "user": (
        *("user_id", "user", "userid", "uid", "reviewerid", "customer_id", "customerid"),
        *("visitor_id", "visitorid", "account_id", "session_id"),
    ),
    "item": (
        *("item_id", "item", "itemid", "iid", "sku", "parent_asin", "asin", "product_id", "productid"),
        *("movie_id", "movieid", "article_id", "book_id"),
    ),
    "time": ("timestamp", "time", "ts", "unixreviewtime", "unix_time", "event_time", "datetime", "date", "created_at"),
}


class Rejects:
    """Rows left out, with reasons: an exact count, and the first of them by line."""

    def __init__(self) -> None:
        self.count = 0
        self._listed: list[tuple[int, str]] = []

    def add(self, lines: np.ndarray, reason: str | Callable[[int], str]) -> None:
        """lines: line numbers in rising order. reason: words, or words for the i-th of the lines."""
        self.count += len(lines)
        for i, line in enumerate(lines[:LISTED].tolist()):
            self._listed.append((line, reason if isinstance(reason, str) else reason(i)))

    def first(self) -> tuple[tuple[int, str], ...]:
        return tuple(sorted(self._listed)[:LISTED])


@dataclass
class Table:
    """Columns user, item and perhaps time as the file has them; lines[i] is the line (or row) of row i, from 1."""

    frame: pl.DataFrame
    lines: np.ndarray
    typed: bool  # the format tells strings from integers
    unit: str  # what lines count
    rejects: Rejects = field(default_factory=Rejects)


def split_suffix(path: Path, format: str | None) -> tuple[str, str]:
    """(name without suffixes, format)."""
    stem = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    suffix = Path(stem).suffix.lower()
    if format is None:
        if suffix not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{path}: format must be given, or the file end in {known} (.gz may follow)")
        format = SUFFIXES[suffix]
    elif format not in SUFFIXES.values():
        raise ValueError(f"format must be one of {sorted(set(SUFFIXES.values()))}, got {format!r}")
    return (stem[: -len(suffix)] if suffix in SUFFIXES else stem), format


def load(path: Path, format: str, wanted: dict[str, str | None], separator: str | None) -> Table:
    """wanted: role (user, item, time) -> column name, or None to guess."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: not a complete gzip file: {error}") from None
    if format == "parquet":
        return _parquet(path, data, wanted)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path}: expected UTF-8, got UTF-16")
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    if not data.strip():
        raise ValueError(f"{path}: empty file; expected " + ("rows" if format == "jsonl" else "a header line"))
    if format == "jsonl":
        return _json_lines(path, data, wanted)
    return _delimited(path, data.removesuffix(b"\r"), wanted, separator, quoted=format != "inter", tab=format != "csv")


def choose_columns(path: Path, columns: list[str], wanted: dict[str, str | None]) -> dict[str, str]:
    """role -> column. A column `user_id:token` answers to `user_id` too. The time may be absent, unless named."""
    chosen: dict[str, str] = {}
    found = f"columns found: {', '.join(map(repr, columns))}"
    for role, name in wanted.items():
        if name is not None:
            matches = [c for c in columns if c == name] or [c for c in columns if _bare(c) == name]
            if not matches:
                raise ValueError(f"{path}: no column {name!r} for {role}; {found}")
        else:
            by_rank = ([c for c in columns if _bare(c).lower() == common] for common in COMMON_NAMES[role])
            matches = next((m for m in by_rank if m), [])
            if not matches and role == "time":
                continue
            if not matches:
                raise ValueError(f"{path}: no column looks like the {role}; name it with {role}=...; {found}")
        if len(matches) > 1:
            raise ValueError(
                f"{path}: {len(matches)} columns could be the {role}: {', '.join(map(repr, matches))}; {found}"
            )
        chosen[role] = matches[0]
    if len(set(chosen.values())) != len(chosen):
        raise ValueError(f"{path}: user, item and time must be different columns, got {chosen}")
    return chosen


def _bare(column: str) -> str:
    name, _, kind = column.strip().rpartition(":")
    return name if kind in ("token", "float", "token_seq", "float_seq") else column.strip()


# Text with a separator


def _delimited(
    path: Path, data: bytes, wanted: dict[str, str | None], separator: str | None, quoted: bool, tab: bool
) -> Table:
    import polars as pl

    first_line = data[: data.find(b"\n")] if b"\n" in data else data
    if separator is None:
        separator = "\t" if tab else max(",\t;", key=lambda s: first_line.count(s.encode()))
    elif len(separator.encode()) != 1 or separator in '\n\r"':
        raise ValueError(f"separator must be one ASCII character, got {separator!r}")
    quoted = quoted and b'"' in data
    try:
        header = first_line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}:1: the header is not UTF-8") from None
    columns = next(csv.reader([header], delimiter=separator), []) if quoted else header.split(separator)
    chosen = choose_columns(path, columns, wanted)

    rejects = Rejects()
    records = _Records(data, ord(separator), quoted)
    body = np.flatnonzero(records.ends > records.starts)  # blank lines are no rows
    body = body[body > 0]
    bad = np.zeros(len(records.ends), bool)

    def reject(which: np.ndarray, reason: str | Callable[[int], str]) -> None:
        fresh = body[which[body] & ~bad[body]]
        rejects.add(records.lines[fresh], reason if isinstance(reason, str) else lambda i: reason(fresh[i]))
        bad[fresh] = True

    reject(records.misquoted, "misplaced quote")
    reject(records.fields != len(columns), lambda r: f"expected {len(columns)} fields, got {records.fields[r]}")
    if b"\r" in data:
        reject(records.count((records.buffer == CARRIAGE_RETURN) & records.outside) > 0, "carriage return in the row")
    if not data.isascii():
        reject(records.not_utf8(), "not UTF-8")

    good = body[~bad[body]]
    # Our own header: the file's may repeat a name, and what polars calls headerless columns changed between releases.
    own = separator.join(f"f{i}" for i in range(len(columns))).encode() + b"\n"
    names = {role: f"f{columns.index(column)}" for role, column in chosen.items()}
    frame = pl.read_csv(
        io.BytesIO(own + records.bytes_of(good)),
        separator=separator,
        quote_char='"' if quoted else None,
        columns=list(names.values()),
        schema_overrides=dict.fromkeys(names.values(), pl.String),
    ).select(pl.col(name).alias(role) for role, name in names.items())
    if len(frame) != len(good):
        raise RuntimeError(f"{path}: {len(good)} rows were expected and {len(frame)} parsed")
    return Table(frame, records.lines[good], typed=False, unit="line", rejects=rejects)


class _Records:
    """Where the records of a text lie; record r is ``buffer[starts[r]:ends[r]]``, and record 0 the header.

    A line break within quotes does not end a record. Where a quote of the text is misplaced, quotes no longer tell
    what a line break is: then every line is a record, and those with misplaced quotes are `misquoted`.
    """

    def __init__(self, data: bytes, separator: int, quoted: bool):
        self._data = data
        self.buffer = np.frombuffer(data, np.uint8)
        newlines = np.flatnonzero(self.buffer == NEWLINE)
        self._set_bounds(newlines)
        self.lines = np.arange(1, len(self.ends) + 1)
        self.outside: np.ndarray | bool = True  # per byte: not within quotes
        self.misquoted = np.zeros(len(self.ends), bool)
        if quoted:
            # The parity of quotes so far; a doubled quote leaves and enters again. uint8 wraps, which keeps parity.
            parity = np.cumsum(self.buffer == QUOTE, dtype=np.uint8) & 1
            wrong = self._misplaced(parity, separator)
            if len(wrong) or parity[-1]:
                before = np.concatenate([parity[:1] * 0, parity])[self.starts]
                parity ^= np.repeat(before, self._lengths)
                odd = parity[np.minimum(self.ends, len(data)) - 1] == 1
                self.misquoted = odd & (self.ends > self.starts)
                wrong = self._misplaced(parity, separator)
                self.misquoted[np.searchsorted(self.ends, wrong)] = True
            else:
                self._set_bounds(newlines[parity[newlines] == 0])
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
            return self._data[self._lengths[0] :]
        return self.buffer[np.repeat(keep, self._lengths)].tobytes()


# JSON lines


def _json_lines(path: Path, data: bytes, wanted: dict[str, str | None]) -> Table:
    objects = (row for row, _ in map(_json_object, io.BytesIO(data)) if row is not None)
    sample = list(itertools.islice(objects, SAMPLE))
    if not sample:
        raise ValueError(f"{path}: expected one JSON object a line, found none")
    chosen = choose_columns(path, list(dict.fromkeys(key for row in sample for key in row)), wanted)
    table = _json_lines_fast(data, chosen, sample)
    return table if table is not None else _json_lines_by_row(data, chosen)


def _json_lines_fast(data: bytes, chosen: dict[str, str], sample: list[dict]) -> Table | None:
    """The table by polars, or None where it cannot be shown that every row was understood as JSON means it."""
    import polars as pl

    schema = {}
    for role, column in chosen.items():
        kinds = {type(row.get(column)) for row in sample}
        if kinds == {str}:
            schema[column] = pl.String
        elif kinds == {int}:
            schema[column] = pl.Int64
        elif role == "time" and kinds <= {int, float}:
            schema[column] = pl.Float64
        else:
            return None
    ends = np.flatnonzero(np.frombuffer(data.removesuffix(b"\n") + b"\n", np.uint8) == NEWLINE)
    numbers = np.flatnonzero(np.diff(ends, prepend=-1) > 1) + 1
    # polars turns numbers into strings where strings are expected, and takes the first of repeated keys: every
    # occurrence of a key must be followed by a value of the expected kind, and there must be one a row.
    for column, kind in schema.items():
        key = json.dumps(column, ensure_ascii=False).encode()
        if len(re.findall(re.escape(key) + rb"\s*:", data)) != len(numbers):
            return None
        if kind == pl.String and len(re.findall(re.escape(key) + rb'\s*:\s*"', data)) != len(numbers):
            return None
    if re.search(rb"\\u[dD][89a-fA-F]", data):  # polars turns a lone surrogate into NUL
        return None
    try:
        frame = pl.read_ndjson(io.BytesIO(data), schema=schema)
    except (pl.exceptions.PolarsError, RuntimeError):  # RuntimeError: early 1.x, for numbers out of range
        return None
    frame = frame.select(pl.col(column).alias(role) for role, column in chosen.items())
    if len(frame) != len(numbers) or sum(frame.null_count().row(0)):
        return None
    return Table(frame, numbers, typed=True, unit="line")


def _json_lines_by_row(data: bytes, chosen: dict[str, str]) -> Table:
    import polars as pl

    rejects = Rejects()
    kept: list[int] = []
    values: dict[str, list] = {role: [] for role in chosen}
    kinds: dict[str, type] = {}
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        row, reason = _json_object(line)
        if row is not None:
            found = {role: row.get(column) for role, column in chosen.items()}
            reason = next(filter(None, (_json_defect(role, v, kinds) for role, v in found.items())), None)
        if reason is not None:
            rejects.add(np.array([number]), reason)
            continue
        kept.append(number)
        for role, value in found.items():
            if role != "time":
                kinds.setdefault(role, type(value))
            # Times are parsed from text later; repr of a float is exact.
            values[role].append(value if role != "time" or value is None else str(value))
    frame = {}
    for role, column in values.items():
        if kinds.get(role) is int:
            low, high = min(column), max(column)
            if low >= -(2**63) and high < 2**63:
                frame[role] = pl.Series(column, dtype=pl.Int64)
            elif low >= 0 and high < 2**64:
                frame[role] = pl.Series(column, dtype=pl.UInt64)
            else:
                frame[role] = pl.Series([str(value) for value in column], dtype=pl.String)
        else:
            frame[role] = pl.Series(column, dtype=pl.String)
    return Table(pl.DataFrame(frame), np.array(kept, np.int64), typed=True, unit="line", rejects=rejects)


def _json_object(line: bytes) -> tuple[dict | None, str | None]:
    """(the object of a line, None), or (None, why there is none)."""

    def distinct(pairs):
        row = dict(pairs)
        if len(row) != len(pairs):
            raise ValueError("a key appears twice")
        return row

    try:
        row = json.loads(line.decode(), object_pairs_hook=distinct)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except RecursionError:
        return None, "not JSON: nested too deep"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return (row, None) if isinstance(row, dict) else (None, f"expected a JSON object, got {type(row).__name__}")


def _json_defect(role: str, value: object, kinds: dict[str, type]) -> str | None:
    if value is None:
        return f"missing {role}"
    if role == "time":
        return None if type(value) in (int, float, str) else f"time is a {type(value).__name__}"
    if type(value) not in (int, str):
        return f"{role} is a {type(value).__name__}, expected a string or an integer"
    if kinds.get(role, type(value)) is not type(value):
        return f"{role} is a {type(value).__name__} where earlier rows have {kinds[role].__name__}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{role} is not valid Unicode"
    return None


# Parquet


def _parquet(path: Path, data: bytes, wanted: dict[str, str | None]) -> Table:
    import polars as pl

    try:
        schema = pl.read_parquet_schema(io.BytesIO(data))
        chosen = choose_columns(path, list(schema), wanted)
        frame = pl.read_parquet(io.BytesIO(data), columns=list(chosen.values()))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None
    columns = []
    for role, column in chosen.items():
        series = frame[column]
        if isinstance(series.dtype, (pl.Categorical, pl.Enum)):
            series = series.cast(pl.String)
        elif role != "time" and series.dtype.is_integer() and series.dtype != pl.UInt64:
            series = series.cast(pl.Int64)
        elif role != "time" and series.dtype not in (pl.String, pl.UInt64):
            hint = "; ids never pass through floats" if series.dtype.is_float() else ""
            raise ValueError(f"{path}: column {column!r} must hold strings or integers, got {series.dtype}{hint}")
        columns.append(series.alias(role))
    return Table(pl.DataFrame(columns), np.arange(1, len(frame) + 1), typed=True, unit="row")
