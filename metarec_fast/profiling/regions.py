"""Named regions of a training step, to which a profile attributes time; without a profile they cost next to nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

P, R = ParamSpec("P"), TypeVar("R")

PREFIX = "metarec_fast.profile/"
_recording = False


def region(name: str) -> AbstractContextManager[object]:
    """A context whose operators are of the part ``name`` of a profile, while one is recorded."""
    return record_function(PREFIX + name) if _recording else nullcontext()


def in_region(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: calls are regions of this name."""

    def decorate(run: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(run)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with region(name):
                return run(*args, **kwargs)

        return within

    return decorate


@contextmanager
def recording() -> Iterator[None]:
    """Regions are recorded within this context. Not for several threads at once."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False
