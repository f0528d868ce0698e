import importlib
import warnings

import numpy as np
import pytest
import torch

from metarec_fast import reference
from metarec_fast.data.domain import Cases
from metarec_fast.evaluation import LinearScorer, evaluate, holm, paired_bootstrap
from tests.evaluation.problems import TableScorer, leave_one_out, random_rows, sequences

evaluate_module = importlib.import_module("metarec_fast.evaluation.evaluate")  # the package has the function's name


def problem(users=37, num_items=60, seed=0):
    rng = np.random.default_rng(seed)
    split = leave_one_out(random_rows(rng, users, num_items), num_items)
    return split.test, torch.tensor(rng.integers(-5, 6, (users, num_items)), dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:.*items tie with the target:RuntimeWarning")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch_size", "tile"), [(256, 4096), (1, 7), (5, 60), (36, 13)])
def test_every_split_gives_the_definition(masked, batch_size, tile):
    cases, scores = problem()
    seen = torch.from_numpy(cases.histories.offsets), torch.from_numpy(cases.histories.items)
    expected = reference.target_ranks(scores, torch.from_numpy(cases.targets), seen if masked else None)
    metrics = evaluate(
        TableScorer(scores), cases, mask_history=masked, protocol="loo", batch_size=batch_size, tile=tile
    )
    assert metrics.greater.tolist() == expected[0].tolist()
    assert metrics.equal.tolist() == expected[1].tolist()
    assert metrics.users.tolist() == cases.users.tolist()
    assert ("history masked" in metrics.protocol) == masked
    assert f"{len(cases)} cases" in metrics.protocol


def test_histories_reach_the_scorer_of_their_case():
    """States from the histories themselves, integers so that no product rounds."""
    cases, _ = problem()
    cases = Cases(cases.users[::-1].copy(), cases.histories, cases.targets)  # users in no order
    torch.manual_seed(0)
    table, bias = torch.randint(-3, 4, (60, 8)).float(), torch.randint(-3, 4, (60,)).float()

    def encode(histories, users):
        rows = [table[torch.from_numpy(histories[u]).long()].sum(0) + users[u] for u in range(len(histories))]
        return torch.stack(rows)

    scores = encode(cases.histories, cases.users) @ table.T + bias
    expected = reference.target_ranks(scores, torch.from_numpy(cases.targets))
    for batch_size in (64, 10):
        scorer = LinearScorer(encode, table, bias=bias)
        metrics = evaluate(scorer, cases, mask_history=False, protocol="", batch_size=batch_size, tile=16)
        assert metrics.greater.tolist() == expected[0].tolist()
        assert metrics.equal.tolist() == expected[1].tolist()


def test_linear_scorer_computes_in_float32():
    table, bias = torch.randn(9, 4, dtype=torch.bfloat16), torch.randn(9, dtype=torch.bfloat16)
    scorer = LinearScorer(lambda h, u: torch.ones(len(h), 4, dtype=torch.bfloat16), table, bias=bias)
    tile = scorer.prepare(sequences([[1], []], 9))(2, 7)
    torch.testing.assert_close(tile, (table.float().sum(1) + bias.float())[2:7].expand(2, -1))
    assert not tile.requires_grad
    with pytest.raises(ValueError, match=r"bias must be \[9\] to match table"):
        LinearScorer(lambda h, u: None, table, bias=bias[:3])
    with pytest.raises(ValueError, match=r"encode must return states of shape \(1, 4\), got \(1, 3\)"):
        LinearScorer(lambda h, u: torch.zeros(1, 3), table).prepare(sequences([[1]], 9))


def test_empty_histories():
    cases = Cases(np.arange(3), sequences([[], [2], []], 5), np.array([0, 1, 2]))
    metrics = evaluate(TableScorer(torch.eye(5)[:3]), cases, mask_history=True, protocol="cold")
    assert metrics["recall@5"] == 1
    assert metrics.greater.tolist() == [0, 0, 0]


def test_non_finite_scores_name_the_user():
    cases, scores = problem()
    scores[17, 3] = float("nan")
    with pytest.raises(ValueError, match=r"user 17: scores must be finite, got 1 that are not"):
        evaluate(TableScorer(scores), cases, mask_history=False, protocol="", batch_size=8)


def test_warns_when_ties_decide():
    cases, scores = problem()
    with pytest.warns(RuntimeWarning, match=r"59\.0 items tie with the target"):
        metrics = evaluate(TableScorer(scores * 0), cases, mask_history=False, protocol="")
    assert metrics["recall@10"] == pytest.approx(10 / 60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(TableScorer(torch.rand_like(scores)), cases, mask_history=False, protocol="")


def test_bad_arguments():
    cases, scores = problem()
    with pytest.raises(ValueError, match="scorer must rank the 60 items of cases, got 59"):
        evaluate(TableScorer(scores[:, 1:]), cases, mask_history=False, protocol="")
    none = Cases(np.zeros(0, np.int64), sequences([], 60), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="at least one case, got none"):
        evaluate(TableScorer(scores), none, mask_history=False, protocol="")


def test_bootstrap_interval_agrees_with_theory():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 1, 400), rng.normal(0, 1, 400)
    result = paired_bootstrap(a, b, seed=1)
    error = (a - b).std() / 20
    assert result.mean == pytest.approx((a - b).mean())
    assert result.low == pytest.approx(result.mean - 1.96 * error, abs=0.1 * error)
    assert result.high == pytest.approx(result.mean + 1.96 * error, abs=0.1 * error)
    assert result == paired_bootstrap(a, b, seed=1)
    assert result != paired_bootstrap(a, b, seed=2)


def test_bootstrap_is_paired():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 300)
    near = paired_bootstrap(base + rng.normal(0.05, 0.1, 300), base, seed=0)
    assert near.low > 0  # unpaired, the spread of base would hide it
    assert near.p < 0.001
    mirrored = paired_bootstrap(base, base + rng.normal(0.05, 0.1, 300), seed=0)
    assert mirrored.high < 0


def test_bootstrap_of_no_difference():
    a = np.random.default_rng(0).random(50)
    assert paired_bootstrap(a, a, seed=0) == (0, 0, 0, 1)
    p = [paired_bootstrap(*np.random.default_rng(s).random((2, 100)), seed=0, samples=500).p for s in range(200)]
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.11  # 5 % of null comparisons, three binomial errors wide
    with pytest.raises(ValueError, match=r"got shapes \(50,\) and \(49,\)"):
        paired_bootstrap(a, a[1:], seed=0)


def test_bootstrap_of_a_known_case():
    """Differences of 0 and 1 alone: the resampled mean is binomial, whose quantiles are in tables."""
    a = np.zeros(100)
    a[:10] = 1  # Binomial(100, .1): 2.5 % quantile 5, 97.5 % quantile 16
    assert paired_bootstrap(a, np.zeros(100), seed=0)[:3] == (0.1, 0.05, 0.16)
    # and P(no event) = .9 ** 100 = 2.66e-5: about a quarter of a sample of 10,000
    assert paired_bootstrap(a, np.zeros(100), seed=0).p < 0.001
    few = paired_bootstrap(a[9:], np.zeros(91), seed=0)  # one user of 91 differs: P(not drawn) = .366
    assert few.p == pytest.approx(2 * (1 - 1 / 91) ** 91, abs=0.03)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: times 4 3 2 1 = .04 .06 .06 .04, and never below the one before
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([0.03]).tolist() == [0.03] and holm([]).tolist() == []
