"""Live progress for people: a bar a stage on a terminal, a line now and then elsewhere; every fact into a log file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metarec_fast.files import naming, write_all
from metarec_fast.text import printable


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: names of domains and paths are no markup, and no emoji by their names."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def describe(metrics: dict[str, Any]) -> str:
    """Losses, and the sources' weights where there are any, in one short line."""
    parts = [f"{printable(name)} {loss:.3f}" for name, loss in metrics["losses"].items()]
    if "weights" in metrics:
        parts.append("weights " + " ".join(f"{weight:.2f}" for weight in metrics["weights"].values()))
    if "skipped" in metrics:
        parts.append(f"{metrics['skipped']} steps left out, not finite")
    return "  ".join(parts)


def _remove_cut_line(log: Path) -> None:
    """What a killed process left of its last line."""
    with open(log, "rb+") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 20)))
        rest = file.read()
        if not rest.endswith(b"\n"):
            file.truncate(size - len(rest) + rest.rfind(b"\n") + 1)


class ConsoleReporter:
    """Shows a run and writes ``log.jsonl``. Use as a context manager."""

    def __init__(self, *, log: Path | None = None, console: Console | None = None, every_seconds: float = 10.0) -> None:
        self.console = console or plain_console()
        self.every_seconds = every_seconds
        self.title = ""
        self._log_path, self._log = log, None
        self._last = 0.0
        self._stage: tuple[str, str] | None = None
        self._task: Any = None
        self._validation = ""
        self._bars = Progress(
            TextColumn("{task.fields[title]}", markup=False),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> ConsoleReporter:
        self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()
        if self._log is not None:
            self._log.close()

    def _write(self, entry: dict[str, Any]) -> None:
        if self._log_path is None:
            return
        with naming(self._log_path):
            if self._log is None:  # only now: a run that is refused leaves the log of another as it was
                self._log_path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open(self._log_path, "ab", buffering=0)  # noqa: SIM115
                _remove_cut_line(self._log_path)
            line = json.dumps({"time": round(time.time(), 3), "run": self.title, **entry}) + "\n"
            write_all(self._log, memoryview(line.encode()))

    def note(self, line: str) -> None:
        """A line beside the progress."""
        self.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def begin(self, title: str) -> None:
        self.title, self._validation = title, ""

    def step(self, stage: str, step: int, total: int, metrics: dict[str, Any]) -> None:
        self._write({"stage": stage, "step": step, **metrics})
        if self._stage != (self.title, stage):
            self._stage = (self.title, stage)
            self._task = self._bars.add_task(stage, total=total, title=printable(self.title), metrics="")
        text = describe(metrics) + self._validation
        if metrics.get("skipped") == 1:  # the first of its stage, whatever else is shown
            reason = "a loss or gradient is not finite; such steps are left out and counted"
            self.console.print(
                f"{self.title} {stage} step {step}: {reason}", highlight=False, soft_wrap=True, markup=False
            )
        self._bars.update(self._task, completed=step, metrics=text)
        if not self.console.is_terminal and time.monotonic() - self._last > self.every_seconds:
            self._last = time.monotonic()
            self.note(f"{printable(self.title)} {stage} {step}/{total}  {text}".lstrip())

    def evaluation(self, stage: str, step: int, metric: str, value: float, best: float) -> None:
        self._write({"stage": stage, "step": step, f"validation_{metric.lower()}": value, "best": best})
        self._validation = f"  valid {metric} {value:.4f} (best {best:.4f})"
