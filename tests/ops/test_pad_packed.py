import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast.ops import pad_packed
from metarec_fast.reference import windows as reference
from tests.examples import examples


@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    length=st.integers(1, 11),
    side=st.sampled_from(["left", "right"]),
    count=st.sampled_from([None, 0, 1, 3]),
    dtype=st.sampled_from([torch.int64, torch.float32]),
)
@examples(100)
def test_same_as_reference(lengths, length, side, count, dtype):
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    shape = (offsets[-1],) if count is None else (offsets[-1], count)
    values = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape).to(dtype)
    fill = -7 if dtype == torch.int64 else 0
    got = pad_packed(values, torch.from_numpy(offsets), length=length, side=side, fill=fill)
    assert got.dtype == dtype
    expected = reference.pad_packed(values.numpy(), offsets, length=length, side=side, fill=fill)
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.usefixtures("poison")
def test_by_hand():
    values, offsets = torch.tensor([5, 6, 7]), torch.tensor([0, 0, 3])
    assert pad_packed(values, offsets, length=2, fill=9).tolist() == [[9, 9], [6, 7]]
    assert pad_packed(values, offsets, length=4, side="right").tolist() == [[0, 0, 0, 0], [5, 6, 7, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(3, dtype=torch.int32)}, TypeError, "values must be int64 or float32, got int32"),
        ({"values": np.zeros(3)}, TypeError, "values must be a torch.Tensor, got numpy.ndarray: pass torch.from_numpy"),
        ({"values": torch.zeros(3, 1, 1)}, ValueError, r"values must be \[T\] or \[T, K\]"),
        ({"values": torch.zeros(4)}, ValueError, "offsets must rise from 0 to the number of rows"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, "offsets must rise"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, r"offsets must be \[B\+1\]"),
        ({"length": 0}, ValueError, "length must be in"),
        ({"side": "both"}, ValueError, "side must be left or right, got 'both'"),
        ({"fill": 1}, ValueError, "fill must be 0 for float32 values, got 1"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"values": torch.zeros(3), "offsets": torch.tensor([0, 1, 3]), "length": 2}
    with pytest.raises(error, match=message):
        pad_packed(**{**good, **change})
