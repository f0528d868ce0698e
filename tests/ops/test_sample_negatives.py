import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from metarec_fast.ops import popularity_table, sample_negatives, sample_shared_negatives
from metarec_fast.reference import negatives as reference
from tests.examples import examples


def sequences(users, dtype=np.int64):
    offsets = np.concatenate(([0], np.cumsum([len(u) for u in users]))).astype(np.int64)
    return offsets, np.array([i for u in users for i in u], dtype)


def check_logq(got, expected):
    # log and its float32 rounding may differ in the last place between C++ and NumPy
    np.testing.assert_allclose(got.numpy(), expected, rtol=3e-7, atol=2e-7)


@st.composite
def problems(draw, *, popular):
    V = draw(st.one_of(st.integers(1, 3), st.integers(4, 90)))
    some = st.lists(st.integers(0, V - 1), max_size=2 * V)  # repeated items, empty users
    nearly_all = st.integers(0, V - 1).map(lambda left: [i for i in range(V) if i != left])
    users = draw(st.lists(st.one_of(some, nearly_all), min_size=1, max_size=5))
    counts = np.array(draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 10**6]), min_size=V, max_size=V)))
    drawable = set(np.flatnonzero(counts).tolist()) if popular else set(range(V))
    alive = [u for u, seen in enumerate(users) if drawable - set(seen)]
    rows = draw(st.lists(st.sampled_from(alive), max_size=6)) if alive else []
    positions = draw(st.lists(st.integers(0, 70), min_size=len(rows), max_size=len(rows)))
    options = {
        "num_items": V,
        "count": draw(st.sampled_from([0, 1, 2, 5])),
        "segments": draw(st.sampled_from([None, np.concatenate(([0], np.cumsum(positions, dtype=np.int64)))])),
    }
    for name, bits in (("seed", 64), ("stream", 64), ("step", 48), ("first_row", 31)):
        options[name] = draw(st.integers(0, 2**bits - 1))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    return *sequences(users, dtype), np.array(rows, np.int64), counts, options


@given(problems(popular=False))
@examples(100)
def test_uniform_has_the_bits_of_the_reference(problem):
    offsets, items, rows, _, options = problem
    negatives, logq = sample_negatives(offsets, items, rows, **options)
    expected, expected_logq = reference.sample_negatives(offsets, items, rows, **options)
    assert (negatives.dtype, logq.dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(negatives.numpy(), expected)
    check_logq(logq, expected_logq)


@given(problems(popular=True))
@examples(60)
def test_popularity_has_the_bits_of_the_reference(problem):
    offsets, items, rows, counts, options = problem
    if not counts.any():
        return
    table = popularity_table(counts)
    weights = reference.integer_weights(counts, alpha=0.75)
    np.testing.assert_array_equal(table.weights, weights)
    np.testing.assert_array_equal(table.cells, reference.alias_table(weights))
    negatives, logq = sample_negatives(offsets, items, rows, distribution="popularity", table=table, **options)
    expected, expected_logq = reference.sample_negatives(offsets, items, rows, weights=weights, **options)
    np.testing.assert_array_equal(negatives.numpy(), expected)
    check_logq(logq, expected_logq)


LENGTHS = [0, 1, 7, 31, 33, 64, 129, 700, 999]  # of what a user has seen: below and above every internal threshold


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
@pytest.mark.usefixtures("poison")
def test_nothing_seen_is_drawn_whatever_its_share(distribution):
    V = 1000
    rng = np.random.default_rng(0)
    users = [rng.permutation(V)[:n] for n in LENGTHS]
    offsets, items = sequences(users, np.int32)
    rows = np.arange(len(users))
    table = popularity_table(1 + np.arange(V) ** 2) if distribution == "popularity" else None
    options = {"num_items": V, "count": 700, "distribution": distribution, "table": table, "seed": 5, "step": 3}
    negatives, _ = sample_negatives(offsets, items, rows, **options)
    for user, drawn in zip(users, negatives.numpy(), strict=True):
        assert not np.isin(drawn, user).any()
        assert ((drawn >= 0) & (drawn < V)).all()
    assert len(np.unique(negatives[-1])) == 1  # who has seen all but one gets that one
    weights = None if table is None else table.weights
    expected, _ = reference.sample_negatives(
        offsets, items, rows[5:7], num_items=V, count=40, weights=weights, seed=5, step=3, first_row=5
    )
    np.testing.assert_array_equal(negatives[5:7, :40].numpy(), expected)


@pytest.mark.parametrize("seen", [(), (3,), (0, 19), tuple(range(0, 20, 2)), tuple(range(18))], ids=len)
@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_frequencies_and_logq_are_those_stated(distribution, seen):
    V, N = 20, 60_000
    counts = np.arange(V) % 7 * 50
    offsets, items = sequences([seen])
    table = popularity_table(counts, alpha=0.5) if distribution == "popularity" else None
    negatives, logq = sample_negatives(
        offsets,
        items,
        np.array([0]),
        num_items=V,
        count=N,
        distribution=distribution,
        table=table,
        seed=2,
    )
    weights = np.sqrt(counts) if table else np.ones(V)
    weights[list(seen)] = 0
    p = weights / weights.sum()
    frequencies = np.bincount(negatives[0], minlength=V)
    assert frequencies[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert stats.chisquare(frequencies[p > 0], N * p[p > 0]).pvalue > 1e-5
    np.testing.assert_allclose(np.exp(logq[0].double().numpy()), p[negatives[0]], rtol=2e-6)


def test_most_of_the_weight_seen():
    # nearly every draw from the table is refused, so the exact inverse decides
    counts = np.array([10**12, 1, 2, 3, 0, 4])
    table = popularity_table(counts, alpha=1.0)
    negatives, logq = sample_negatives(
        *sequences([[0]]), np.array([0]), num_items=6, count=50_000, distribution="popularity", table=table
    )
    frequencies = np.bincount(negatives[0], minlength=6)
    p = table.weights / table.weights[1:].sum()  # integers of weights this small are coarse: these are the true ones
    assert frequencies[0] == frequencies[4] == 0
    assert stats.chisquare(frequencies[[1, 2, 3, 5]], 50_000 * p[[1, 2, 3, 5]]).pvalue > 1e-5
    np.testing.assert_allclose(np.exp(logq[0].double().numpy()), p[negatives[0]], rtol=3e-6)


@pytest.mark.parametrize("V", [2**24 + 3, 2**31, 2**31 + 7, 2**32 + 5, 2**40])
def test_huge_catalogues(V):
    seen = [0, 1, V - 1, V - 2, 2**24 + 1, V // 2, V // 2]
    offsets, items = sequences([seen, []])
    rows = np.array([0, 1])
    negatives, logq = sample_negatives(offsets, items, rows, num_items=V, count=5000, seed=1)
    expected, _ = reference.sample_negatives(offsets, items, rows, num_items=V, count=100, seed=1)
    np.testing.assert_array_equal(negatives[:, :100].numpy(), expected)
    drawn = negatives.numpy()
    assert drawn.min() >= 0
    assert V * 0.99 < drawn.max() < V
    assert (drawn % 2 == 1).any()  # odd ids above 2**53 / 2 would not survive a float
    assert stats.kstest(drawn.ravel() / V, "uniform").pvalue > 1e-5
    assert logq[0, 0].item() == pytest.approx(-math.log(V - 6))


def test_every_rank_of_a_huge_catalogue_is_shifted_past_what_is_seen():
    # all but a few items at both ends of the id range
    V = 2**31 + 3
    seen = np.concatenate((np.arange(3), np.arange(V - 3, V)))
    negatives, _ = sample_negatives(*sequences([seen]), np.array([0]), num_items=V, count=1000)
    assert not np.isin(negatives.numpy(), seen).any()


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_rows_of_a_split_batch_are_those_of_the_whole(distribution):
    rng = np.random.default_rng(1)
    offsets, items = sequences([rng.integers(0, 300, n) for n in (5, 0, 40, 9, 80, 3)])
    rows = np.array([5, 4, 0, 2, 1, 3, 4])
    segments = np.array([0, 7, 7, 90, 91, 95, 200, 203])
    options = {"num_items": 300, "count": 3, "distribution": distribution, "seed": 8, "stream": 1, "step": 77}
    whole, logq = sample_negatives(offsets, items, rows, segments=segments, **options)
    first = sample_negatives(offsets, items, rows[:3], segments=segments[:4], **options)
    second = sample_negatives(offsets, items, rows[3:], segments=segments[3:] - 90, first_row=3, **options)
    assert torch.equal(whole, torch.cat((first[0], second[0])))
    assert torch.equal(logq, torch.cat((first[1], second[1])))


def test_seed_stream_and_step_each_change_the_negatives():
    offsets, items = sequences([[1, 2, 3]])
    base = {"seed": 4, "stream": 5, "step": 6}
    drawn = {
        tuple(sample_negatives(offsets, items, np.array([0]), num_items=10**6, count=8, **{**base, **c})[0][0].tolist())
        for c in ({}, {"seed": 5}, {"stream": 4}, {"step": 7}, {"step": 6 + 2**32}, {"first_row": 1})
    }
    assert len(drawn) == 6


@pytest.mark.parametrize("V", [1, 10, 5000])
@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_shared_negatives(distribution, V):
    counts = np.arange(V) % 5 + 1
    table = popularity_table(counts) if distribution == "popularity" else None
    options = {"num_items": V, "count": 3000, "seed": 3, "stream": 7, "step": 12}
    negatives, logq = sample_shared_negatives(distribution=distribution, table=table, **options)
    weights = None if table is None else table.weights
    expected, expected_logq = reference.sample_shared_negatives(weights=weights, **options)
    np.testing.assert_array_equal(negatives.numpy(), expected)
    check_logq(logq, expected_logq)
    p = counts**0.75 / (counts**0.75).sum() if table else np.full(V, 1 / V)
    np.testing.assert_allclose(np.exp(logq.double().numpy()), p[negatives], rtol=2e-6)


def test_shared_and_private_negatives_use_other_words():
    offsets, items = sequences([[]])
    private, _ = sample_negatives(offsets, items, np.array([0]), num_items=10**6, count=50)
    shared, _ = sample_shared_negatives(num_items=10**6, count=50)
    assert (private[0] == shared).sum() < 2


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0, -1.0])
def test_the_table_is_exact(alpha):
    counts = np.random.default_rng(0).zipf(1.3, 3000) - 1
    table = popularity_table(np.minimum(counts, 10**9), alpha=alpha)
    step = 2 / (len(counts) * reference.CAPACITY)  # integer weights: one unit of rounding, one of making up the sum
    mass = table.cells["threshold"].astype(np.int64)
    np.add.at(mass, table.cells["alias"], reference.CAPACITY - table.cells["threshold"].astype(np.int64))
    np.testing.assert_array_equal(mass, table.weights)
    powers = np.where(counts > 0, np.clip(counts, 1, 10**9).astype(float) ** alpha, 0)
    np.testing.assert_allclose(table.weights / table.weights.sum(), powers / powers.sum(), rtol=1e-9, atol=step)
    np.testing.assert_allclose(np.exp(table.log_p.astype(float)), table.weights / table.weights.sum(), rtol=2e-6)


GOOD = {"offsets": np.array([0, 2, 5]), "items": np.array([0, 1, 0, 1, 2]), "rows": np.array([0]), "num_items": 3}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": np.array([0, 1])}, ValueError, r"row 1 has seen every item that could be drawn \(3 of 3\)"),
        ({"rows": np.array([2])}, ValueError, r"rows must be in \[0, 2\), got 2"),
        ({"rows": np.array([0.0])}, TypeError, "rows must be int64, got float64"),
        ({"items": np.array([0, 3, 0, 1, 2])}, ValueError, r"items must be in \[0, 3\), but row 0 holds"),
        ({"items": np.array([0, -1, 0, 1, 2], np.int32)}, ValueError, r"items must be in \[0, 3\), but row 0 holds"),
        ({"offsets": np.array([0, 6, 5])}, ValueError, "offsets must rise"),
        ({"num_items": 0}, ValueError, "num_items must be in"),
        ({"count": -1}, ValueError, "count must be in"),
        ({"segments": np.array([0, 2, 1])}, ValueError, "segments must have 2 elements, got 3"),
        ({"segments": np.array([1, 2])}, ValueError, "segments must rise from 0"),
        ({"segments": np.array([0, -2])}, ValueError, "segments must rise from 0"),
        ({"distribution": "zipf"}, ValueError, "distribution must be one of uniform, popularity, mixed, got 'zipf'"),
        ({"table": popularity_table(np.ones(3, np.int64))}, ValueError, "table belongs to distribution='popularity'"),
        (
            {"distribution": "popularity", "table": popularity_table(np.ones(4, np.int64))},
            ValueError,
            "table must be over num_items=3 items, got one over 4",
        ),
        (
            {"distribution": "popularity", "table": popularity_table(np.array([5, 5, 0]))},
            ValueError,
            r"row 0 has seen every item that could be drawn \(2 of 3\)",
        ),
        ({"distribution": "popularity", "num_items": 2**31}, ValueError, "num_items must be in"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sample_negatives(**{**GOOD, "count": 2, **change})


def test_a_row_without_positions_needs_no_negatives():
    negatives, _ = sample_negatives(**{**GOOD, "rows": np.array([1, 0])}, count=2, segments=np.array([0, 0, 3]))
    assert negatives.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        (np.array([0, 0]), 0.5, "counts must be non-negative and not all 0"),
        (np.array([1, -1]), 0.5, "counts must be non-negative and not all 0"),
        (np.array([], np.int64), 0.5, "counts must be non-negative and not all 0"),
        (np.array([1, 2]), math.nan, "alpha must be finite, got nan"),
    ],
)
def test_bad_tables(counts, alpha, message):
    with pytest.raises(ValueError, match=message):
        popularity_table(counts, alpha=alpha)
    with pytest.raises(ValueError, match="needs table"):
        sample_shared_negatives(num_items=3, count=2, distribution="popularity")
    with pytest.raises(ValueError, match="table must be over num_items=3 items, got one over 4"):
        table = popularity_table(np.ones(4, np.int64))
        sample_shared_negatives(num_items=3, count=2, distribution="popularity", table=table)
    with pytest.raises(ValueError, match="num_items must be in"):
        sample_shared_negatives(num_items=0, count=2)
