"""Descriptors say how an item is used, in numbers that do not depend on which items and users they are."""

import numpy as np
import pytest

from metarec_fast.data import Sequences, leave_one_out, relabelled_copy, synthetic
from metarec_fast.statistics.descriptors import NUM_DESCRIPTORS, item_descriptors

DOMAIN = synthetic(source_users=300, num_sources=1).sources[0]


def test_other_names_for_items_and_users_change_nothing():
    copy = relabelled_copy(DOMAIN, seed=3)
    names = np.argsort(np.random.Philox(key=(1 << 64) | 3).random_raw(DOMAIN.num_items), kind="stable")
    before, after = (item_descriptors(domain.sequences) for domain in (DOMAIN, copy))
    assert before.shape == (DOMAIN.num_items, NUM_DESCRIPTORS) and before.dtype == np.float32
    np.testing.assert_allclose(after[names], before, rtol=0, atol=0.02)  # the order is found to a tolerance


def test_items_without_events_have_none_and_the_others_mean_zero():
    s = leave_one_out(DOMAIN).train
    wider = Sequences(s.offsets, s.items, s.num_items + 5, s.times)
    described = item_descriptors(wider)
    seen = np.bincount(s.items, minlength=wider.num_items) > 0
    assert not described[~seen].any() and (~seen).sum() >= 5
    np.testing.assert_allclose(described[seen].mean(0), 0, atol=1e-5)
    assert np.abs(described).max() < 2  # nine in (-1, 1), and their products
    assert (described[seen].std(0) > 0.02).all()


def test_neighbours_are_part_of_it():
    """Items 0, 1 and 2 are equally popular and always come in this order."""
    rows = [[0, 1, 2]] * 4 + [[3, 3, 3, 3]]
    s = Sequences(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int32), 4)
    described = item_descriptors(s)
    popularity, place, ends, _, later, ends_after, _, earlier, _ = described.T[:9]
    assert popularity[0] == popularity[1] == popularity[2]
    assert place[0] < place[1] < place[2]
    assert ends[2] > ends[0] == ends[1]
    assert later.argmax() == ends_after.argmax() == 1  # followed by 2 alone; 0 by 1 and 2
    assert earlier.argmin() == 1  # preceded by 0 alone; 2 by 0 and 1


@pytest.mark.parametrize("rows", [[], [[]], [[0]], [[0], [0]]], ids=str)
def test_hardly_any_events(rows):
    s = Sequences(np.cumsum([0, *map(len, rows)]), np.array([x for row in rows for x in row], np.int32), 3)
    described = item_descriptors(s)
    assert described.shape == (3, NUM_DESCRIPTORS) and np.isfinite(described).all() and not described[1:].any()
