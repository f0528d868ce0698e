"""What the processor could do at most, measured: the yardstick of a profile and of benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

from metarec_fast import _C


class Peak(NamedTuple):
    """Of some threads: float32 operations a second by multiply-adds on registers, and bytes a second by a copy."""

    flops: float
    bytes: float


def multiply_adds(count: int, *, threads: int = 1) -> None:
    """Do at least ``count`` float32 multiply-adds on registers, in the vectors of the active instruction set.

    They are shared by ``threads`` threads of their own.
    """
    steps = -(-2 * count // (_C.fma_peak(1) * threads))
    if threads == 1:
        _C.fma_peak(steps)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_C.fma_peak, [steps] * threads))


def _fastest(run: Callable[[], object], *, tries: int = 5) -> float:
    seconds = []
    for _ in range(tries):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@cache
def measured_peak(threads: int) -> Peak:
    """Takes about a fifth of a second, once."""
    count = 100_000_000 * threads
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    return Peak(
        2 * count / _fastest(lambda: multiply_adds(count, threads=threads)),
        2 * source.nbytes / _fastest(lambda: target.copy_(source)),
    )
