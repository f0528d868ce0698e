"""What the processor could do at most, measured: the yardstick of a profile."""

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
    rounds = 500_000
    with ThreadPoolExecutor(threads) as pool:
        flops = _C.fma_peak(rounds) * threads / _fastest(lambda: list(pool.map(_C.fma_peak, [rounds] * threads)))
    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    return Peak(flops, 2 * source.nbytes / _fastest(lambda: target.copy_(source)))
