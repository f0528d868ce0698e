"""Ctrl-C lets a run save and end, instead of interrupting it within a step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence


class Interrupted(Exception):
    """The run was to stop; everything up to here is saved."""


class StopRequested:
    """Whether a signal has requested a stop, for ``should_stop``; a second one ends at once, by KeyboardInterrupt.

    Use as a context manager. Signals come to the main thread alone: elsewhere, and for those that somebody else
    handles where ``yielding``, nothing is changed.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM), *, yielding: bool = False) -> None:
        self.requested = False
        self._signals, self._yielding = signals, yielding
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> StopRequested:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if not self._yielding or signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if sys.stderr is not None and sys.stderr.isatty():  # past the buffers, which the signal may have interrupted
            os.write(2, b"\nstopping after this step; once more ends at once, without saving\n")
