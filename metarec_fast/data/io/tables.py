"""What every format is read into: columns of rows, and the rows that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from metarec_fast.data.io.columns import Columns

if TYPE_CHECKING:
    import polars as pl


LISTED = 100  # rejected rows that are kept with their reason
SHOWN = 5  # rejected rows that a message shows


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
    columns: Columns | None = None  # of the whole file


class QuotesMislead(Exception):
    """A quote is misplaced, so that no line break is within quotes; but earlier tables took some to be."""
