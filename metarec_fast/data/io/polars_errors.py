"""What polars raises for data that it cannot take, as errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

# A panic is no Exception, so that nobody catches it by chance.
FAILURES = (
    pl.exceptions.PolarsError,
    getattr(pl.exceptions, "PanicException", pl.exceptions.PolarsError),
    ArithmeticError,
    UnicodeError,
)


@contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """What the block fails for in ``path`` is a ValueError that names it."""
    try:
        yield
    except FAILURES as error:
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's message, cut to a readable length."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:197] + "..."
