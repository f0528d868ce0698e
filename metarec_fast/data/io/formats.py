"""Files of interactions -> tables. Whatever the format, every row is either in a table or among its rejects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from metarec_fast.data.io.pieces import pieces
from metarec_fast.data.io.tables import Table

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
    stem = stem[: -len(suffix)] if suffix in SUFFIXES else stem
    return os.fsencode(stem).decode("utf-8", "replace"), format  # a name that can be printed and written


def tables(
    path: Path,
    format: str,
    wanted: dict[str, str | None],
    separator: str | None,
    *,
    size: int | None = None,
    by_line: bool = False,
    scratch: Path | None = None,
) -> Iterator[Table]:
    """The rows of a file as one table, or as several of about ``size`` bytes: at least one, in the order of the file.

    wanted: role (user, item, time) -> column name, or None to guess. The time is absent if it is not found.
    by_line: no line break is within quotes; to begin again with after QuotesMislead.
    scratch: a folder for what has to be unpacked on disk, where size is given.
    """
    if format == "parquet":
        from metarec_fast.data.io.parquet import parquet_tables

        yield from parquet_tables(path, wanted, size, scratch)
    elif format == "jsonl":
        from metarec_fast.data.io.json_lines import json_tables

        yield from json_tables(path, wanted, size)
    else:
        from metarec_fast.data.io.delimited import Delimited

        reader = Delimited(path, wanted, separator, quoted=format != "inter", tab=format != "csv", by_line=by_line)
        records = pieces(path, size=size, record_end=reader.record_end, quoted=format != "inter")
        yield from map(reader.table, records)
