import numpy as np
import pytest

from metarec_fast.ops import epoch_order
from metarec_fast.ops.epoch_batches import EpochBatches
from metarec_fast.ops.sample_negatives import popularity_table, seen_items
from metarec_fast.reference import negatives, windows


def sequences():
    offsets = np.cumsum([0, 3, 0, 1, 20, 9, 2, 0])
    return offsets, np.random.default_rng(0).integers(0, 40, offsets[-1])


@pytest.mark.parametrize("window", ["last", "sliding", "crop"])
@pytest.mark.parametrize("distribution", [None, "uniform", "popularity"])
@pytest.mark.usefixtures("poison")
def test_a_batch_is_its_three_operators_one_after_the_other(window, distribution):
    offsets, items = sequences()
    options = {"max_length": 4, "window": window, "stride": 2 if window == "sliding" else None}
    starts = np.cumsum([0, *windows.count_windows(offsets, max_length=4, window=window, stride=options["stride"] or 4)])
    table = popularity_table(np.bincount(items, minlength=40) + 1) if distribution == "popularity" else None
    seen = seen_items(offsets, items, num_items=40, table=table) if distribution else None
    batches = EpochBatches(offsets, items, starts, seen=seen, count=3, seed=5, stream=3, **options)
    first, count = 1, int(starts[-1]) - 1
    *packed, users, drawn, logq = batches.draw(first, count, epoch=7, step=9)

    ids = epoch_order(int(starts[-1]), first, count, seed=5, stream=3, epoch=7).numpy()
    expected_users = np.searchsorted(starts, ids, side="right") - 1
    np.testing.assert_array_equal(users.numpy(), expected_users)
    random = {"seed": 5, "stream": 3, "step": 9}
    index = ids - starts[expected_users] if window == "sliding" else None
    expected = windows.pack_windows(offsets, items, expected_users, window_index=index, **random, **options)
    for a, b in zip(packed, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
    if distribution is None:
        assert drawn is None
        assert logq is None
        return
    expected_drawn, expected_logq = negatives.sample_negatives(
        offsets,
        items,
        expected_users,
        num_items=40,
        count=3,
        segments=expected[2],
        weights=None if table is None else table.weights,
        **random,
    )
    np.testing.assert_array_equal(drawn.numpy(), expected_drawn)
    np.testing.assert_allclose(logq.numpy(), expected_logq, rtol=3e-7, atol=2e-7)


def test_bad_arguments():
    offsets, items = sequences()
    starts = np.cumsum([0, 1, 0, 0, 1, 1, 1, 0])
    batches = EpochBatches(offsets, items, starts, max_length=4)
    with pytest.raises(ValueError, match="must lie in the epoch of 4 windows, got 2 and 3"):
        batches.draw(2, 3, epoch=0, step=0)
    with pytest.raises(ValueError, match="must lie in the epoch of 4 windows, got -1 and 3"):
        batches.draw(-1, 3, epoch=0, step=0)
    with pytest.raises(ValueError, match="step must be in"):
        batches.draw(0, 1, epoch=0, step=2**48)
    with pytest.raises(ValueError, match="starts must have 8 elements, got 7"):
        EpochBatches(offsets, items, starts[1:], max_length=4)
    with pytest.raises(ValueError, match="starts must rise from 0"):
        EpochBatches(offsets, items, starts[::-1].copy(), max_length=4)
    with pytest.raises(ValueError, match="seen must hold 7 users to match offsets, got 2"):
        EpochBatches(offsets, items, starts, max_length=4, seen=seen_items(offsets[:3], items, num_items=40))
