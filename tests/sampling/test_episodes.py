import numpy as np
import pytest

from metarec_fast.data import Sequences
from metarec_fast.sampling import support_and_query


def sequences(lengths):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Sequences(offsets, np.arange(offsets[-1]), int(offsets[-1]) + 1)  # every event is another item


@pytest.mark.parametrize("window", ["last", "crop"])
@pytest.mark.parametrize("query_share", [0.1, 0.5, 0.75])
def test_two_disjoint_windows_of_each_user(window, query_share):
    lengths = np.random.default_rng(0).integers(0, 30, 80)
    data = sequences(lengths)
    support, query = support_and_query(
        data, by="windows", query_share=query_share, batch_size=10, max_length=6, window=window, negatives=1
    )
    assert support.num_windows == query.num_windows == (lengths >= 4).sum()
    for step in range(support.steps_per_epoch):
        older, newer = support.batch(step), query.batch(step)
        assert older.users.tolist() == newer.users.tolist()
        for b, user in enumerate(older.users.tolist()):
            rows = [slice(x.offsets[b], x.offsets[b + 1]) for x in (older, newer)]
            shown = [{*x.items[r].tolist(), *x.targets[r].tolist()} for x, r in zip((older, newer), rows, strict=True)]
            assert max(shown[0]) < min(shown[1])  # ids rise with time: support is older, and nothing is in both
            n = lengths[user]
            cut = data.offsets[user + 1] - min(max(int(np.ceil(query_share * n)), 2), n - 2)
            assert max(shown[0]) < cut <= min(shown[1])
            if window == "last":
                assert max(shown[0]) == cut - 1
                assert max(shown[1]) == data.offsets[user + 1] - 1
            # negatives avoid the whole user, not the stretch alone
            for x, r in zip((older, newer), rows, strict=True):
                assert not np.isin(x.negatives[r].numpy(), data[user]).any()


@pytest.mark.parametrize("by", ["windows", "users"])
def test_the_two_sides_draw_apart(by):
    data = sequences([10] * 40)
    sides = support_and_query(data, by=by, batch_size=20, max_length=3, negatives=4)
    drawn = [side.batch(0).negatives[:40] for side in sides]
    assert (drawn[0] == drawn[1]).float().mean() < 0.1  # of 401 items


@pytest.mark.parametrize("window", ["last", "sliding"])
def test_two_disjoint_sets_of_users(window):
    lengths = np.random.default_rng(1).integers(0, 12, 200)
    data = sequences(lengths)
    options = {"by": "users", "query_share": 0.3, "batch_size": 16, "max_length": 3, "window": window}
    sides = support_and_query(data, **options, seed=4)
    users = [{u for step in range(s.steps_per_epoch) for u in s.batch(step).users.tolist()} for s in sides]
    able = set(np.flatnonzero(lengths >= 2).tolist())
    assert not users[0] & users[1]
    assert users[0] | users[1] == able
    assert len(users[1]) == round(0.3 * len(able))
    again, other = (support_and_query(data, **options, seed=seed)[1] for seed in (4, 5))
    assert np.array_equal(again.batch(0).users, sides[1].batch(0).users)
    assert {u for step in range(other.steps_per_epoch) for u in other.batch(step).users.tolist()} != users[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "rows"}, "by must be windows or users, got 'rows'"),
        ({"by": "users", "query_share": 1.0}, r"query_share must be in \(0, 1\), got 1.0"),
        ({"by": "users", "query_share": 0.1}, "query_share=0.1 of 2 users with windows leaves one side without any"),
        ({"by": "windows", "window": "sliding"}, "by='windows' needs window='last' or 'crop', got 'sliding'"),
        ({"by": "windows"}, "sequences hold no window: every user has fewer than four events"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        support_and_query(sequences([3, 2, 1]), batch_size=2, **options)
