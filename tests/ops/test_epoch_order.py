import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metarec_fast.ops import epoch_order
from metarec_fast.reference import permutation
from tests.examples import examples


@pytest.mark.parametrize("size", [*range(1, 34), 255, 256, 257, 1000, 70_001])
@pytest.mark.usefixtures("poison")
def test_visits_everything_once(size):
    order = epoch_order(size, 0, size, seed=3, stream=2, epoch=size).numpy()
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


@given(
    size=st.one_of(st.integers(1, 40), st.integers(1, 2**63 - 1)),
    place=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**48 - 1),
)
@examples(60)
def test_same_bits_as_reference(size, place, seed, stream, epoch):
    first = min(int(size * place), size - 1)
    count = min(9, size - first)
    order = epoch_order(size, first, count, seed=seed, stream=stream, epoch=epoch).numpy()
    expected = permutation.epoch_order(size, first, count, seed=seed, stream=stream, epoch=epoch)
    np.testing.assert_array_equal(order, expected)
    assert order.min() >= 0
    assert order.max() < size


def test_entries_do_not_depend_on_the_slice():
    whole = epoch_order(1000, 0, 1000, seed=1)
    parts = [epoch_order(1000, i, 125, seed=1) for i in range(0, 1000, 125)]
    assert whole.tolist() == [x for part in parts for x in part.tolist()]


def test_seed_stream_and_epoch_each_change_the_order():
    orders = {
        tuple(epoch_order(50, 0, 50, **{"seed": 4, "stream": 5, "epoch": 6, **change}).tolist())
        for change in ({}, {"seed": 5}, {"stream": 4}, {"epoch": 7}, {"seed": 5, "stream": 4})
    }
    assert len(orders) == 5


@pytest.mark.parametrize("size", [5, 6, 12])
def test_every_entry_and_every_pair_of_neighbours_is_equally_likely(size):
    orders = np.array([epoch_order(size, 0, size, seed=9, epoch=e).numpy() for e in range(6000)])
    for place in range(size):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=size)).pvalue > 1e-5
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size)
    off_diagonal = pairs[np.arange(size * size) % (size + 1) != 0]
    assert stats.chisquare(off_diagonal).pvalue > 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0), "size must be in"),
        ((5, -1, 2), "first must be in"),
        ((5, 3, 3), "count must be in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        epoch_order(*arguments)
    with pytest.raises(ValueError, match="step must be in"):
        epoch_order(5, 0, 5, epoch=2**48)
    with pytest.raises(ValueError, match="seed must be in"):
        epoch_order(5, 0, 5, seed=-1)
    with pytest.raises(TypeError, match="size must be an integer, got float"):
        epoch_order(5.0, 0, 5)
