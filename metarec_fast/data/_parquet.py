"""Parquet -> tables."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from metarec_fast.data._pieces import unpacked
from metarec_fast.data._tables import Table, choose_columns

ROW = 64  # bytes that a row is reckoned at


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
        else:
            source = path
    try:
        chosen = choose_columns(path, list(pl.read_parquet_schema(source)), wanted)
        if size is None:
            yield _table(path, pl.read_parquet(source, columns=list(chosen.values())), chosen, first=0)
            return
        scan = pl.scan_parquet(source).select(chosen.values())
        total, rows = scan.select(pl.len()).collect().item(), max(size // ROW, 1)
        for first in range(0, max(total, 1), rows):
            yield _table(path, scan.slice(first, rows).collect(), chosen, first, total)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {error}") from None


def _table(path: Path, frame: pl.DataFrame, chosen: dict[str, str], first: int, total: int | None = None) -> Table:
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
    numbers = np.arange(first + 1, first + 1 + len(frame))
    return Table(pl.DataFrame(columns), numbers, unit="row", read=first + len(frame), total=total)
