"""Files of interactions -> Domain."""

from __future__ import annotations

import os
import unicodedata
import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from metarec_fast.data.csr import offsets as csr_offsets
from metarec_fast.data.domain import Domain, ReadReport, Sequences
from metarec_fast.data.io.formats import split_suffix, tables
from metarec_fast.data.io.grouping import Duplicates, group
from metarec_fast.data.io.numbering import Numbering
from metarec_fast.data.io.rows import nothing_usable, rejection, usable
from metarec_fast.data.vocabulary import Vocabulary


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
    duplicates: Duplicates = "keep",
) -> Domain:
    """A domain from a file of interactions, one a row.

    Formats, recognised by the suffix unless `format` is given; each may be gzipped:

    - inter: tab-separated with a typed header (`user_id:token`), fields verbatim.
    - csv, tsv: with a header, quoted as RFC 4180 says. A .csv may be separated by semicolons or tabs.
    - jsonl (also .ndjson, .json): one object a line.
    - parquet.

    user, item, time: column names; where not given, common ones are looked for (user_id, item_id, timestamp, ...),
        whatever their case, blanks and underscores. A file without times is in the order of its rows. A DataWarning
        says which column was taken where several could be meant, and names columns that look like times where none
        is used; so does the domain's `report`.
    name: of the domain; the file's name without suffixes where not given.
    separator: one character, for the separated formats.
    on_error: "raise" stops at rows that cannot be used, naming them as file:line: reason; "skip" leaves them out,
        counted and listed in the domain's `report`. Such rows lack a user or an item, have a wrong number of fields, a
        misplaced quote, a carriage return, a NUL in an id, bytes that are not UTF-8, one of our keys twice in JSON, or
        a time that is missing or neither a finite number nor a date.
    duplicates: "keep"; "drop" keeps the first row of each (user, item, time); "drop_pairs" keeps the earliest row of
        each (user, item). Without times the last two are the same.

    Ids. Users and items are numbered by first appearance in the file. Where types are written down (Parquet, JSON),
    integers are integers and strings strings. In text, a column is one of integers if each of its values is the
    canonical decimal form of a 64-bit integer: one "007" or "+7" and the whole column is strings. So ids always
    print as the file has them.

    Order. Events of a user are sorted by time; equal times stay in the order of rows.

    Times. Numbers as they are, int64 where all are integers, else float64. ISO dates, and Parquet's, become seconds
    since 1970 (UTC where no zone is given): with fractions the float64 nearest to the microsecond. Years have four
    digits and come first.

    Lines end in LF or CRLF, or, where the first one does, in CR alone.

    Raises ValueError, with the file's name, for a file, column or row that cannot be used, and for a file without a
    row that can.
    """
    from metarec_fast.data.io.polars_errors import failures_of

    check_choices(on_error, duplicates)
    path = Path(path)
    stem, format = split_suffix(path, format)
    users, items = Numbering(), Numbering()
    with failures_of(path):
        (table,) = tables(path, format, {"user": user, "item": item, "time": time}, separator)
        rows = len(table.frame) + table.rejects.count
        good = usable(table)
        if table.rejects.count and on_error == "raise":
            raise ValueError(rejection(path, table.unit, table.rejects))
        if not len(good.users):
            raise ValueError(nothing_usable(path, table.unit, rows, table.rejects))
        user_of = users.add(good.users, text="user" in table.text)
        item_of = items.add(good.items, text="item" in table.text)
    grouped = group(user_of, item_of, good.times, duplicates)
    user_ids, item_ids = users.vocabulary(), items.vocabulary()
    notes = table.columns.notes()
    report = ReadReport(
        path=str(path),
        rows=rows,
        rejected=table.rejects.count,
        examples=table.rejects.first(),
        duplicates=grouped.duplicates,
        dropped=len(user_of) - len(grouped.users),
        tied=None if good.times is None else tied_share(grouped.tied, grouped.neighbours),
        notes=notes + lookalikes("user", user_ids) + lookalikes("item", item_ids),
        columns=table.columns.chosen,
        unit=table.unit,
    )
    offsets = csr_offsets(np.bincount(grouped.users, minlength=len(user_ids)))
    sequences = Sequences(offsets, grouped.items, len(item_ids), grouped.times)
    warn(path, notes)
    name = stem if name is None else name
    return Domain(name, sequences, user_ids, item_ids, report, ordered_by=report.columns.get("time"))


class DataWarning(UserWarning):
    """Something about a file that its reader should know: a column that was guessed, or times that are not used."""


def warn(path: Path, notes: tuple[str, ...]) -> None:
    """Warn the caller of the caller."""
    for note in notes:
        warnings.warn(f"{path}: {note}", DataWarning, stacklevel=3)


def check_choices(on_error: str, duplicates: str) -> None:
    """Raise ValueError for an option that is none of those allowed."""
    for option, value, allowed in (
        ("on_error", on_error, ("raise", "skip")),
        ("duplicates", duplicates, ("keep", "drop", "drop_pairs")),
    ):
        if value not in allowed:
            raise ValueError(f"{option} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def tied_share(tied: int, neighbours: int) -> float:
    return tied / neighbours if neighbours else 0.0


def lookalikes(role: str, ids: Vocabulary) -> tuple[str, ...]:
    """A note on ids that print alike: equal once composed (Unicode NFC), though their code points differ."""
    if ids.is_integer:
        return ()
    composed = [unicodedata.normalize("NFC", value) for value in ids if not value.isascii()]
    merged = len(composed) - len(set(composed))
    return (f"{merged:,} {role} ids differ from another only by Unicode normalisation",) if merged else ()
