"""Files of interactions -> Domain."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from metarec_fast.data.domain import Domain, ReadReport, Sequences
from metarec_fast.data.formats import Table, load, split_suffix
from metarec_fast.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl

SHOWN = 5  # rejected rows that an error message shows
DECIMAL = r"^(?:0|-?[1-9][0-9]*)$"


def read(
    path: str | os.PathLike[str],
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    name: str | None = None,
    format: Literal["inter", "csv", "tsv", "jsonl", "parquet"] | None = None,
    separator: str | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    duplicates: Literal["keep", "drop", "drop_pairs"] = "keep",
) -> Domain:
    """A domain from a file of interactions, one a row.

    Formats, told by the suffix unless `format` is given; each may be gzipped:

    - inter: tab-separated with a typed header (`user_id:token`), fields verbatim.
    - csv, tsv: with a header, quoted as RFC 4180 says. A .csv may be separated by semicolons or tabs.
    - jsonl (also .ndjson, .json): one object a line.
    - parquet.

    user, item, time: column names; where not given, common ones are looked for (user_id, item_id, timestamp, ...).
    A file without times is in the order of its rows.
    name: of the domain; the file's name without suffixes where not given.
    separator: one character, for the separated formats.
    on_error: "raise" stops at rows that cannot be used, naming them as file:line: reason; "skip" leaves them out,
        counted and listed in the domain's `report`. Such rows lack a user or an item, have a wrong number of fields, a
        misplaced quote, a NUL in an id, bytes that are not UTF-8, or a time that is missing or neither a finite number
        nor a date.
    duplicates: "keep"; "drop" keeps the first row of each (user, item, time); "drop_pairs" keeps the earliest row of
        each (user, item). Without times the last two are the same.

    Ids. Users and items are numbered by first appearance in the file. Where types are written down (Parquet, JSON),
    integers are integers and strings strings. In text, a column is one of integers if each of its values is the
    canonical decimal form of a 64-bit integer: one "007" or "+7" and the whole column is strings. So ids always
    print as the file has them.

    Order. Events of a user are sorted by time; equal times stay in the order of rows.

    Times. Numbers as they are, int64 where all are integers, else float64. ISO dates, and Parquet's, become seconds
    since 1970 (UTC where no zone is given; exact to a microsecond).

    Raises ValueError for a file, column or row that cannot be used.
    """
    for option, value, allowed in (
        ("on_error", on_error, ("raise", "skip")),
        ("duplicates", duplicates, ("keep", "drop", "drop_pairs")),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    path = Path(path)
    stem, format = split_suffix(path, format)
    table = load(path, format, {"user": user, "item": item, "time": time}, separator)
    rows = len(table.frame) + table.rejects.count
    users, items, times = _usable(table)
    if table.rejects.count and on_error == "raise":
        raise ValueError(_message(path, table))

    user_of, user_ids = _number(users, table.typed)
    item_of, item_ids = _number(items, table.typed)
    order = np.lexsort((user_of,) if times is None else (times, user_of))  # stable
    user_of, item_of = user_of[order], item_of[order]
    times = None if times is None else times[order]
    repeated = _repeated(user_of, item_of, times)
    if duplicates != "keep":
        keep = ~(repeated if duplicates == "drop" else _repeated(user_of, item_of, None))
        user_of, item_of = user_of[keep], item_of[keep]
        times = None if times is None else times[keep]
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(user_of, minlength=len(user_ids)), out=offsets[1:])

    report = ReadReport(
        path=str(path),
        rows=rows,
        rejected=table.rejects.count,
        examples=table.rejects.first(),
        duplicates=int(repeated.sum()),
        dropped=rows - table.rejects.count - len(item_of),
        tied=None if times is None else _tied_share(user_of, times),
        notes=_lookalikes("user", user_ids) + _lookalikes("item", item_ids),
    )
    dtype = np.int32 if len(item_ids) < 2**31 else np.int64
    sequences = Sequences(offsets, item_of.astype(dtype), len(item_ids), times)
    return Domain(stem if name is None else name, sequences, user_ids, item_ids, report)


def _message(path: Path, table: Table) -> str:
    place = "" if table.unit == "line" else f"{table.unit} "
    shown = [f"{path}:{place}{line}: {reason}" for line, reason in table.rejects.first()[:SHOWN]]
    if table.rejects.count > len(shown):
        shown.append(f"... and {table.rejects.count - len(shown):,} more rows")
    return "\n".join([*shown, 'on_error="skip" leaves such rows out'])


def _usable(table: Table) -> tuple[pl.Series, pl.Series, np.ndarray | None]:
    """Users, items and times of the rows that can be used; the others join the rejects."""
    import polars as pl

    frame, lines = table.frame, table.lines
    good = np.ones(len(frame), bool)

    def reject(bad: np.ndarray, reason) -> None:
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
    times = None
    if "time" in frame.columns:
        column = frame["time"]
        missing = column.is_null()
        if column.dtype == pl.String:
            missing |= (column.str.strip_chars() == "").fill_null(True)
        reject(missing.to_numpy(), "missing time")
        # Rows already rejected have no say in what the times are.
        left = np.flatnonzero(good)
        times, fine = _seconds(column.filter(pl.Series(good, dtype=pl.Boolean)))
        wrong = np.zeros(len(good), bool)
        wrong[left[~fine]] = True
        reject(wrong, lambda i: f"time {_short(column[i])} is neither a finite number nor an ISO date")
        times = times[fine]
    keep = pl.Series(good, dtype=pl.Boolean)
    return frame["user"].filter(keep), frame["item"].filter(keep), times


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _seconds(column: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """(times: int64 or float64 [n], fine: bool [n]); times that are not fine mean nothing."""
    import polars as pl

    if column.dtype.is_temporal() and column.dtype not in (pl.Date, pl.Datetime):
        raise ValueError(f"time must hold numbers, strings, dates or datetimes, got {column.dtype}")
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        whole, number = text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)
        finite = number.is_finite().fill_null(False)
        column = number
        if finite.sum() < len(text) / 2:
            dates = _iso(text)
            if dates.is_not_null().sum() > finite.sum():
                column = dates
        if column is number and (whole.is_not_null() | ~finite).all():
            column = whole
    if column.dtype in (pl.Date, pl.Datetime):
        micro = column.cast(pl.Datetime("us")).cast(pl.Int64)
        exact = (micro % 1_000_000 == 0).fill_null(True).all()
        column = micro // 1_000_000 if exact else micro / 1e6
    elif column.dtype.is_decimal():
        column = column.cast(pl.Float64)
    if not column.dtype.is_numeric():
        raise ValueError(f"time must hold numbers, strings, dates or datetimes, got {column.dtype}")
    if column.dtype.is_integer() and column.dtype != pl.UInt64:
        return column.fill_null(0).cast(pl.Int64).to_numpy(), column.is_not_null().to_numpy()
    if column.dtype == pl.UInt64:
        fits = (column <= 2**63 - 1).fill_null(False)
        return column.cast(pl.Int64, strict=False).fill_null(0).to_numpy(), fits.to_numpy()
    column = column.cast(pl.Float64).fill_null(float("nan"))
    return column.to_numpy(), np.isfinite(column.to_numpy())


def _iso(text: pl.Series) -> pl.Series:
    """Datetimes in UTC, null where the text is no ISO 8601 date."""
    import polars as pl

    text = text.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
    zoned = text.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", strict=False, time_unit="us")
    plain = [
        text.str.to_datetime(form, strict=False, time_unit="us") for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")
    ]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.select(pl.coalesce(zoned.dt.convert_time_zone("UTC").dt.replace_time_zone(None), *plain, day)).to_series()


def _number(ids: pl.Series, typed: bool) -> tuple[np.ndarray, Vocabulary]:
    """(index of each row's id: int64 [rows], the ids), numbered by first appearance."""
    import polars as pl

    if not typed and len(ids) and ids.str.contains(DECIMAL).all():
        for kind in (pl.Int64, pl.UInt64):
            integers = ids.cast(kind, strict=False)
            if not integers.null_count():
                ids = integers
                break
    rows = pl.DataFrame({"id": ids}).with_row_index("row")
    first = rows.select(pl.col("row").first().over("id")).to_series().to_numpy().astype(np.int64)
    new = first == np.arange(len(first))
    index = (np.cumsum(new) - 1)[first]
    distinct = ids.filter(pl.Series(new, dtype=pl.Boolean))
    return index, Vocabulary(distinct.to_list() if ids.dtype == pl.String else distinct.to_numpy())


def _repeated(user_of: np.ndarray, item_of: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """bool [events]: an earlier event has the same user and item, and the same time where times are given."""
    keys = (item_of, user_of) if times is None else (times, item_of, user_of)
    order = np.lexsort(keys)  # stable: the earliest of equals comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:][same]] = True
    return repeated


def _tied_share(user_of: np.ndarray, times: np.ndarray) -> float:
    same_user = user_of[1:] == user_of[:-1]
    return float((times[1:] == times[:-1])[same_user].mean()) if same_user.any() else 0.0


def _lookalikes(role: str, ids: Vocabulary) -> tuple[str, ...]:
    """A note on ids that print alike: equal once composed (Unicode NFC), though their code points differ."""
    if ids.is_integer:
        return ()
    composed = [unicodedata.normalize("NFC", value) for value in ids if not value.isascii()]
    merged = len(composed) - len(set(composed))
    return (f"{merged:,} {role} ids differ from another only by Unicode normalisation",) if merged else ()
