import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast.data import Domain, Sequences, Vocabulary, leave_one_out, limit_users, time_cut
from tests.examples import examples

# Per user, (item, time) events in any order of time; sorted below.
EVENTS = st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=7), min_size=1, max_size=6)
HISTORY = st.none() | st.integers(1, 4)


def domain_of(users, timed=True):
    users = [sorted(events, key=lambda event: event[1]) for events in users]
    offsets = np.concatenate([[0], np.cumsum([len(events) for events in users])]).astype(np.int64)
    items = np.array([item for events in users for item, _ in events], np.int32)
    times = np.array([time for events in users for _, time in events], np.int64)
    names = [Vocabulary(range(len(users))), Vocabulary(range(6))]
    return Domain("d", Sequences(offsets, items, 6, times if timed else None), *names), users


def listed(sequences):
    return [sequences[u].tolist() for u in range(len(sequences))]


def rows_of(cases):
    assert cases.users.dtype == cases.targets.dtype == np.int64
    assert len(cases) == len(cases.users) == len(cases.histories)
    return list(zip(cases.users.tolist(), listed(cases.histories), cases.targets.tolist(), strict=True))


def newest(items, max_history):
    return items if max_history is None else items[-max_history:]


@examples(100)
@given(EVENTS, HISTORY, st.booleans())
def test_leave_one_out_is_what_it_says(users, max_history, timed):
    domain, users = domain_of(users, timed)
    split = leave_one_out(domain, max_history=max_history)
    train, valid, test = [], [], []
    for u, events in enumerate(users):
        items = [item for item, _ in events]
        if len(items) < 3:
            train.append(items)
            continue
        train.append(items[:-2])
        valid.append((u, newest(items[:-2], max_history), items[-2]))
        test.append((u, newest(items[:-1], max_history), items[-1]))
    assert listed(split.train) == train
    assert rows_of(split.valid) == valid
    assert rows_of(split.test) == test
    if timed:
        assert split.train.times.tolist() == [
            t for events in users for _, t in (events[:-2] if len(events) >= 3 else events)
        ]
    else:
        assert split.train.times is None


@examples(100)
@given(EVENTS, HISTORY, st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda cuts: cuts[0] < cuts[1]))
def test_time_cut_is_what_it_says(users, max_history, cuts):
    domain, users = domain_of(users)
    valid_from, test_from = cuts
    train = [[item for item, time in events if time < valid_from] for events in users]
    if not any(train):
        with pytest.raises(ValueError, match="nothing to train on"):
            time_cut(domain, valid_from=valid_from, test_from=test_from)
        return
    split = time_cut(domain, valid_from=valid_from, test_from=test_from, max_history=max_history)
    valid, test = [], []
    for u, events in enumerate(users):
        between = [item for item, time in events if valid_from <= time < test_from]
        after = [item for item, time in events if time >= test_from]
        if between:
            valid.append((u, newest(train[u], max_history), between[0]))
        if after:
            test.append((u, newest(train[u] + between, max_history), after[0]))
    assert listed(split.train) == train
    assert rows_of(split.valid) == valid
    assert rows_of(split.test) == test


def test_time_cut_leaks_nothing(world):
    domain = world.target
    split = time_cut(domain)
    sequences = domain.sequences
    cut = split.train.times.max()
    for cases in (split.valid, split.test):
        at = sequences.offsets[cases.users] + cases.histories.lengths  # of the target: histories are whole
        assert np.array_equal(sequences.items[at], cases.targets)
        queries = sequences.times[at]
        assert len(cases) > 10
        # Nothing that was seen, by any user, is as late as anything asked.
        assert max(cut, cases.histories.times.max()) < queries.min()
        for i in range(len(cases)):
            a, b = cases.histories.offsets[i : i + 2]
            user = sequences.offsets[cases.users[i]]
            assert np.array_equal(cases.histories.times[a:b], sequences.times[user : user + b - a])
        cut = queries.max()


@pytest.mark.parametrize(("valid", "test"), [(0.1, 0.1), (0.3, 0.2), (0.02, 0.5)])
def test_time_cut_shares(make_domain, valid, test):
    rng = np.random.default_rng(0)
    times = np.sort(rng.permutation(1000).reshape(50, 20), axis=1)
    domain = make_domain(np.tile(np.arange(20), (50, 1)).tolist(), times.tolist())
    split = time_cut(domain, valid=valid, test=test)
    assert split.train.num_events == round(1000 * (1 - valid - test))
    expected = [u for u in range(50) if (times[u] >= round(1000 * (1 - test))).any()]
    assert split.test.users.tolist() == expected


def test_time_cut_words_count_what_is_cold(make_domain):
    domain = make_domain([[0, 1, 2], [3], [0, 4]], [[1, 5, 9], [9], [2, 9]])
    split = time_cut(domain, valid_from=5, test_from=9)
    assert rows_of(split.valid) == [(0, [0], 1)]
    assert rows_of(split.test) == [(0, [0, 1], 2), (1, [], 3), (2, [0], 4)]
    assert "1 validation cases, 1 with a target item unseen in training" in split.protocol
    assert "3 test cases, 3 with a target item unseen in training, 1 with an empty history" in split.protocol
    assert "training before 5" in split.protocol


def test_float_times_and_float_cuts(make_domain):
    domain = make_domain([[0, 1, 2]], [[0.25, 0.5, 0.75]])
    split = time_cut(domain, valid_from=0.5, test_from=0.75)
    assert (rows_of(split.valid), rows_of(split.test)) == ([(0, [0], 1)], [(0, [0, 1], 2)])


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (None, {}, "time_cut needs times, and domain 'made' has none"),
        ([[1, 2, 3]], {"valid_from": 2}, "given together"),
        ([[1, 2, 3]], {"valid_from": 3, "test_from": 2}, "before test_from, got 3 and 2"),
        ([[1, 2, 3]], {"valid_from": 1, "test_from": 2}, "nothing to train on"),
        ([[1, 2, 3]], {"valid": 0.5, "test": 0.5}, "leave a share to train on"),
        ([[1, 2, 3]], {"test": 0}, "must be positive"),
        ([[1, 1, 1]], {}, "too coarse"),
        ([[1, 2, 3]], {"max_history": 0}, "max_history must be at least 1, got 0"),
    ],
)
def test_time_cut_errors(make_domain, times, options, message):
    with pytest.raises(ValueError, match=message):
        time_cut(make_domain([[0, 1, 2]], times), **options)


def test_empty_domains(make_domain):
    empty = make_domain([])
    split = leave_one_out(empty)
    assert (len(split.train), len(split.valid), len(split.test)) == (0, 0, 0)
    with pytest.raises(ValueError, match="has none"):
        time_cut(make_domain([], []))
    with pytest.raises(ValueError, match="needs users with training events"):
        limit_users(split, 0.5, seed=0)
    with pytest.raises(ValueError, match="max_history"):
        leave_one_out(empty, max_history=0)


def test_short_users_are_trained_on_and_not_evaluated(make_domain):
    split = leave_one_out(make_domain([[0], [1, 0], [], [0, 1, 1]]))
    assert listed(split.train) == [[0], [1, 0], [], [0]]
    assert rows_of(split.valid) == [(3, [0], 1)]
    assert rows_of(split.test) == [(3, [0, 1], 1)]
    assert "users with fewer events are in training whole" in split.protocol


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 1])
def test_limit_users_keeps_a_share(world, fraction):
    split = leave_one_out(world.target)
    limited = limit_users(split, fraction, seed=3)
    kept = np.flatnonzero(limited.train.lengths)
    assert len(kept) == max(1, round(fraction * world.target.num_users))
    full, part = listed(split.train), listed(limited.train)
    assert [part[u] for u in kept] == [full[u] for u in kept]
    assert limited.train.num_events == sum(len(full[u]) for u in kept)
    assert limited.train.num_items == split.train.num_items
    assert rows_of(limited.valid) == [q for q in rows_of(split.valid) if q[0] in set(kept.tolist())]
    assert limited.test is split.test
    assert limited.protocol.startswith(split.protocol)
    assert (
        f"limited to {len(kept)} of 250 users (fraction {fraction:g}, seed 3), test users all kept" in limited.protocol
    )


def test_limit_users_is_nested_and_seeded(world):
    split = leave_one_out(world.target)

    def kept(fraction, seed):
        return set(np.flatnonzero(limit_users(split, fraction, seed=seed).train.lengths).tolist())

    assert kept(0.1, 0) < kept(0.2, 0) < kept(0.9, 0)
    assert kept(0.2, 0) == kept(0.2, 0)
    assert kept(0.2, 0) != kept(0.2, 1)
    # Users are drawn evenly, not by their place.
    drawn = np.concatenate([list(kept(0.2, seed)) for seed in range(100)])
    assert len(drawn) == 5000
    assert abs(drawn.mean() - 124.5) < 5 * np.sqrt(250**2 / 12 / 5000)


def test_limit_users_counts_only_users_with_training_events(make_domain):
    split = time_cut(make_domain([[0, 1], [2], [0, 1]], [[1, 9], [9], [2, 6]]), valid_from=5, test_from=8)
    for seed in range(10):
        limited = limit_users(split, 0.5, seed=seed)
        (user,) = np.flatnonzero(limited.train.lengths)
        assert user in (0, 2)
        assert limited.valid.users.tolist() == ([2] if user == 2 else [])
        assert limited.test.users.tolist() == [0, 1]


@pytest.mark.parametrize(("fraction", "seed"), [(0, 0), (-0.1, 0), (1.5, 0), (float("nan"), 0), (0.5, -1)])
def test_limit_users_errors(world, fraction, seed):
    with pytest.raises(ValueError, match="must be in"):
        limit_users(leave_one_out(world.target), fraction, seed=seed)
