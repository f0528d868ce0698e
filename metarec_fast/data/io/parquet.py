"""Parquet -> tables."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from metarec_fast.data.io.columns import SAMPLE, Columns
from metarec_fast.data.io.pieces import unpacked
from metarec_fast.data.io.polars_errors import FAILURES, reason
from metarec_fast.data.io.tables import Table

ROW = 64  # bytes that a row is reckoned at
WHOLE = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)  # Int64 holds them


def parquet_tables(
    path: Path, wanted: dict[str, str | None], size: int | None, scratch: Path | None
) -> Iterator[Table]:
    """Rows in the order of the file, all at once or about ``size`` bytes of them at a time."""
    with unpacked(path) as file:
        if size is None:
            source = io.BytesIO(file.read(-1))
        elif file.packed:  # Parquet is read from its end: it has to lie there whole
            source = scratch / "unpacked.parquet"
            with open(source, "wb") as whole:
                shutil.copyfileobj(file, whole, 1 << 20)
        else:  # under a name in which polars sees neither a pattern nor a home folder
            source = scratch / "source.parquet"
            try:
                source.symlink_to(path.absolute())
            except OSError:  # a file system without links
                source = path.absolute()
    try:
        schema = pl.read_parquet_schema(source)
        columns = Columns(path, list(schema), wanted)
        if columns.wants_rows:
            _look(columns, source, schema)
        chosen = columns.chosen
        if size is None:
            # Only these columns are decoded, as in pieces.
            yield _table(path, pl.read_parquet(source, columns=list(chosen.values())), columns, first=0)
            return
        scan = pl.scan_parquet(source, glob=False, hive_partitioning=False).select(chosen.values())
        total, rows = scan.select(pl.len()).collect().item(), max(size // ROW, 1)
        for first in range(0, max(total, 1), rows):
            yield _table(path, scan.slice(first, rows).collect(), columns, first, total)
    except (*FAILURES, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {reason(error)}") from None


def _look(columns: Columns, source: Path | io.BytesIO, schema: dict[str, pl.DataType]) -> None:
    """Show the first rows of columns that are not used; damaged ones say nothing."""
    moments = [name for name in columns.unused if schema[name] in (pl.Date, pl.Datetime)]
    columns.add_times(moments)
    plain = [name for name in columns.unused if not schema[name].is_nested() and not schema[name].is_temporal()]
    if not plain:
        return
    options = {} if isinstance(source, io.BytesIO) else {"glob": False, "hive_partitioning": False}
    try:
        head = pl.read_parquet(source, columns=plain, n_rows=SAMPLE, **options).to_dict(as_series=False)
    except FAILURES:
        return
    rows = len(head[plain[0]])
    columns.look(zip(*(head.get(name, [None] * rows) for name in columns.unused), strict=True))


def _table(path: Path, frame: pl.DataFrame, columns: Columns, first: int, total: int | None = None) -> Table:
    read = []
    for role, column in columns.chosen.items():
        series = frame[column]
        kind = series.dtype
        if isinstance(kind, (pl.Categorical, pl.Enum)):
            series = series.cast(pl.String)
        elif role == "time":
            if kind == pl.Null:
                series = series.cast(pl.Int64)
            elif not (kind.is_numeric() or kind in (pl.String, pl.Date, pl.Datetime)):
                raise ValueError(
                    f"{path}: column {column!r}: time must hold numbers, strings, dates or datetimes, got {kind}; "
                    "time=... names another"
                )
        elif kind in WHOLE:
            series = series.cast(pl.Int64)
        elif kind not in (pl.String, pl.UInt64):
            hint = (
                "; ids never pass through floats"
                if kind.is_float()
                else " of more than 64 bits"
                if kind.is_integer()
                else ""
            )
            raise ValueError(f"{path}: column {column!r} must hold strings or integers, got {kind}{hint}")
        read.append(series.alias(role))
    numbers = np.arange(first + 1, first + 1 + len(frame))
    table = Table(pl.DataFrame(read), numbers, unit="row", read=first + len(frame), total=total)
    table.columns = columns
    return table
