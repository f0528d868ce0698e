import itertools
import json
import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from metarec_fast.evaluation import Metrics, expected_metric
from metarec_fast.evaluation.metrics import NAMES


def at_rank(name, rank):
    kind, _, cutoff = name.partition("@")
    if rank > float(cutoff or "inf"):
        return 0.0
    return {"recall": 1.0, "ndcg": 1 / math.log2(1 + rank), "mrr": 1 / rank}[kind]


@pytest.mark.parametrize("name", [*NAMES, "recall@1", "ndcg@1", "ndcg@3"])
def test_equals_the_mean_over_every_order_of_ties(name):
    """All permutations of up to six items, sorted by score: the definition of the expectation, with no formula."""
    rng = np.random.default_rng(0)
    for V in (1, 2, 4, 6):
        scores = rng.integers(0, 3, V)
        target = int(rng.integers(V))
        ranks = [
            1 + sorted(range(V), key=lambda item, order=order: (-scores[item], order[item])).index(target)
            for order in itertools.permutations(range(V))
        ]
        expected = np.mean([at_rank(name, rank) for rank in ranks])
        greater, equal = (scores > scores[target]).sum(), (scores == scores[target]).sum() - 1
        assert expected_metric(name, np.array([greater]), np.array([equal]))[0] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("greater", "equal"), [(0, 0), (3, 0), (9, 0), (10, 0), (0, 30), (4, 3), (19, 4), (7, 100_000)]
)
def test_equals_the_mean_over_the_tied_ranks(name, greater, equal):
    expected = math.fsum(at_rank(name, rank) for rank in range(greater + 1, greater + equal + 2)) / (equal + 1)
    assert expected_metric(name, np.array([greater]), np.array([equal]))[0] == pytest.approx(
        expected, rel=1e-9, abs=1e-15
    )


@pytest.mark.parametrize("k", [1, 5, 10, 20])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_ndcg_equals_sklearn_on_ties(k, levels):
    rng = np.random.default_rng(k)
    scores, targets = rng.integers(levels, size=(200, 30)), rng.integers(30, size=200)
    own = scores[np.arange(200), targets][:, None]
    ours = expected_metric(f"ndcg@{k}", (scores > own).sum(1), (scores == own).sum(1) - 1)
    truth = np.arange(30) == targets[:, None]
    theirs = [ndcg_score(truth[i : i + 1], scores[i : i + 1], k=k) for i in range(200)]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_collapsed_model_scores_like_chance():
    V = 3416
    metrics = Metrics("test", False, V, np.arange(5), np.zeros(5, np.int64), np.full(5, V - 1))
    assert metrics["recall@10"] == pytest.approx(10 / V, abs=1e-15)
    assert metrics.bounds("recall@10") == (0.0, 1.0)
    assert metrics.tie_rate == 1
    assert metrics.mean_equal == V - 1


def test_figures_and_their_forms():
    metrics = Metrics("leave-one-out", True, 1234, np.arange(4), np.array([0, 4, 9, 30]), np.array([0, 0, 1, 0]))
    assert metrics["recall@10"] == metrics.recall[10] == (1 + 1 + 0.5 + 0) / 4
    assert metrics.ndcg[5] == pytest.approx((1 + 1 / math.log2(6)) / 4)
    assert metrics.mrr == pytest.approx((1 + 1 / 5 + (1 / 10 + 1 / 11) / 2 + 1 / 31) / 4)
    assert metrics.tie_rate == 0.25
    low, high = metrics.bounds("recall@10")
    assert (low, high) == (0.5, 0.75)
    assert metrics.protocol == "leave-one-out; all 1,234 items ranked, history masked; 4 cases"
    row, head = metrics.table_row("ours"), Metrics.table_header().splitlines()
    assert row.startswith("| ours | 0.5000 | 0.6250 |")
    assert row.count("|") == head[0].count("|") == head[1].count("|")
    figures = json.loads(json.dumps(metrics.to_dict()))
    assert figures["metrics"]["recall@10"] == 0.625
    assert figures["bounds"]["recall@10"] == [0.5, 0.75]
    assert figures["cases"] == 4
    assert figures["history_masked"] is True
    assert metrics.protocol in str(metrics)


@pytest.mark.parametrize("name", ["ndcg", "mrr@10", "hits@10", "recall@", "recall@x", "ndcg@-1"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"name must be recall@K, ndcg@K or mrr"):
        expected_metric(name, np.zeros(1), np.zeros(1))


def test_needs_cases():
    with pytest.raises(ValueError, match="at least one, got 0, 0 and 0"):
        Metrics("", False, 5, *np.zeros((3, 0), np.int64))
