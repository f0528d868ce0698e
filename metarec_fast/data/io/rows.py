"""Which rows of a table can be used, and what their times mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metarec_fast.data.io.tables import SHOWN, Rejects, Table

if TYPE_CHECKING:
    import polars as pl

ISO = (
    r"^[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}"
    r"(?:[T ][0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?(?: ?(?:Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?))?)?$"
)
DAY_FIRST = re.compile(r"[0-9]{1,2}[-/. ][0-9]{1,2}[-/., ]+[0-9]{2,4}\b")
NO_HYPHENS = re.compile(r"[0-9]{4}([/. ])[0-9]{1,2}\1[0-9]{1,2}\b")


@dataclass
class TimeCount:
    """What the times of usable rows look like; the rest are neither numbers nor dates."""

    rows: int = 0
    numbers: int = 0
    dates: int = 0

    @property
    def are_dates(self) -> bool:
        return self.numbers < self.rows / 2 and self.dates > self.numbers

    def add(self, other: TimeCount) -> None:
        self.rows += other.rows
        self.numbers += other.numbers
        self.dates += other.dates


@dataclass
class Usable:
    """The rows of a table that can be used. times: int64 or float64 [rows], or None; counts: of them and misfits."""

    users: pl.Series
    items: pl.Series
    times: np.ndarray | None
    counts: TimeCount


def usable(table: Table, *, dates: bool | None = None) -> Usable:
    """Users, items and times of the rows that can be used; the others join the rejects.

    dates: what a text column of times holds; what most of its rows hold if None.
    """
    import polars as pl

    frame, lines = table.frame, table.lines
    good = np.ones(len(frame), bool)

    def reject(bad: np.ndarray, reason: str | Callable[[int], str]) -> None:
        at = np.flatnonzero(bad & good)
        table.rejects.add(lines[at], reason if isinstance(reason, str) else lambda i: reason(int(at[i])))
        good[at] = False

    for role in ("user", "item"):
        column = frame[role]
        if column.dtype == pl.String:
            reject((column.is_null() | (column == "")).fill_null(True).to_numpy(), f"missing {role}")
            reject(column.str.contains("\0", literal=True).fill_null(False).to_numpy(), f"NUL in {role}")
        else:
            reject(column.is_null().to_numpy(), f"missing {role}")
    times, counts = None, TimeCount()
    if "time" in frame.columns:
        column = frame["time"]
        missing = column.is_null()
        if column.dtype == pl.String:
            missing |= (column.str.strip_chars() == "").fill_null(True)
        reject(missing.to_numpy(), "missing time")
        # Rows already rejected have no say in what the times are.
        left = np.flatnonzero(good)
        times, fine, counts = _seconds(column if good.all() else column.gather(left), dates)
        if not fine.all():
            wrong = np.zeros(len(good), bool)
            wrong[left[~fine]] = True

            def misfit(i: int) -> str:
                return _misfit(str(column[i]) if dates else column[i])

            reject(wrong, misfit)
            times = times[fine]
    if not good.all():
        frame = frame.filter(pl.Series(good, dtype=pl.Boolean))
    return Usable(frame["user"], frame["item"], times, counts)


def nothing_usable(path: Path, unit: str, rows: int, rejects: Rejects) -> str:
    """The message of an error about a file without a row that can be used."""
    if not rows:
        return f"{path}: no rows below the names of columns" if unit == "line" else f"{path}: no rows"
    return "\n".join([f"{path}: none of {rows:,} rows can be used", *_shown(path, unit, rejects)])


def rejection(path: Path, unit: str, rejects: Rejects, *, among: str = "") -> str:
    """The message of an error about rejected rows."""
    return "\n".join([*_shown(path, unit, rejects, among), 'on_error="skip" leaves such rows out'])


def _shown(path: Path, unit: str, rejects: Rejects, among: str = "") -> list[str]:
    place = "" if unit == "line" else f"{unit} "
    shown = [f"{path}:{place}{line}: {reason}" for line, reason in rejects.first()[:SHOWN]]
    if rejects.count > len(shown):
        shown.append(f"... and {rejects.count - len(shown):,} more rows{among}")
    return shown


def _misfit(value: object) -> str:
    hint = ""
    if isinstance(value, str) and DAY_FIRST.match(value.strip()):
        hint = ": write the year first and in full, as in 2020-01-31"
    elif isinstance(value, str) and NO_HYPHENS.match(value.strip()):
        hint = ": write it with hyphens, as in 2020-01-31"
    return f"time {_short(value)} is neither a finite number nor an ISO date{hint}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _seconds(column: pl.Series, dates: bool | None) -> tuple[np.ndarray, np.ndarray, TimeCount]:
    """(times: int64 or float64 [n], fine: bool [n], what they look like); times that are not fine mean nothing.

    int64 where all that are fine are whole. So columns cut into pieces give what they give together: a whole number
    of one piece is the float that it would have been beside the fractions of another.
    """
    import polars as pl

    if column.dtype.is_temporal() and column.dtype not in (pl.Date, pl.Datetime):
        raise ValueError(f"time must hold numbers, strings, dates or datetimes, got {column.dtype}")
    counts = TimeCount(len(column), len(column))
    if dates and column.dtype.is_numeric():  # numbers that a reader has parsed already
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool), counts
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        whole = text.cast(pl.Int64, strict=False)
        if whole.null_count() == 0 and not dates:
            column = whole
        else:
            number = text.cast(pl.Float64, strict=False)
            finite = number.is_finite().fill_null(False)
            moments = pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, len(text))
            if not finite.all():
                others = ~finite
                moments = moments.scatter(others.arg_true(), _iso(text.filter(others)))
            counts = TimeCount(len(text), int(finite.sum()), len(text) - moments.null_count())
            if counts.are_dates if dates is None else dates:
                column = moments
            elif (whole.is_not_null() | ~finite).all():
                column = whole
            else:
                column = number
    if column.dtype in (pl.Date, pl.Datetime):
        return *_since_1970(column), counts
    if column.dtype.is_decimal():
        column = column.cast(pl.Float64)
    if not column.dtype.is_numeric():
        raise ValueError(f"time must hold numbers, strings, dates or datetimes, got {column.dtype}")
    if column.dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)  # null where 64 bits are too few
        return whole.fill_null(0).to_numpy(), whole.is_not_null().to_numpy(), counts
    times = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    return times, np.isfinite(times), counts


def _since_1970(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """(seconds of dates or datetimes: int64 where all are whole, else the nearest float64; fine: bool [n])."""
    import polars as pl

    fine = column.is_not_null().to_numpy()
    ticks = column.cast(pl.Int64).fill_null(0).to_numpy()  # of the column's own unit, which no date overflows
    if column.dtype == pl.Date:
        return ticks * 86400, fine
    if column.dtype.time_unit == "ns":  # exact to a microsecond
        ticks = ticks // 1000
    second = 1000 if column.dtype.time_unit == "ms" else 10**6
    whole, rest = np.divmod(ticks, second)
    if not rest.any():
        return whole, fine
    # A quotient of two floats is the nearest one, where both are exact. Beyond 2**53 (the year 2255, in microseconds)
    # the sum is: what the fraction was rounded by is too little to matter there.
    exact = np.abs(whole) < 2**53 // second
    return np.where(exact, ticks / second, whole + rest / second), fine


def _iso(text: pl.Series) -> pl.Series:
    """Datetimes in UTC, null where the text is no ISO 8601 date."""
    import polars as pl

    # polars takes 20 for the year 20, and blanks for zeros.
    text = pl.select(pl.when(text.str.contains(ISO)).then(text)).to_series()
    text = text.str.replace("^([0-9-]+)T", "${1} ").str.replace(" ?(?:Z|UTC)$", "+00:00")
    text = text.str.replace("^([0-9-]+ [0-9:.]+ ?[+-][0-9]{2})$", "${1}:00")
    text = text.str.replace("^([0-9-]+ [0-9]+:[0-9]+)( ?[+-])", "${1}:00${2}")
    zoned = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", strict=False, time_unit="us")
    plain = [
        text.str.to_datetime(form, strict=False, time_unit="us") for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")
    ]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.select(pl.coalesce(zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None), *plain, day)).to_series()
