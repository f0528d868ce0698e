"""Batches made in the background, so that a training step finds its data ready."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from metarec_fast.checks import POSITIVE_COUNT, Range, check_count
from metarec_fast.ops.threads import limit_threads

T = TypeVar("T")


class PrefetchError(RuntimeError):
    """Making the batch of a step failed; the cause is chained."""


class Prefetch(Generic[T]):
    """``make(step)`` for steps start, start + 1, ..., each made in a thread while earlier ones are used.

    make: a function of the step, such as ``sampler.batch`` or ``mixture.batches``; it may not write into buffers that
        an earlier result still shows: ``depth`` made ahead, the one handed over last and any that the caller keeps.
        It runs beside the training step, on one thread of C++ and without the GIL. torch's current device and stream
        are a thread's own: name the GPU ("cuda:1"). The thread keeps ``make`` alive, so close a Prefetch that ``make``
        itself holds.
    depth: results made ahead, the one being made included; 2 is double buffering.
    stop: the first step not made; None: no end.

    Iterate, or ask with ``get(step)``: the next step comes at once, any other restarts there. Use as a context manager
    or call ``close``. ``wait_share`` tells which share of the time between requests was spent waiting.

    Raises ValueError for bad options, PrefetchError where ``make`` raised, RuntimeError in a forked process, where the
    thread does not exist.
    """

    def __init__(self, make: Callable[[int], T], *, start: int = 0, stop: int | None = None, depth: int = 2) -> None:
        self._process = os.getpid()
        start, depth = check_count(start, "start", Range(0, 2**63)), check_count(depth, "depth", POSITIVE_COUNT)
        stop = None if stop is None else check_count(stop, "stop", Range(0, 2**63))
        self._make, self._stop_at, self._depth = make, stop, depth
        self.waited_s = self.used_s = 0.0  # while the caller waited, and while it did something else
        self._handed_over: float | None = None
        self._begin(start)

    @property
    def wait_share(self) -> float:
        """Share of the time since the first result that was spent waiting for the next."""
        total = self.waited_s + self.used_s
        return self.waited_s / total if total else 0.0

    def get(self, step: int) -> T:
        """``make(step)``. Raises ValueError for a step outside [0, stop)."""
        if step < 0 or (self._stop_at is not None and step >= self._stop_at):
            wanted = "at least 0" if self._stop_at is None else f"in [0, {self._stop_at})"
            raise ValueError(f"step must be {wanted}, got {step}")
        if step != self._next:
            self.close()
            self._next = step
        return next(self)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if os.getpid() != self._process:
            raise RuntimeError("Prefetch does not survive a fork: make one in each process")
        if self._stop_at is not None and self._next >= self._stop_at:
            self.close()
            raise StopIteration
        if not self._end.alive:
            self._begin(self._next)
        requested = time.perf_counter()
        try:
            step, result, error = self._ready.get()
            self._room.release()
        except BaseException:  # an interrupt: what the queue has let go of is lost
            self.close()
            raise
        now = time.perf_counter()
        if self._handed_over is not None:  # the first batch is not counted: nothing could have hidden it
            self.waited_s += now - requested
            self.used_s += requested - self._handed_over
        self._handed_over = now
        if error is not None:
            self.close()
            raise PrefetchError(f"making the batch of step {step} failed: {error}") from error
        self._next = step + 1
        return result

    def close(self) -> None:
        """Stop the thread; results made ahead are dropped. Asking again starts another."""
        self._end()
        self._handed_over = None

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _begin(self, step: int) -> None:
        self._next = step
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._room, closing = threading.Semaphore(self._depth), threading.Event()
        arguments = (self._make, step, self._stop_at, self._ready, self._room, closing)
        thread = threading.Thread(target=_produce, args=arguments, daemon=True, name="metarec_fast.Prefetch")
        # Runs once: from close, when this is collected, or before the interpreter ends, which would otherwise tear the
        # thread out of the C++ that it is in.
        self._end = weakref.finalize(self, _end, self._process, thread, self._room, closing)
        thread.start()


def _end(process: int, thread: threading.Thread, room: threading.Semaphore, closing: threading.Event) -> None:
    if os.getpid() != process:  # a fork has no thread, and perhaps locks that nobody will release
        return
    closing.set()
    room.release()  # it may be waiting for room
    if thread.is_alive() and thread is not threading.current_thread():  # which may have collected the Prefetch
        thread.join()


def _produce(
    make: Callable,
    step: int,
    stop: int | None,
    ready: queue.SimpleQueue,
    room: threading.Semaphore,
    closing: threading.Event,
) -> None:
    """Holds no reference to its Prefetch, which may so be collected."""
    limit_threads(1)  # the training step has the cores
    while stop is None or step < stop:
        room.acquire()
        if closing.is_set():
            return
        try:
            result, error = make(step), None
        except BaseException as caught:
            result, error = None, caught
        ready.put((step, result, error))
        if error is not None:
            return
        del result  # the caller's alone, while this waits for room
        step += 1
