"""EpochBatches: epoch_order, pack_windows and sample_negatives bound to one domain, two calls into C++ a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops._arrays import INTEGERS, Array, address, as_array, check_integer, check_offsets, check_randomness
from metarec_fast.ops._register import empty
from metarec_fast.ops.pack_windows import WINDOWS, Window, check_window
from metarec_fast.ops.sample_negatives import SeenItems

CPU = torch.device("cpu")


class EpochBatches:
    """The windows of one domain in the order of an epoch, with negatives for every position.

    offsets, items, max_length, window, stride: as in ``pack_windows``. Arrays are read in place and must not change.
    starts: int64 [U+1] rising from 0: user u has the windows of ids starts[u] to starts[u + 1] - 1, the newest first.
    seen, count: as in ``sample_unseen``; no negatives if seen is None.
    seed, stream: as in each of the three.

    Raises TypeError or ValueError as they do, and for starts that fall.
    """

    def __init__(
        self,
        offsets: Array,
        items: Array,
        starts: Array,
        *,
        max_length: int,
        window: Window = "last",
        stride: int | None = None,
        seen: SeenItems | None = None,
        count: int = 0,
        seed: int = 0,
        stream: int = 0,
    ) -> None:
        offsets, items = check_offsets(offsets), as_array(items, "items", dtypes=INTEGERS)
        starts = as_array(starts, "starts", size=len(offsets))
        if starts[0] != 0 or (starts[1:] < starts[:-1]).any():
            raise ValueError("starts must rise from 0")
        if seen is not None and len(seen) != len(offsets) - 1:
            raise ValueError(f"seen must hold {len(offsets) - 1} users to match offsets, got {len(seen)}")
        random = check_randomness(seed, stream, 0)
        self._count = check_integer(count, "count", least=0, below=2**33) if seen is not None else 0
        self._draws = seen is not None
        self._arrays = offsets, items, starts, seen  # kept alive: C++ holds their addresses
        table = None if seen is None else seen.table
        self._batches = _C.EpochBatches(
            offsets=address(offsets),
            items=address(items),
            starts=address(starts),
            seen_offsets=0 if seen is None else address(seen.offsets),
            counts=0 if seen is None else address(seen.counts),
            seen=0 if seen is None else address(seen.items),
            cells=0 if table is None else address(table.cells),
            cumulative=0 if table is None else address(table.cumulative),
            seen_weights=0 if table is None else address(seen.weights),
            num_users=len(offsets) - 1,
            events=len(items),
            num_items=1 if seen is None else seen.num_items,
            wide=items.dtype.itemsize == 8,
            seen_wide=seen is not None and seen.items.dtype == torch.int64,
            window=WINDOWS.index(window),
            max_length=max_length,
            stride=check_window(window, max_length, stride),
            count=self._count,
            seed=random["seed"],
            stream=random["stream"],
        )

    def draw(
        self, first: int, count: int, *, epoch: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The windows at places [first, first + count) of ``epoch``, their random numbers those of ``step``.

        Returns inputs [T], targets [T], offsets [count+1] and users [count], int64, then negatives [T, K] int64 and
        logq [T, K] float32, or None twice. Raises ValueError for places outside the epoch.
        """
        check_integer(count, "count", least=0)
        users = empty((count,), dtype=torch.int64, device=CPU)
        packed = empty((count + 1,), dtype=torch.int64, device=CPU)
        begins = np.empty(count, np.int64)
        addresses = users.data_ptr(), address(begins), packed.data_ptr()
        T = self._batches.plan(*addresses, first, count, epoch, step)
        inputs = empty((T,), dtype=torch.int64, device=CPU)
        targets = empty((T,), dtype=torch.int64, device=CPU)
        negatives = logq = None
        if self._draws:
            negatives = empty((T, self._count), dtype=torch.int64, device=CPU)
            logq = empty((T, self._count), dtype=torch.float32, device=CPU)
        self._batches.fill(
            *addresses,
            inputs.data_ptr(),
            targets.data_ptr(),
            0 if negatives is None else negatives.data_ptr(),
            0 if logq is None else logq.data_ptr(),
            count,
            step,
        )
        return inputs, targets, packed, users, negatives, logq
