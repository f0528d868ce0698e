"""What a domain's statistics say, against the definitions in dense matrices."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from metarec_fast.cooccurrence.features import (
    AGES,
    CANDIDATE_FEATURES,
    CASE_FEATURES,
    CENTRES,
    FEATURES,
    ITEM_FEATURES,
    LAGS,
    NEIGHBOURS,
    PLACES,
    POPULARITY_FEATURES,
    REACH,
    RELATIONS,
    CooccurrenceEpisode,
    CooccurrenceStatistics,
    cooccurrence_graph,
)
from metarec_fast.statistics.item_order import item_order
from tests.statistics.test_transitions import packed, random_rows

V = 23


def counts(rows, num_items, first, last, decay):
    matrix = np.zeros((num_items, num_items))
    for row in rows:
        for i, a in enumerate(row):
            for lag in range(first, last + 1):
                if i + lag < len(row):
                    matrix[a, row[i + lag]] += decay ** (lag - 1)
    return matrix


def shares(matrix, axis=1):
    return matrix / np.maximum(matrix.sum(axis, keepdims=True), 1e-30)


def strongest(matrix, k):
    kept = np.zeros_like(matrix)
    for r, row in enumerate(matrix):
        order = np.argsort(-row.astype(np.float32), kind="stable")[:k]
        kept[r, order] = row[order]
    return kept


def relations(rows, num_items):
    """The docstring of cooccurrence_graph in dense matrices: [V, V, RELATIONS], in its order, diagonal zero."""
    near, wide = counts(rows, num_items, 1, 3, 0.6), counts(rows, num_items, 1, 10, 0.9)
    wide = wide + wide.T
    cosine = wide / np.maximum(np.sqrt(wide.sum(1, keepdims=True) * wide.sum(0)), 1e-30)
    np.fill_diagonal(cosine, 0)
    step = shares(strongest(cosine, NEIGHBOURS))
    two = step @ step
    np.fill_diagonal(two, 0)
    said = [5 * np.log1p(near), 20 * shares(near), 20 * shares(near.T), 20 * cosine, 20 * strongest(two, REACH)]
    said.append(1.5 * np.log1p(wide))
    for first, last in LAGS:
        followers = counts(rows, num_items, first, last, 1)
        said += [20 * shares(followers), 20 * shares(followers.T)]
    stacked = np.stack(said, 2)
    stacked[np.arange(num_items), np.arange(num_items)] = 0
    return stacked


def spread(graph):
    full = np.zeros((graph.num_items, graph.num_items, graph.relations))
    for r in range(graph.num_items):
        cut = slice(graph.offsets[r], graph.offsets[r + 1])
        assert (np.diff(graph.items[cut]) > 0).all() and r not in graph.items[cut]
        full[r, graph.items[cut]] = graph.values[cut]
    return full


@pytest.mark.parametrize("num_items", [V, 90])  # of 90, an item has more neighbours than a step takes
def test_the_graph_holds_every_relation_as_defined(num_items):
    rows = random_rows(count=60 if num_items == V else 150, num_items=num_items)
    graph = cooccurrence_graph(packed(rows, num_items))
    expected = relations(rows, num_items)
    got = spread(graph)
    assert graph.relations == RELATIONS == expected.shape[2]
    for r in range(RELATIONS):
        assert got[:, :, r].any()
        np.testing.assert_allclose(got[:, :, r], expected[:, :, r], rtol=1e-4, atol=1e-5, err_msg=str(r))
    assert (graph.values != 0).any(1).all()  # no entry that says nothing
    assert not np.array_equal(got[:, :, 1], got[:, :, 2])


def test_a_graph_of_nothing():
    for rows in ([], [[1], [2], []], [[3, 3, 3]]):
        graph = cooccurrence_graph(packed(rows, 5))
        assert graph.offsets.tolist() == [0] * 6 and graph.values.shape == (0, RELATIONS)
    cases = CooccurrenceStatistics(packed([], 5)).cases(packed([[1], []], 5))
    assert cases.offsets.tolist() == [0, 0, 0] and not cases.levels[:, :3].any()


def test_cases_hold_features_of_popularity_order_and_the_history():
    rows = [row for row in random_rows() if 7 not in row]  # 7 is never seen
    train = packed(rows, V)
    statistics = CooccurrenceStatistics(train)
    histories = [[], [4], [3, 7], [7], *random_rows(seed=1, count=9), []]
    cases = statistics.cases(packed(histories, V), np.arange(len(histories)))
    seen = Counter(item for row in rows for item in row)
    popularity = np.array([seen[i] for i in range(V)])
    known = np.log1p(popularity[popularity > 0])
    z = np.where(popularity > 0, (np.log1p(popularity) - known.mean()) / known.std(), 0)
    order = np.rint(item_order(train).clip(-4, 4) * PLACES) / PLACES
    bumps = np.exp(-((order[:, None] - CENTRES) ** 2) / 0.72) * (popularity > 0)[:, None]
    expected = np.column_stack((z, 0.3 * z**2, popularity > 0, np.ones(V), order, bumps))
    np.testing.assert_allclose(cases.levels[cases.level_of].numpy(), expected, atol=1e-4)
    assert order[7] == 0 and len(set(order)) > 10
    assert cases.levels.shape == (len(set(zip(popularity, order, strict=True))), ITEM_FEATURES)
    assert cases.multiplicity.tolist() == np.bincount(cases.level_of).tolist()
    assert cases.case.shape == (len(histories), CASE_FEATURES)
    for row, got in zip(histories, cases.case.tolist(), strict=True):
        newest = popularity[row[-1]] if row else 0
        share = np.mean(popularity[row] > 0) if row else 0
        wanted = [np.log1p(len(row)) / 2 - 0.8, float(newest > 0), np.log1p(newest) / 3, share]
        weights = 0.7 ** np.arange(len(row))[::-1] * (popularity[row] > 0) if row else np.zeros(0)
        known = weights.sum() > 0
        centre = np.average(order[row], weights=weights) if known else 0
        spread = np.sqrt(np.average((order[row] - centre) ** 2, weights=weights)) if known else 0
        wanted += [centre, spread, order[row[-1]] if row else 0, min(weights.sum(), 1)]
        assert got == pytest.approx(wanted, abs=1e-6)
    assert cases.case_of.tolist() == np.repeat(np.arange(len(histories)), np.diff(cases.offsets)).tolist()
    assert cases.targets.tolist() == list(range(len(histories)))
    assert statistics.cases(packed([[1]], V)).targets is None


def test_candidates_have_their_distance_from_the_history():
    rows = [row for row in random_rows() if 7 not in row]
    cases = CooccurrenceStatistics(packed(rows, V)).cases(packed(random_rows(seed=1, count=9), V))
    x = cases.of_candidates
    assert x.shape == (len(cases.candidates), CANDIDATE_FEATURES)
    item, case = cases.levels[cases.level_of[cases.candidates]], cases.case[cases.case_of]
    assert torch.equal(x[:, :FEATURES], cases.cooccurrence)
    assert torch.equal(x[:, FEATURES:-3], torch.cat((item[:, :POPULARITY_FEATURES], case), 1))
    order, centre, newest = item[:, POPULARITY_FEATURES], case[:, 4], case[:, 6]
    away = torch.stack((order - centre, order - newest, (order - centre).abs()), 1)
    torch.testing.assert_close(x[:, -3:], away * (item[:, 2:3] > 0))


def test_histories_of_another_catalogue_are_refused():
    statistics = CooccurrenceStatistics(packed(random_rows(), V))
    with pytest.raises(ValueError, match=rf"histories must be of the statistics' {V} items, got ones of 9"):
        statistics.cases(packed([[1]], 9))


def test_cooccurrence_is_the_mean_over_each_group_of_ages():
    rows = random_rows()
    said = relations(rows, V)
    histories = [[], [4], *random_rows(seed=1, count=6), list(range(V)) * 2]
    cases = CooccurrenceStatistics(packed(rows, V)).cases(packed(histories, V))
    assert cases.cooccurrence.shape[1] == FEATURES
    for case, row in enumerate(histories):
        newest_first = row[::-1]
        parts = []
        for begin, end in pairwise(AGES):
            group = newest_first[begin:end]
            parts.append(said[group].mean(0) if group else np.zeros((V, RELATIONS)))
        expected = np.concatenate([*parts, np.isin(np.arange(V), row)[:, None]], 1)
        mine = slice(cases.offsets[case], cases.offsets[case + 1])
        candidates = cases.candidates[mine].numpy()
        assert candidates.tolist() == np.flatnonzero(expected[:, :-1].any(1)).tolist()
        np.testing.assert_allclose(
            cases.cooccurrence[mine].numpy(), np.log1p(expected[candidates]), rtol=1e-4, atol=1e-5
        )


def test_sequences_of_some_users_are_taken_in_order():
    rows = random_rows(count=9)
    part = packed(rows, V).take(np.array([5, 2, 2]))
    assert [part[u].tolist() for u in range(3)] == [rows[5], rows[2], rows[2]] and part.num_items == V


# episodes


def own_items(users=12, length=6):
    """Each user has items of their own."""
    return packed([[u * length + i for i in range(length)] for u in range(users)], users * length)


def episode():
    return CooccurrenceEpisode(own_items(), statistics=np.arange(8), query_users=np.arange(8, 12))


def test_a_batch_is_a_pure_function_of_its_seed():
    rows = packed(random_rows(), V)
    made = [CooccurrenceEpisode(rows, statistics=np.arange(30), query_users=np.arange(30, 60)) for _ in range(2)]
    made[0].batch(7, seed=(9, 9))  # what was asked before does not matter
    first, second = (one.batch(16, seed=(1, 2)) for one in made)
    other = made[0].batch(16, seed=(1, 3))
    for name in ("offsets", "candidates", "cooccurrence", "case", "targets"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(first.targets, other.targets)


def test_query_users_are_not_counted():
    one = episode()
    assert one.statistics.counts[:48].tolist() == [1] * 48 and not one.statistics.counts[48:].any()
    cases = one.batch(64, seed=(0,))
    assert not len(cases.candidates)  # their items are nobody else's
    assert not cases.case[:, 1:].any()
    assert (one.statistics.counts[cases.targets] == 0).all()


def test_queries_are_the_last_four_events_after_what_came_before():
    rows = own_items()
    # nobody is left out of these statistics, so that the newest event shows in the candidates
    everyone = CooccurrenceEpisode(rows, statistics=np.arange(12), query_users=np.arange(12))
    cases = everyone.batch(400, seed=(0,))
    place = cases.targets % 6
    assert sorted(set(place.tolist())) == [2, 3, 4, 5]
    lengths = torch.expm1((cases.case[:, 0] + 0.8) * 2)
    torch.testing.assert_close(lengths, place.float(), rtol=0, atol=1e-4)
    for b in range(20):
        mine = cases.candidates[cases.offsets[b] : cases.offsets[b + 1]]
        assert (mine // 6 == cases.targets[b] // 6).all() and cases.targets[b] in mine


def test_histories_are_as_long_as_cooccurrence_is_read():
    long = packed([list(range(40)), list(range(40))], 40)
    cases = CooccurrenceEpisode(long, statistics=np.array([0]), query_users=np.array([1])).batch(8, seed=(0,))
    torch.testing.assert_close(torch.expm1((cases.case[:, 0] + 0.8) * 2), torch.full((8,), float(AGES[-1])))


def test_users_of_one_event_are_no_query_users():
    rows = packed([[1, 2], [3], [4, 5], []], 6)
    one = CooccurrenceEpisode(rows, statistics=np.array([0]), query_users=np.array([1, 2, 3]))
    assert one.query_users.tolist() == [2] and set(one.batch(9, seed=(0,)).targets.tolist()) == {5}
    with pytest.raises(ValueError, match="query_users must have a user of at least two events"):
        CooccurrenceEpisode(rows, statistics=np.array([0]), query_users=np.array([1, 3]))
