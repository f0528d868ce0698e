"""What bench/gpu_kernels.py times: a case, and the rates of the card that its roofline is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Rates(NamedTuple):
    """Bytes and operations a second: of a copy, and of products of bfloat16, of float32, and of float32 as TF32."""

    copy: float
    product: float
    float32: float
    tf32: float


class Case(NamedTuple):
    """What is timed against what: names of the row, calls with ours first, check of ours, the least time in ms."""

    names: dict[str, str]
    providers: Iterator[tuple[str, Callable[[], Any]]]
    check: Callable[[Any], None]
    roofline_ms: float
