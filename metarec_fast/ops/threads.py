"""Threads of the C++ operators."""

from __future__ import annotations

from metarec_fast import _C
from metarec_fast.ops.arrays import check_integer


def limit_threads(count: int) -> None:
    """Let C++ operators called from this thread use ``count`` threads; others keep torch's setting."""
    _C.limit_threads(check_integer(count, "count", least=1, below=2**16))
