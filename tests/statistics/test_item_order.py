"""Items' place in the course of time: the least-squares line through all users' sequences."""

import numpy as np
import pytest

from metarec_fast.statistics.item_order import item_order
from tests.statistics.test_transitions import packed, random_rows


def dense(rows, num_items, window=10, decay=0.8, ridge=0.3):
    """The minimum as the docstring defines it, from its normal equations."""
    equations, right = ridge * np.eye(num_items), np.zeros(num_items)
    for row in rows:
        for i, a in enumerate(row):
            for lag, b in enumerate(row[i + 1 : i + 1 + window], 1):
                step = np.zeros(num_items)
                step[b] += 1
                step[a] -= 1
                equations += decay ** (lag - 1) * np.outer(step, step)
                right += decay ** (lag - 1) * lag * step
    order = np.linalg.solve(equations, right)
    events = np.bincount([item for row in rows for item in row], minlength=num_items)
    order -= np.average(order, weights=events)
    return np.where(events > 0, order / np.sqrt(np.average(order**2, weights=events)), 0)


@pytest.mark.parametrize("options", [{}, {"window": 2, "decay": 0.5}, {"ridge": 5.0}])
def test_it_is_the_minimum_it_says_it_is(options):
    rows = random_rows(count=40, num_items=30)
    got = item_order(packed(rows, 32), **options)
    np.testing.assert_allclose(got, dense(rows, 32, **options), atol=2e-3)
    assert not got[30:].any()


def walks(seed=0, users=400, items=300):
    """Users go through a few items around a moment of their own, later ones later."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.integers(items - 40) + rng.choice(40, 8, replace=False)).tolist() for _ in range(users)]


def test_a_course_of_time_is_found_though_nobody_sees_more_than_a_piece():
    order = item_order(packed(walks(), 300))
    assert np.corrcoef(order, np.arange(300))[0, 1] > 0.95


def test_it_reverses_with_time_and_does_not_depend_on_names():
    rows = walks(users=100)
    order = item_order(packed(rows, 300))
    backwards = item_order(packed([row[::-1] for row in rows], 300))
    np.testing.assert_allclose(backwards, -order, atol=1e-6)
    names = np.random.default_rng(1).permutation(300)
    renamed = item_order(packed([names[row].tolist() for row in rows], 300))
    np.testing.assert_allclose(renamed[names], order, atol=1e-2)


def test_mean_and_deviation_are_over_events():
    rows = walks(users=50)
    order = item_order(packed(rows, 300))
    of_events = order[np.concatenate(rows)]
    assert of_events.mean() == pytest.approx(0, abs=1e-9) and of_events.std() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("rows", [[], [[]], [[3]], [[1], [2]], [[4, 4, 4]]])
def test_nothing_follows_anything(rows):
    assert not item_order(packed(rows, 5)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ridge must be above 0, got 0.0"),
        ({"window": 0}, "window must"),
        ({"decay": 1.5}, "decay must"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        item_order(packed([[0, 1]], 2), **options)
