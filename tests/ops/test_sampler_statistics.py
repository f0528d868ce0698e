"""The sampler against the distributions it states, with fixed seeds: millions of draws, every item of the catalogue."""

import numpy as np
import pytest
from scipy import stats

from metarec_fast.ops import epoch_order, popularity_table, sample_negatives, sample_shared_negatives

V, DRAWS = 1000, 2_000_000
COUNTS = np.random.default_rng(0).zipf(1.4, V).clip(max=10**6) - 1  # some items of count 0


def seen_by(kind):
    rng = np.random.default_rng(1)
    order = rng.permutation(np.flatnonzero(COUNTS))
    return {"nothing": order[:0], "few": order[:30], "most": order[:-40], "the popular": np.argsort(-COUNTS)[:200]}[
        kind
    ]


def stated(distribution, alpha, seen):
    p = np.zeros(V)
    p[COUNTS > 0] = COUNTS[COUNTS > 0] ** alpha
    p = np.ones(V) if distribution == "uniform" else p
    p[seen] = 0
    return p / p.sum()


def check(drawn, logq, p):
    """Frequencies of the items, and logq of every one that can be drawn."""
    frequencies = np.bincount(drawn, minlength=V)
    assert frequencies[p == 0].sum() == 0
    common = p * len(drawn) >= 10
    pooled = [*frequencies[common], frequencies[~common].sum()]
    expected = [*p[common] * len(drawn), p[~common].sum() * len(drawn)]
    if expected[-1] < 5:
        assert pooled[-1] < 40
        pooled, expected = pooled[:-1], np.array(expected[:-1]) / sum(expected[:-1]) * sum(pooled[:-1])
    assert stats.chisquare(pooled, expected).pvalue > 1e-5
    of_item = np.full(V, -np.inf)
    of_item[drawn] = logq
    np.testing.assert_array_equal(of_item[drawn], logq)  # one value an item
    np.testing.assert_allclose(np.exp(of_item[frequencies > 0]), p[frequencies > 0], rtol=2e-5)
    if (frequencies > 0).sum() == (p > 0).sum():
        assert np.exp(of_item).sum() == pytest.approx(1, abs=1e-6)
    return frequencies


@pytest.mark.parametrize("seen", ["nothing", "few", "most", "the popular"])
@pytest.mark.parametrize(("distribution", "alpha"), [("uniform", 0), ("popularity", 0.75), ("popularity", 0.25)])
def test_negatives_follow_the_distribution_and_logq_is_its_log(distribution, alpha, seen):
    seen = seen_by(seen)
    table = popularity_table(COUNTS, alpha=alpha) if distribution == "popularity" else None
    drawn, logq = sample_negatives(
        np.array([0, len(seen)]), seen.astype(np.int64), np.array([0]), num_items=V, count=DRAWS,
        distribution=distribution, table=table, seed=17,
    )  # fmt: skip
    p = stated(distribution, alpha, seen)
    frequencies = check(drawn[0].numpy(), logq[0].double().numpy(), p)
    assert (frequencies > 0).sum() == (p > 0).sum(), (
        "every drawable item was drawn, so the sum of exp(logq) was checked"
    )


@pytest.mark.parametrize(("distribution", "alpha"), [("uniform", 0), ("popularity", 0.75)])
def test_shared_negatives_follow_theirs(distribution, alpha):
    table = popularity_table(COUNTS, alpha=alpha) if distribution == "popularity" else None
    drawn, logq = sample_shared_negatives(num_items=V, count=DRAWS, distribution=distribution, table=table, seed=19)
    check(drawn.numpy(), logq.double().numpy(), stated(distribution, alpha, []))


@pytest.mark.parametrize("left", [0, 1, 777, 2999])
def test_who_has_seen_all_but_one_gets_that_one(left):
    items = np.delete(np.arange(3000), left)
    drawn, logq = sample_negatives(np.array([0, len(items)]), items, np.array([0]), num_items=3000, count=500)
    assert drawn.unique().tolist() == [left]
    assert logq.abs().max() == 0


@pytest.mark.parametrize("size", [2**24 + 2, 2**31, 2**31 + 1000])
def test_uniform_over_a_huge_catalogue_of_which_both_ends_are_seen(size):
    seen = np.concatenate((np.arange(3000), [size - 1]))
    drawn, logq = sample_negatives(np.array([0, len(seen)]), seen, np.array([0]), num_items=size, count=500_000)
    assert drawn.min() >= 3000
    assert drawn.max() < size - 1
    assert stats.kstest((drawn[0].numpy() - 3000) / (size - 3001), "uniform").pvalue > 1e-5
    np.testing.assert_allclose(logq.double(), -np.log(size - 3001), rtol=1e-7)


def test_an_epoch_of_any_small_size_visits_everything_once():
    for size in range(1, 2001):
        order = epoch_order(size, 0, size, seed=size, stream=3, epoch=size % 7).numpy()
        assert (np.bincount(order, minlength=size) == 1).all(), size


def test_an_epoch_of_a_billion_repeats_nothing():
    size, part = 10**9 + 7, 300_000
    starts = [0, 2**20, size // 2, 2**29 - part // 2, size - part]
    order = np.concatenate([epoch_order(size, start, part, seed=5, epoch=2).numpy() for start in starts])
    assert len(np.unique(order)) == len(order)
    assert order.min() >= 0
    assert order.max() < size
    assert stats.kstest(order / size, "uniform").pvalue > 1e-5
