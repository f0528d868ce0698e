"""epoch_order: a shuffled order of any length, entry by entry, without holding it."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import check_integer, check_randomness, span
from metarec_fast.ops.register import empty


def epoch_order(size: int, first: int, count: int, *, seed: int = 0, stream: int = 0, epoch: int = 0) -> Tensor:
    """Entries [first, first + count) of the permutation of [0, size) that belongs to (seed, stream, epoch).

    Returns int64 [count]. Any entry costs the same, so an order of 10**9 entries needs no memory and no past. The same
    bits as ``reference.epoch_order``. Raises ValueError for entries outside the order.
    """
    check_integer(size, "size", least=1, below=2**63)
    check_integer(first, "first", least=0, below=size + 1)
    check_integer(count, "count", least=0, below=size - first + 1)
    random = check_randomness(seed, stream, epoch)
    order = empty((count,), dtype=torch.int64, device=torch.device("cpu"))
    _C.epoch_order(span(order), size=size, first=first, count=count, seed=seed, stream=stream, epoch=random["step"])
    return order
