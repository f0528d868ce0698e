import gzip
import os
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metarec_fast import data
from metarec_fast.evaluation import Popularity, Transitions, baselines, best_baseline, evaluate, item_neighbours
from metarec_fast.statistics.transitions import TransitionKernel
from tests.evaluation.problems import leave_one_out, random_rows, sequences

DATA = Path(os.environ.get("METAREC_FAST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_popularity_counts_training_events():
    train = sequences([[1, 1, 3], [3, 0], [3]], 6)
    tile = Popularity(train).prepare(sequences([[], [3]], 6))(0, 5)
    assert tile.tolist() == [[1, 2, 0, 3, 0]] * 2


@pytest.mark.parametrize(("last", "fade"), [(1, 1.0), (3, 0.5)])
def test_transitions_order_by_cooccurrence_then_popularity(last, fade):
    rng = np.random.default_rng(0)
    V, rows = 20, random_rows(rng, 40, 20)
    train = sequences(rows, V)
    # the definition: co-occurrence from dictionaries, in float32 as the kernel's, and popularity after it
    follows, popularity = Counter(), Counter(item for row in rows for item in row)
    for row in rows:
        for i, a in enumerate(row):
            for lag, b in enumerate(row[i + 1 : i + 6]):
                follows[a, b] += 0.5**lag
    histories = [[], *random_rows(rng, 15, V)]
    scorer = Transitions(train, TransitionKernel.fit(train, window=5, decay=0.5), last=last, fade=fade)
    score_tile = scorer.prepare(sequences(histories, V))
    scores = torch.cat([score_tile(b, min(b + 7, V)) for b in range(0, V, 7)], 1)
    cooccurrence_ties = 0
    for history, row in zip(histories, scores, strict=True):
        recent = history[::-1][:last]
        keys = [(sum(fade**age * follows[a, b] for age, a in enumerate(recent)), popularity[b]) for b in range(V)]
        cooccurrence_ties += len({key[0] for key in keys}) < len(set(keys))
        for i in range(V):
            for j in range(V):
                assert (row[i] > row[j]) == (keys[i] > keys[j])
    assert cooccurrence_ties  # else popularity was never asked


def test_popularity_never_changes_an_order_of_cooccurrence():
    """Neighbouring float32 values of co-occurrence, the lesser one with all the popularity."""
    least = np.nextafter(np.float32(1), np.float32(2))
    for weights in ([1.0, least], [1e-30, np.nextafter(np.float32(1e-30), np.float32(1))], [least, 2.0]):
        kernel = TransitionKernel(np.array([0, 2, 2, 2]), np.array([1, 2], np.int32), np.array(weights, np.float32))
        scores = Transitions(sequences([[1] * 100], 3), kernel).prepare(sequences([[0]], 3))(0, 3)[0]
        assert scores[0] < scores[1] < scores[2]


@pytest.mark.parametrize(("k", "longest"), [(100, 200), (3, 200), (100, 4)])
def test_item_knn_is_the_cosine_of_sets_of_users(k, longest):
    rng = np.random.default_rng(1)
    V, rows = 15, [*random_rows(rng, 30, 15), []]
    recent = [list(dict.fromkeys(row[::-1]))[:longest] for row in rows]  # newest different items
    chose = np.zeros((len(rows), V))
    for user, row in enumerate(recent):
        chose[user, row] = 1
    sizes = np.maximum(chose.sum(0), 1)
    cosine = chose.T @ chose / np.sqrt(np.outer(sizes, sizes))
    np.fill_diagonal(cosine, 0)
    kernel = item_neighbours(sequences(rows, V), k=k, longest=longest)
    for item in range(V):
        _, columns, weights = kernel.rows(np.array([item]))
        np.testing.assert_allclose(weights, cosine[item, columns], rtol=1e-6)
        np.testing.assert_allclose(np.sort(weights)[::-1], [w for w in -np.sort(-cosine[item]) if w][:k], rtol=1e-6)


def test_kernel_of_another_catalogue():
    kernel = TransitionKernel.fit(sequences([[1, 2]], 3))
    with pytest.raises(ValueError, match="kernel must have the 4 items of train, got 3"):
        Transitions(sequences([[1, 2]], 4), kernel)


def test_baselines_see_training_events_only():
    rows = random_rows(np.random.default_rng(0), 30, 15)
    split = leave_one_out(rows, 15)
    changed = leave_one_out([[*row[:-2], (row[-2] + 1) % 15, (row[-1] + 1) % 15] for row in rows], 15)
    for name, scorer in baselines(split.train).items():
        ours, theirs = (s.prepare(split.valid.histories)(0, 15) for s in (scorer, baselines(changed.train)[name]))
        assert torch.equal(ours, theirs), name


def test_best_baseline_is_chosen_by_validation():
    # a follows b follows c: the last event tells the next, popularity does not; the test cases are pure noise
    rng = np.random.default_rng(0)
    rows = [[(start + i) % 12 for i in range(5)] + [int(rng.integers(12))] for start in rng.integers(12, size=60)]
    split = leave_one_out(rows, 12)
    name, scorer, table = best_baseline(split, mask_history=False)
    assert set(table) == set(baselines(split.train))
    assert table[name]["ndcg@10"] == max(metrics["ndcg@10"] for metrics in table.values())
    assert table[name]["ndcg@10"] > 0.9 > 0.5 > table["popularity"]["ndcg@10"]
    assert evaluate(scorer, split.valid, mask_history=False, protocol="").ndcg[10] == table[name]["ndcg@10"]
    assert "leave-one-out; valid" in table[name].protocol


@pytest.mark.shared_data
def test_office_baselines():
    """Untrained transitions of window 5, last item, all users: .0514 and .084 were measured elsewhere.

    10 % either way: how equal co-occurrence was ordered and lags were weighed there is not known.
    """
    path = DATA / "amazon14_office.inter.gz"
    if not path.exists():
        pytest.skip(f"needs {path} (METAREC_FAST_DATA)")
    with gzip.open(path, "rt") as file:
        user, item = np.loadtxt(file, skiprows=1, dtype=np.int64, usecols=(0, 1)).T
    _, item = np.unique(item, return_inverse=True)
    rows = [part.tolist() for part in np.split(item, np.flatnonzero(np.diff(user)) + 1)]
    split = leave_one_out(rows, int(item.max()) + 1)
    scorer = baselines(split.train)["transitions, window 5, last item"]
    metrics = evaluate(scorer, split.test, mask_history=False, protocol="")
    assert len(metrics) == 4905
    assert metrics.ndcg[10] == pytest.approx(0.0514, rel=0.1)
    assert metrics.recall[10] == pytest.approx(0.084, rel=0.1)


def test_the_choice_of_a_baseline_warns_of_no_ties():
    """Baselines tie by design where co-occurrence is silent; asked alone, the same scorer still says so."""
    events = data.Sequences(np.arange(0, 41, 4), np.tile(np.array([0, 1, 2, 3], np.int32), 10), 40)
    tied = data.leave_one_out(data.Domain("tied", events, data.Vocabulary(range(10)), data.Vocabulary(range(40))))
    unseen = replace(tied.valid, targets=tied.valid.targets + 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best_baseline(replace(tied, valid=unseen), mask_history=False, catalogue="all")
    with pytest.warns(RuntimeWarning, match="items tie with the target"):
        evaluate(Popularity(tied.train), unseen, mask_history=False, protocol="valid")
