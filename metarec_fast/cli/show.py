"""Reading domains, and what commands print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from metarec_fast.cli.options import Reading
from metarec_fast.report.console import plain_console
from metarec_fast.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from metarec_fast.api import MetaRec
    from metarec_fast.data import Domain


def load_named(names: Sequence[str], command: Reading) -> list[Domain]:
    """Domains by their files, folders or names, with the command's columns; all there before any is read."""
    from metarec_fast.data import find_domain, load_domain, read

    paths = [find_domain(name, command.folder) for name in names]
    places = [path.resolve() for path in paths]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"--target and --source must be domains of different names, got {name!r} twice")
    columns = {role: getattr(command, role) for role in ("user", "item", "time")}
    domains = []
    for path in paths:
        if path.is_dir():
            domain = load_domain(path)
        else:
            with notes_in_report():
                domain = read(path, **columns, on_error=command.on_error)
        show_domain(domain)
        domains.append(domain)
    return domains


def show_domain(domain: Domain, *, always: bool = False) -> None:
    """Its summary; and its report, always or if rows were left out or are repeated, or a column was guessed."""
    lines = [domain.summary()]
    if domain.report is not None and (always or domain.report.remarkable):
        lines += map(printable, str(domain.report).split("\n"))
    plain_console().print("\n".join(lines), soft_wrap=True)


@contextmanager
def notes_in_report() -> Iterator[None]:
    """Readers' warnings are left to the report, which is printed."""
    from metarec_fast.data import DataWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        yield


def show_rows(console: Console, rows: Sequence, title: str) -> None:
    from metarec_fast.report.table import values

    columns = ("Recall@10", "NDCG@10", "MRR")
    all_items = any(row.metrics.among_all is not None for row in rows)
    table = Table(title=printable(title))
    table.add_column("method")
    for column in (*columns, *(("NDCG@10, all items",) if all_items else ()), "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = [f"{values(row.metrics)[c]:.4f}" for c in columns]
        if all_items:
            figures.append(f"{(row.metrics.among_all or row.metrics).ndcg[10]:.4f}")
        name = row.method if row.trained else f"{row.method} (untrained)"
        table.add_row(printable(name), *figures, "" if row.seconds is None else f"{row.seconds:.0f}")
    console.print(table)
    console.print(printable(rows[0].metrics.protocol))


def show_transfer(console: Console, model: MetaRec, out: Path) -> None:
    """The verdict and key figures of a transfer report, if the model has one, and where the whole of it lies."""
    from metarec_fast.api import METHODS
    from metarec_fast.report.transfer import lines

    report = model.history.transfer_report
    if report is None:
        return
    text = [
        f"{METHODS[report['method']]}: {report['verdict']}",
        *lines(report),
        f"  report: {printable(out / 'report.html')}",
    ]
    console.print("\n".join(text), soft_wrap=True)


def show_how_to_resume(console: Console, reason: Exception, out: Path) -> None:
    console.print(f"{reason}; saved in {printable(out)}. Go on with the same command and --resume.", soft_wrap=True)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"metarec-fast: warning: {printable(message)}", file=sys.stderr)
