"""JSON lines -> tables."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from metarec_fast.data.io.columns import SAMPLE, Columns
from metarec_fast.data.io.pieces import LONGEST, Piece, pieces
from metarec_fast.data.io.tables import SHOWN, Rejects, Table
from metarec_fast.files import is_unicode

NEWLINE = ord("\n")
DEEP = 500  # levels of nesting
POLARS_TYPE = {str: pl.String, int: pl.Int64, float: pl.Float64}


def json_tables(path: Path, wanted: dict[str, str | None], size: int | None) -> Iterator[Table]:
    """Lines in the order of the file, all at once or about ``size`` bytes of them at a time.

    Names and types of columns are those of the first rows; in pieces, of the first rows within 64 MiB.
    """
    head: list[Piece] = []
    sample: list[dict] = []
    reader = None
    for piece in pieces(path, size=size, record_end=lambda data: data.rfind(b"\n") + 1):
        if reader is None:
            head.append(piece)
            sample += _rows(piece.data, SAMPLE - len(sample))
            if len(sample) < SAMPLE and sum(len(p.data) for p in head) <= LONGEST:
                continue
            reader = _JsonLines(path, wanted, sample, head)
            yield from map(reader.table, head)
        else:
            yield reader.table(piece)
    if reader is None:
        yield from map(_JsonLines(path, wanted, sample, head).table, head)


def _first_defects(path: Path, pieces: list[Piece]) -> str:
    """What is wrong with the first lines, none of which holds an object."""
    numbered = ((n, line) for piece in pieces for n, line in enumerate(io.BytesIO(piece.data), piece.line))
    bad = ((n, _json_object(line)[1]) for n, line in numbered if line.strip())
    return "".join(f"\n{path}:{n}: {reason}" for n, reason in itertools.islice(bad, SHOWN))


def _rows(data: bytes, most: int) -> list[dict]:
    """The first rows of some lines."""
    found = (row for row, _ in map(_json_object, io.BytesIO(data)) if row is not None)
    return list(itertools.islice(found, most))


class _JsonLines:
    """Pieces -> tables. sample: the first rows, for names and types of columns; head: the pieces that they are of."""

    def __init__(self, path: Path, wanted: dict[str, str | None], sample: list[dict], head: list[Piece]):
        if not sample:
            raise ValueError(f"{path}: expected one JSON object a line, found none{_first_defects(path, head)}")
        self._columns = Columns(path, list(dict.fromkeys(key for row in sample for key in row)), wanted)
        self._columns.look([row.get(name) for name in self._columns.unused] for row in sample)
        self._chosen = self._columns.chosen
        self._expected = {role: _kind(role, column, sample) for role, column in self._chosen.items()}
        self._kinds: dict[str, type] = {}  # of the ids of earlier rows

    def table(self, piece: Piece) -> Table:
        table = self._fast(piece)
        if table is None:
            table = self._by_row(piece)
        table.read, table.columns = piece.read, self._columns
        return table

    def _fast(self, piece: Piece) -> Table | None:
        """The table by polars, or None where it cannot be shown that every row was understood as JSON means it."""
        if None in self._expected.values():
            return None
        if any(self._expected[role] is not kind for role, kind in self._kinds.items()):
            return None
        data = piece.data
        schema = {column: POLARS_TYPE[self._expected[role]] for role, column in self._chosen.items()}
        ends = np.flatnonzero(np.frombuffer(data.removesuffix(b"\n") + b"\n", np.uint8) == NEWLINE)
        numbers = np.flatnonzero(np.diff(ends, prepend=-1) > 1) + piece.line
        # polars turns numbers into strings where strings are expected, and takes the first of repeated keys: every
        # occurrence of a key must be followed by a value of the expected kind, and there must be one a row.
        for column, kind in schema.items():
            if not is_unicode(column) or _spelt_otherwise(column, data):
                return None
            key = json.dumps(column, ensure_ascii=False).encode()
            if len(re.findall(re.escape(key) + rb"\s*:", data)) != len(numbers):
                return None
            if kind == pl.String and len(re.findall(re.escape(key) + rb'\s*:\s*"', data)) != len(numbers):
                return None
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # polars turns a lone surrogate into NUL
            return None
        # Python's parser and polars' end at different depths.
        if data.count(b"[") + data.count(b"{") > len(numbers) + DEEP and _deepest(data, ends) > DEEP:
            return None
        try:
            frame = pl.read_ndjson(io.BytesIO(data), schema=schema)
        except (pl.exceptions.PolarsError, RuntimeError):  # RuntimeError: early 1.x, for numbers out of range
            return None
        frame = frame.select(pl.col(column).alias(role) for role, column in self._chosen.items())
        if len(frame) != len(numbers) or sum(frame.null_count().row(0)):
            return None
        if len(frame):
            self._kinds |= {role: self._expected[role] for role in ("user", "item")}
        return Table(frame, numbers, unit="line")

    def _by_row(self, piece: Piece) -> Table:
        rejects = Rejects()
        kept: list[int] = []
        values: dict[str, list[str]] = {role: [] for role in self._chosen}
        kinds = self._kinds
        for number, line in enumerate(io.BytesIO(piece.data), piece.line):
            if not line.strip():
                continue
            row, reason = _json_object(line)
            if row is not None:
                found = {role: row.get(column) for role, column in self._chosen.items()}
                reason = next(filter(None, (_json_defect(role, v, kinds) for role, v in found.items())), None)
                if twice := [column for column in self._chosen.values() if column in row.repeated]:
                    reason = f"a key appears twice: {twice[0]!r}"
            if reason is not None:
                rejects.add(np.array([number]), reason)
                continue
            kept.append(number)
            for role, value in found.items():
                if role != "time":
                    kinds.setdefault(role, type(value))
                # Integers of any size keep their decimals, times are parsed later; repr of a float is exact.
                values[role].append(str(value))
        frame = pl.DataFrame(values, schema=dict.fromkeys(values, pl.String))
        integers = frozenset(role for role, kind in kinds.items() if kind is int)
        return Table(frame, np.array(kept, np.int64), unit="line", text=integers, rejects=rejects)


def _spelt_otherwise(key: str, data: bytes) -> bool:
    """Whether the text holds an escape of a character of the key, so that the key may be there in other words."""
    units = {f"{unit:04x}" for c in key for unit in memoryview(c.encode("utf-16-le")).cast("H")}
    escapes = [rb"\\u(?i:" + "|".join(sorted(units)).encode() + rb")"] + [rb"\\/"] * ("/" in key)
    return re.search(b"|".join(escapes), data) is not None


def _deepest(data: bytes, ends: np.ndarray) -> int:
    """A bound on how deep values are nested: the most brackets that open in a line."""
    buffer = np.frombuffer(data, np.uint8)
    opening = ((buffer == ord("[")) | (buffer == ord("{"))).view(np.uint8)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return int(np.add.reduceat(opening, starts, dtype=np.int64).max(initial=0))


def _kind(role: str, column: str, sample: list[dict]) -> type | None:
    """The type of a column's values, or None if they have several, or one that is not expected."""
    values = [row.get(column) for row in sample]
    kinds = {type(value) for value in values}
    kind = kinds.pop()
    if kinds or kind not in ((str, int, float) if role == "time" else (str, int)):
        return None
    # A number that will be rejected has no say in whether the others are whole.
    return kind if kind is not float or all(map(math.isfinite, values)) else None


class _Object(dict):
    """A JSON object; of a key that appears several times, the last value, and the key is among the repeated ones."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        self.repeated: frozenset[str] = frozenset()
        if len(self) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            self.repeated = frozenset(key for key, count in counts.items() if count > 1)


def _json_object(line: bytes) -> tuple[_Object | None, str | None]:
    """(the object of a line, None), or (None, why there is none)."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_Object)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except RecursionError:
        return None, "not JSON: nested too deep"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return (row, None) if isinstance(row, _Object) else (None, f"expected a JSON object, got {type(row).__name__}")


def _json_defect(role: str, value: object, kinds: dict[str, type]) -> str | None:
    if value is None:
        return f"missing {role}"
    if isinstance(value, str) and not is_unicode(value):
        return f"{role} is not valid Unicode"
    if role == "time":
        return None if type(value) in (int, float, str) else f"time is a {_kind_name(value)}"
    if type(value) not in (int, str):
        return f"{role} is a {_kind_name(value)}, expected a string or an integer"
    if kinds.get(role, type(value)) is not type(value):
        return f"{role} is a {type(value).__name__} where earlier rows have {kinds[role].__name__}"
    return None


def _kind_name(value: object) -> str:
    return "dict" if isinstance(value, dict) else type(value).__name__
