"""metarec-fast import: a file of any size as a domain's folder."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from metarec_fast.cli.show import notes_in_report, show_domain
from metarec_fast.report.console import plain_console
from metarec_fast.text import printable


@dataclass(frozen=True, kw_only=True)
class Import:
    """Turn a file of any size into a domain's folder, memory-mapped from then on; in bounded memory."""

    file: Annotated[Path, tyro.conf.Positional]
    """RecBole .inter, CSV, TSV, JSON lines or Parquet, perhaps gzipped; or a pipe, with --format."""
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it comes into being whole, or not at all."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    name: str | None = None
    """Name of the domain; the file's if not given."""
    format: Literal["inter", "csv", "tsv", "jsonl", "parquet"] | None = None
    """By the file's suffix if not given."""
    separator: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""
    duplicates: Literal["keep", "drop", "drop_pairs"] = "keep"
    """Rows that repeat user, item and time: keep them, drop them, or drop all that repeat user and item."""
    memory: str = "1GB"
    """For the rows at work; the distinct ids come on top."""
    overwrite: bool = False
    """Replace the domain that the folder holds."""


def import_(command: Import) -> int:
    from metarec_fast.data import Progress, import_file

    console, started = plain_console(), time.perf_counter()
    options = {f.name: getattr(command, f.name) for f in fields(Import) if f.name not in ("file", "folder")}

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)  # what is half-written is removed then too
    try:
        with console.status("reading") as line:

            def show(progress: Progress) -> None:
                share = "" if progress.share is None else f" {progress.share:.0%}"
                rate = progress.rows / (time.perf_counter() - started)
                counted = f"{progress.rows:,} rows" + (f", {rate:,.0f} a second" if progress.stage == "reading" else "")
                line.update(f"{progress.stage}{share}: {counted}")

            with notes_in_report():
                domain = import_file(command.file, command.folder, **options, progress=show)
    except KeyboardInterrupt:
        print("metarec-fast: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    seconds = time.perf_counter() - started
    show_domain(domain, always=True)
    rate = domain.report.rows / seconds
    console.print(f"folder: {printable(command.folder)}   {seconds:.1f} s, {rate:,.0f} rows a second", soft_wrap=True)
    return 0
