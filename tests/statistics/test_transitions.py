from collections import Counter

import numpy as np
import pytest
import torch

from metarec_fast.data.domain import Sequences
from metarec_fast.statistics import transitions
from metarec_fast.statistics.transitions import TransitionKernel


def packed(rows, num_items, dtype=np.int32):
    items = np.concatenate([np.zeros(0, dtype), *(np.asarray(row, dtype) for row in rows)])
    return Sequences(np.cumsum([0, *map(len, rows)]), items, num_items)


def random_rows(seed=0, count=60, num_items=23):
    rng = np.random.default_rng(seed)
    return [rng.integers(num_items, size=rng.integers(0, 15)).tolist() for _ in range(count)]


def counted(rows, window, decay):
    """The definition, event by event."""
    weight = Counter()
    for row in rows:
        for i, a in enumerate(row):
            for lag, b in enumerate(row[i + 1 : i + 1 + window]):
                weight[a, b] += decay**lag
    return weight


def dense(kernel):
    matrix = np.zeros((kernel.num_items, kernel.num_items))
    for a in range(kernel.num_items):
        cut = slice(kernel.offsets[a], kernel.offsets[a + 1])
        assert (np.diff(kernel.columns[cut]) > 0).all()
        matrix[a, kernel.columns[cut]] = kernel.weights[cut]
    return matrix


@pytest.mark.parametrize("window", [1, 2, 5, 20])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_fit_counts_pairs_within_the_window(window, decay):
    rows = random_rows()
    kernel = TransitionKernel.fit(packed(rows, 23), window=window, decay=decay)
    expected = np.zeros((23, 23))
    for pair, weight in counted(rows, window, decay).items():
        expected[pair] = weight
    np.testing.assert_allclose(dense(kernel), expected, rtol=1e-6)
    assert len(kernel.columns) == (expected > 0).sum()
    assert kernel.columns.dtype == np.int32
    assert kernel.weights.dtype == np.float32
    np.testing.assert_allclose(dense(kernel.transposed()), dense(kernel).T)


@pytest.mark.parametrize("pairs", [1, 500])
def test_counts_are_the_same_however_many_pairs_are_held(pairs, monkeypatch):
    events = packed(random_rows(), 23)
    together = TransitionKernel.fit(events, window=14, decay=1)
    monkeypatch.setattr(transitions, "_PAIRS", pairs)
    apart = TransitionKernel.fit(events, window=14, decay=1)
    for name in ("offsets", "columns", "weights"):
        ours, theirs = getattr(apart, name), getattr(together, name)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize(("first", "window", "decay"), [(1, 1, 1.0), (2, 3, 1.0), (4, 10, 0.7), (20, 20, 0.9)])
def test_the_first_lag_leaves_nearer_pairs_out(first, window, decay):
    rows = random_rows()
    kernel = TransitionKernel.fit(packed(rows, 23), first=first, window=window, decay=decay)
    expected = np.zeros((23, 23))
    for row in rows:
        for lag in range(first, window + 1):
            np.add.at(expected, (row[:-lag], row[lag:]), decay ** (lag - 1))
    np.testing.assert_allclose(dense(kernel), expected, rtol=1e-6)
    assert len(kernel.columns) == (expected > 0).sum() and (first == 20) == (not expected.any())


def test_without_diagonal():
    kernel = TransitionKernel.fit(packed(random_rows(), 23))
    matrix = dense(kernel)
    assert np.diag(matrix).any()
    without = kernel.without_diagonal()
    np.testing.assert_array_equal(dense(without), matrix * (1 - np.eye(23)))
    assert (without.weights > 0).all() and without.columns.dtype == kernel.columns.dtype
    nothing = TransitionKernel.fit(packed([[1, 1, 1]], 5)).without_diagonal()
    assert nothing.offsets.tolist() == [0] * 6 and not len(nothing.columns)


@pytest.mark.parametrize("rows", [random_rows(), random_rows(count=4), [[0, 1, 2]], []], ids=len)
def test_two_steps_are_the_dense_product(rows):
    kernel = TransitionKernel.fit(packed(rows, 23)).normalised()
    twice = kernel.two_steps()
    np.testing.assert_allclose(dense(twice), dense(kernel) @ dense(kernel), rtol=1e-5, atol=1e-7)
    assert twice.columns.dtype == np.int32 and twice.weights.dtype == np.float32


def test_normalised():
    kernel = TransitionKernel.fit(packed(random_rows(), 23))
    matrix = dense(kernel)
    rows, columns = matrix.sum(1, keepdims=True), matrix.sum(0)
    np.testing.assert_allclose(dense(kernel.normalised()), matrix / np.maximum(rows, 1e-9), rtol=1e-5)
    cosine = matrix / np.maximum(np.sqrt(rows * columns), 1e-9)
    np.testing.assert_allclose(dense(kernel.normalised(row=0.5, column=0.5)), cosine, rtol=1e-5)


def test_rows():
    kernel = TransitionKernel.fit(packed(random_rows(), 23))
    items = np.array([3, 3, 22, 0])
    offsets, columns, weights = kernel.rows(items)
    matrix = dense(kernel)
    for i, item in enumerate(items):
        row = np.zeros(23)
        row[columns[offsets[i] : offsets[i + 1]]] = weights[offsets[i] : offsets[i + 1]]
        np.testing.assert_array_equal(row, matrix[item])
    assert [len(part) for part in kernel.rows(np.zeros(0, np.int64))] == [1, 0, 0]


@pytest.mark.parametrize(("last", "fade"), [(1, 1.0), (3, 0.5), (100, 0.9)])
def test_cooccurrence(last, fade):
    kernel = TransitionKernel.fit(packed(random_rows(), 23))
    histories = [[], [4], *random_rows(seed=1, count=9), []]
    offsets, items, values = kernel.scores(packed(histories, 23), last=last, fade=fade)
    matrix, expected = dense(kernel), np.zeros((len(histories), 23))
    for case, history in enumerate(histories):
        for age, item in enumerate(history[::-1][:last]):
            expected[case] += fade**age * matrix[item]
    assert values.dtype == torch.float32
    for case, row in enumerate(expected):
        mine = slice(offsets[case], offsets[case + 1])
        assert items[mine].tolist() == np.flatnonzero(row).tolist()
        np.testing.assert_allclose(values[mine].numpy(), row[row > 0], rtol=1e-6)


def test_nothing_to_count():
    for rows in ([], [[]], [[1], [2]]):
        kernel = TransitionKernel.fit(packed(rows, 5))
        assert kernel.offsets.tolist() == [0] * 6
        assert [x.tolist() for x in kernel.scores(packed([[1], []], 5))] == [[0, 0, 0], [], []]
    assert kernel.scores(packed([], 5))[0].tolist() == [0]


def test_ids_beyond_float_precision():
    big = 2**24 + 1
    kernel = TransitionKernel.fit(packed([[big, big - 1, big]], big + 1, np.int64), window=1)
    offsets, columns, weights = kernel.rows(np.array([big, big - 1]))
    assert (offsets.tolist(), columns.tolist(), weights.tolist()) == ([0, 1, 2], [big - 1, big], [1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"first": 0}, r"first must be in \[1, window=5\], got 0"),
        ({"first": 3, "window": 2}, r"first must be in \[1, window=2\], got 3"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\], got 0\.0"),
        ({"decay": 1.5}, r"decay must be in \(0, 1\], got 1\.5"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TransitionKernel.fit(packed([[1, 2]], 5), **options)
    with pytest.raises(ValueError, match="last must be at least 1, got 0"):
        TransitionKernel.fit(packed([[1, 2]], 5)).scores(packed([[1]], 5), last=0)


@pytest.mark.parametrize("k", [1, 2, 3, 50])
def test_the_strongest_of_equal_weights_are_the_first_columns(k):
    rng = np.random.default_rng(k)
    for lengths in ([0, 4, 0, 12, 3, 0], [0, 0], [12] * 12):  # rows without any, and none at all
        columns = [np.sort(rng.permutation(12)[:n]) for n in lengths]
        weights = [rng.choice([0.25, 0.5, 3.0], n).astype(np.float32) for n in lengths]
        kernel = TransitionKernel(np.cumsum([0, *lengths]), np.concatenate(columns), np.concatenate(weights))
        top = kernel.strongest(k)
        for row, (column, weight) in enumerate(zip(columns, weights, strict=True)):
            kept = np.sort(np.argsort(-weight, kind="stable")[:k])
            mine = slice(top.offsets[row], top.offsets[row + 1])
            assert top.columns[mine].tolist() == column[kept].tolist()
            assert top.weights[mine].tolist() == weight[kept].tolist()


def test_symmetric_sums_both_directions_and_strongest_keeps_the_largest():
    rng = np.random.default_rng(0)
    events = packed(rng.integers(12, size=(10, 6)), 12)
    kernel = TransitionKernel.fit(events, window=3, decay=0.7)
    both = kernel.symmetric()
    np.testing.assert_allclose(dense(both), dense(kernel) + dense(kernel).T, rtol=1e-6)
    assert all((np.diff(both.columns[a:b]) > 0).all() for a, b in zip(both.offsets, both.offsets[1:], strict=False))
    top = both.strongest(2)
    expected = np.zeros((12, 12))
    for row, weights in enumerate(dense(both)):
        for column in np.argsort(-weights, kind="stable")[:2]:
            expected[row, column] = weights[column]
    assert np.array_equal(dense(top), expected.astype(np.float32))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        both.strongest(0)
