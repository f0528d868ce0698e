from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metarec_fast.ops import pack_windows
from metarec_fast.reference import windows as reference
from metarec_fast.sampling.windows import count_windows
from tests.examples import examples


def sequences(lengths, dtype=np.int32):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return offsets, np.arange(100, 100 + offsets[-1]).astype(dtype)  # every event is another item


def unpack(batch):
    items, targets, offsets = (x.numpy() for x in batch)
    return [(items[a:b].tolist(), targets[a:b].tolist()) for a, b in pairwise(offsets)]


@st.composite
def problems(draw):
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    rows = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=10))
    max_length = draw(st.integers(1, 14))
    window = draw(st.sampled_from(["last", "sliding", "crop"]))
    options = {"max_length": max_length, "window": window}
    if window == "sliding":
        options["stride"] = draw(st.one_of(st.none(), st.integers(1, max_length)))
        index = st.lists(st.one_of(st.integers(0, 5), st.just(2**62)), min_size=len(rows), max_size=len(rows))
        options["window_index"] = np.array(draw(index), np.int64)
    for name, bits in (("seed", 64), ("stream", 64), ("step", 48), ("first_row", 31)):
        options[name] = draw(st.integers(0, 2**bits - 1))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    return *sequences(lengths, dtype), np.array(rows, np.int64), options


@given(problems())
@examples(150)
def test_same_bits_as_reference(problem):
    offsets, items, rows, options = problem
    for got, expected in zip(
        pack_windows(offsets, items, rows, **options),
        reference.pack_windows(offsets, items, rows, **options),
        strict=True,
    ):
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.usefixtures("poison")
def test_last_window_by_hand():
    offsets, items = sequences((5, 0, 1, 2, 3))
    assert unpack(pack_windows(offsets, items, np.arange(5), max_length=3)) == [
        ([101, 102, 103], [102, 103, 104]),
        ([], []),
        ([], []),
        ([106], [107]),
        ([108, 109], [109, 110]),
    ]


@pytest.mark.usefixtures("poison")
def test_sliding_windows_by_hand():
    offsets, items = sequences((8,))
    index = np.arange(4)
    rows = np.zeros(4, np.int64)
    disjoint = pack_windows(offsets, items, rows, max_length=3, window="sliding", window_index=index)
    assert [targets for _, targets in unpack(disjoint)] == [[105, 106, 107], [102, 103, 104], [101], []]
    overlapping = pack_windows(offsets, items, rows, max_length=3, window="sliding", stride=2, window_index=index)
    assert [inputs for inputs, _ in unpack(overlapping)] == [[104, 105, 106], [102, 103, 104], [100, 101, 102], [100]]


@pytest.mark.parametrize("stride", [1, 2, 3, 4, None])
def test_sliding_windows_cover_every_event_and_no_window_is_empty(stride):
    lengths = list(range(25))
    offsets, items = sequences(lengths)
    options = {"max_length": 4, "window": "sliding", "stride": stride}
    windows = {"max_length": 4, "window": "sliding", "stride": stride or 4}
    counts = [reference.count_windows(length, **windows) for length in lengths]
    np.testing.assert_array_equal(count_windows(np.array(lengths), **windows), counts)
    for user, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        rows = np.full(count + 1, user)
        got = unpack(pack_windows(offsets, items, rows, window_index=np.arange(count + 1), **options))
        assert all(0 < len(inputs) <= 4 for inputs, _ in got[:count])
        own = items[offsets[user] : offsets[user + 1]].tolist()
        assert {x for inputs, _ in got[:count] for x in inputs} == set(own[:-1])
        assert {x for _, targets in got[:count] for x in targets} == set(own[1:])
        # the windows before the oldest are full, and one more would hold nothing that is new
        assert all(len(inputs) == 4 for inputs, _ in got[: count - 1])
        if count:
            assert got[count - 1][0][0] == own[0]
        assert length >= 2 or count == 0


def test_crops_start_anywhere_equally_often_and_stay_inside():
    offsets, items = sequences((13, 40))
    rows = np.tile([0, 1], 4000)
    got = unpack(pack_windows(offsets, items, rows, max_length=5, window="crop", seed=1, step=8))
    for user, places in ((0, 8), (1, 35)):
        starts = np.array([inputs[0] for inputs, _ in got[user::2]]) - items[offsets[user]]
        assert all(len(inputs) == 5 for inputs, _ in got[user::2])
        assert all(np.diff([*inputs, targets[-1]]).tolist() == [1] * 5 for inputs, targets in got[user::2])
        assert stats.chisquare(np.bincount(starts, minlength=places)).pvalue > 1e-5
        assert starts.max() == places - 1


def test_a_row_of_a_split_batch_is_the_row_of_the_whole():
    offsets, items = sequences((30, 40, 50, 60))
    rows = np.array([3, 0, 1, 2, 3, 1])
    options = {"max_length": 5, "window": "crop", "seed": 4, "step": 2}
    whole = unpack(pack_windows(offsets, items, rows, **options))
    first = unpack(pack_windows(offsets, items, rows[:2], **options))
    second = unpack(pack_windows(offsets, items, rows[2:], first_row=2, **options))
    assert whole == first + second


def test_large_ids_and_tensors():
    items = torch.tensor([2**24 + 1, 2**31 + 1, 2**53 + 1])
    inputs, targets, _ = pack_windows(torch.tensor([0, 3]), items, torch.tensor([0]), max_length=5)
    assert inputs.tolist() == [2**24 + 1, 2**31 + 1]
    assert targets.tolist() == [2**31 + 1, 2**53 + 1]


def test_no_rows():
    offsets, items = sequences((3, 4))
    inputs, targets, packed = pack_windows(offsets, items, np.array([], np.int64), max_length=5)
    assert inputs.numel() == targets.numel() == 0
    assert packed.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": np.array([0, 3])}, ValueError, r"rows must be in \[0, 3\), got 3"),
        ({"rows": np.array([-1])}, ValueError, r"rows must be in \[0, 3\), got -1"),
        ({"rows": np.array([0], np.int32)}, TypeError, "rows must be int64, got int32"),
        ({"rows": [0]}, TypeError, "rows must be a numpy array or a torch.Tensor, got list"),
        ({"offsets": np.array([0, 5, 3, 9])}, ValueError, "offsets must rise"),
        ({"offsets": np.array([0, 3, 5, 99])}, ValueError, "offsets must rise"),
        ({"offsets": np.array([-2, 3, 5, 9])}, ValueError, "offsets must rise"),
        ({"offsets": np.array([], np.int64)}, ValueError, "offsets must be"),
        ({"items": np.arange(9.0)}, TypeError, "items must be int32 or int64, got float64"),
        ({"items": np.arange(18)[::2]}, ValueError, "items must be one-dimensional and contiguous"),
        ({"max_length": 0}, ValueError, "max_length must be in"),
        ({"window": "first"}, ValueError, "window must be one of last, sliding, crop, got 'first'"),
        ({"stride": 2}, ValueError, "stride belongs to window='sliding'"),
        ({"window": "sliding", "stride": 5}, ValueError, r"stride must be in \[1, 5\), got 5"),
        ({"window_index": np.array([0, 1, 2])}, ValueError, "window_index belongs to window='sliding'"),
        ({"window": "sliding", "window_index": np.array([0, -1, 2])}, ValueError, "window_index must be at least 0"),
        ({"window": "sliding", "window_index": np.array([0])}, ValueError, "window_index must have 3 elements, got 1"),
        ({"step": 2**48}, ValueError, "step must be in"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"first_row": 2**32}, ValueError, "first_row must be in"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "offsets": np.array([0, 3, 5, 9]),
        "items": np.arange(9),
        "rows": np.array([0, 1, 2]),
        "max_length": 4,
        **change,
    }
    with pytest.raises(error, match=message):
        pack_windows(**arguments)
