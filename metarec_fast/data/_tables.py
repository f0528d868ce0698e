"""What every format is read into: columns of rows, and the rows that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

LISTED = 100  # rejected rows that are kept with their reason
SAMPLE = 100  # rows that are looked at for what a file is like

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

    def extend(self, later: Rejects) -> None:
        """Add those of rows after these."""
        self.count += later.count
        if len(self._listed) < LISTED:
            self._listed += later.first()


@dataclass
class Table:
    """Columns user, item and perhaps time as the file has them; lines[i] is the line (or row) of row i, from 1."""

    frame: pl.DataFrame
    lines: np.ndarray
    unit: str  # what lines count
    text: frozenset[str] = frozenset()  # roles whose strings stand for integers if they are all canonical decimals
    rejects: Rejects = field(default_factory=Rejects)
    read: int = 0  # how much of the file was read up to the table's end: bytes, or rows of Parquet
    total: int | None = None  # of Parquet: rows of the file


class QuotesMislead(Exception):
    """A quote is misplaced, so that no line break is within quotes; but earlier tables took some to be."""


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
