"""Controls keep what they promise to keep, and destroy the rest."""

from dataclasses import replace

import numpy as np
import pytest

from metarec_fast.data import (
    Domain,
    Sequences,
    Vocabulary,
    fingerprint,
    random_items,
    relabelled_copy,
    shuffled_order,
    shuffled_ties,
)
from tests.tiny import DOMAINS

SOURCE = DOMAINS.sources[0]
CONTROLS = (shuffled_order, random_items, relabelled_copy)


def users_of(domain):
    return [domain.sequences[u].tolist() for u in range(domain.num_users)]


def test_shuffled_order_keeps_what_each_user_chose():
    before, after = users_of(SOURCE), users_of(shuffled_order(SOURCE, seed=3))
    assert [sorted(row) for row in before] == [sorted(row) for row in after]
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 3


def test_random_items_keep_popularity_and_lengths_alone():
    changed = random_items(SOURCE, seed=3)
    s, c = SOURCE.sequences, changed.sequences
    assert np.bincount(s.items).tolist() == np.bincount(c.items).tolist()
    assert s.offsets.tolist() == c.offsets.tolist()
    kept = [len({*a} & {*b}) / len({*a}) for a, b in zip(users_of(SOURCE), users_of(changed), strict=True)]
    assert np.mean(kept) < 0.6  # a user has 15 of 40 items


def test_a_copy_is_the_domain_under_other_ids():
    copy = relabelled_copy(SOURCE, seed=3)
    before, after = SOURCE.sequences, copy.sequences
    popularity = [np.sort(np.bincount(s.items, minlength=s.num_items)) for s in (before, after)]
    assert popularity[0].tolist() == popularity[1].tolist()
    # one relabelling of items and one of users take the copy back: found from the times, which are all different
    at = np.argsort(after.times)[np.searchsorted(np.sort(after.times), before.times)]
    pairs = {*zip(before.items.tolist(), after.items[at].tolist(), strict=True)}
    assert len(pairs) == len(np.unique(before.items)) == len({b for _, b in pairs})
    assert sum(a == b for a, b in pairs) < len(pairs) / 2
    of_user = np.repeat(np.arange(len(after)), after.lengths)[at]
    assert all(len({*of_user[a:b]}) == 1 for a, b in zip(before.offsets, before.offsets[1:], strict=False))


def test_a_copy_can_leave_users_out():
    """Who are left are the same under the same labels, in the same order."""
    without = np.arange(0, SOURCE.num_users, 3)
    whole, part = relabelled_copy(SOURCE, seed=3), relabelled_copy(SOURCE, seed=3, without=without)
    order = np.argsort(np.random.Philox(key=3).random_raw(SOURCE.num_users), kind="stable")
    kept = [user for user, before in zip(users_of(whole), order.tolist(), strict=True) if before % 3]
    assert users_of(part) == kept and part.num_users == len(kept) == SOURCE.num_users - len(without)
    assert part.num_items == whole.num_items


def test_only_ties_are_shuffled():
    items = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32)
    times = np.array([1, 1, 1, 1, 2, 3, 3, 3, 3, 3])
    domain = Domain("d", Sequences(np.array([0, 7, 10]), items, 10, times), Vocabulary([0, 1]), Vocabulary(range(10)))
    seen = {tuple(shuffled_ties(domain, seed=s).sequences.items.tolist()) for s in range(400)}
    for row in seen:
        assert (sorted(row[:4]), row[4], sorted(row[5:7]), sorted(row[7:])) == ([0, 1, 2, 3], 4, [5, 6], [7, 8, 9])
    assert len(seen) > 200  # of 4! 2! 3! = 288
    assert shuffled_ties(domain, seed=0).name == "d"
    with pytest.raises(ValueError, match="domain 'd' has no times"):
        shuffled_ties(replace(domain, sequences=replace(domain.sequences, times=None)), seed=0)


@pytest.mark.parametrize("change", CONTROLS)
def test_a_seed_is_one_control(change):
    one, again, other = change(SOURCE, seed=1), change(SOURCE, seed=1), change(SOURCE, seed=2)
    assert users_of(one) == users_of(again) != users_of(other)
    assert one.name != SOURCE.name
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


def test_a_fingerprint_tells_order_and_times_but_not_names():
    s = SOURCE.sequences
    assert fingerprint(replace(SOURCE, name="other")) == fingerprint(SOURCE)
    wide = replace(s, items=s.items.astype(np.int64))
    assert fingerprint(replace(SOURCE, sequences=wide)) == fingerprint(SOURCE)
    for changed in (replace(s, times=s.times + 1), replace(s, times=None), replace(s, items=s.items[::-1].copy())):
        assert fingerprint(replace(SOURCE, sequences=changed)) != fingerprint(SOURCE)
