"""What needs no card: the errors. The kernel itself is in tests/kernels, by interpreter and on a card."""

import numpy as np
import pytest
import torch

from metarec_fast.ops import popularity_table
from metarec_fast.ops.gpu_negatives import GpuSeenItems, gpu_seen_items, sample_unseen_on_gpu
from metarec_fast.ops.sample_negatives import sample_unseen, seen_items

OFFSETS, ITEMS = np.array([0, 3, 5, 5]), np.array([0, 1, 2, 1, 1])


def test_a_card_is_needed_and_the_error_says_so():
    seen = seen_items(OFFSETS, ITEMS, num_items=3)
    with pytest.raises(RuntimeError, match="device must be a CUDA device, got cpu; on the CPU use sample_negatives"):
        gpu_seen_items(seen, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
            gpu_seen_items(seen)


@pytest.mark.parametrize("popular", [False, True])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([0], {}),
        ([1, 3], {}),
        ([-1], {}),
        ([1.0], {}),
        ([1], {"count": -1}),
        ([1], {"count": 1.0}),
        ([1], {"segments": np.array([0, 1, 2])}),
        ([1], {"segments": np.array([1, 2])}),
        ([1, 2], {"segments": np.array([0, 2, 1])}),
        ([1, 2], {"first_row": 2**32 - 1}),
        ([1], {"first_row": -1}),
        ([1], {"seed": 2**64}),
        ([1], {"stream": -1}),
        ([1], {"step": 2**48}),
    ],
    ids=str,
)
def test_errors_are_those_of_the_cpu(rows, options, popular):
    table = popularity_table(np.array([3, 2, 1])) if popular else None
    seen = seen_items(OFFSETS, ITEMS, num_items=3, table=table)
    rows, options = np.array(rows), {"count": 2, **options}
    with pytest.raises((TypeError, ValueError)) as expected:
        sample_unseen(seen, rows, **options)
    with pytest.raises(expected.type) as found:
        sample_unseen_on_gpu(GpuSeenItems.on(seen, torch.device("cpu")), rows, **options)
    assert str(found.value) == str(expected.value)


def test_a_row_of_more_negatives_than_the_counter_has_slots():
    gpu = GpuSeenItems.on(seen_items(OFFSETS, ITEMS, num_items=3), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"2\*\*33 negatives at most, position 1 of rows asks for more"):
        sample_unseen_on_gpu(gpu, np.array([1, 2]), count=4, segments=np.array([0, 1, 2**32]))
