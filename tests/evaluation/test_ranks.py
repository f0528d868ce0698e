import bisect
from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_fast import reference
from metarec_fast.evaluation import NonFiniteScoresError, target_ranks
from metarec_fast.evaluation.linear_scores import LinearScores


def problem(B, V, *, tied, seed=0, dtype=torch.float32):
    """Scores, targets and what was seen (unordered, repeated, often with the target)."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-4, 5, (B, V)) if tied else rng.standard_normal((B, V))
    targets = rng.integers(V, size=B)
    rows = [rng.integers(V, size=rng.integers(0, 9)).tolist() + [t] * rng.integers(0, 3) for t in targets]
    seen = torch.tensor(np.cumsum([0, *map(len, rows)])), torch.tensor([i for row in rows for i in row])
    return torch.tensor(scores, dtype=dtype), torch.tensor(targets), seen


def counts_by_sorting(scores, targets, seen):
    """The oracle: sort the candidates' scores and look the target's up, O(V log V) a case."""
    answer = []
    for case, target in enumerate(targets.tolist()):
        out = set() if seen is None else set(seen[1][seen[0][case] : seen[0][case + 1]].tolist())
        others = sorted(s for item, s in enumerate(scores[case].tolist()) if item not in out | {target})
        own = scores[case, target].item()
        low, high = bisect.bisect_left(others, own), bisect.bisect_right(others, own)
        answer.append((len(others) - high, high - low))
    return tuple(torch.tensor(column) for column in zip(*answer, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("B", "V", "tile"), [(7, 53, 10), (7, 53, 53), (7, 53, 1), (1, 1, 4), (40, 200, 64), (3, 5, 99)]
)
def test_counts(B, V, tile, masked, tied, dtype):
    scores, targets, seen = problem(B, V, tied=tied, dtype=dtype)
    seen = seen if masked else None
    oracle = counts_by_sorting(scores, targets, seen)
    ours = target_ranks(lambda b, e: scores[:, b:e], num_items=V, targets=targets, seen=seen, tile=tile)
    for answer in (ours, reference.target_ranks(scores, targets, seen)):
        assert torch.equal(answer[0], oracle[0])
        assert torch.equal(answer[1], oracle[1])


def test_tiles_are_not_written_to():
    scores, targets, seen = problem(9, 40, tied=True)
    before = scores.clone()
    target_ranks(lambda b, e: scores[:, b:e], num_items=40, targets=targets, seen=seen, tile=16)
    assert torch.equal(scores, before)
    constant = torch.zeros(40)  # a view with stride 0, as popularity returns
    greater, equal = target_ranks(lambda b, e: constant[b:e].expand(9, -1), num_items=40, targets=targets, tile=16)
    assert greater.tolist() == [0] * 9
    assert equal.tolist() == [39] * 9


def test_target_stays_a_candidate_when_it_was_seen():
    scores = torch.tensor([[3.0, 2.0, 1.0, 2.0]])
    seen = torch.tensor([0, 4]), torch.tensor([0, 1, 0, 1])
    greater, equal = target_ranks(
        lambda b, e: scores[:, b:e], num_items=4, targets=torch.tensor([1]), seen=seen, tile=2
    )
    assert (greater.item(), equal.item()) == (0, 1)


def test_own_score_comes_from_the_tiles():
    """A dot product of its own rounds differently: the target would beat, or lose to, an item with its very row."""
    torch.manual_seed(0)
    states, table = torch.randn(256, 64), torch.randn(700, 64)
    table = torch.cat((table, table))  # each row again at the same place of the next tile
    targets = torch.randint(1400, (256,))
    product = states @ table[:700].T
    apart = (states * table[targets]).sum(1)
    assert (apart != product[torch.arange(256), targets % 700]).any()  # else this test could not fail
    greater, equal = target_ranks(lambda b, e: states @ table[b:e].T, num_items=1400, targets=targets, tile=700)
    assert equal.tolist() == [1] * 256
    assert (greater % 2 == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at_target", [False, True])
def test_non_finite_scores_are_refused(value, at_target):
    scores, targets, _ = problem(6, 50, tied=False)
    item = int(targets[4]) if at_target else (int(targets[4]) + 1) % 50
    scores[4, item] = value
    with pytest.raises(
        NonFiniteScoresError, match=rf"got 1 that are not, in 1 cases; .* case 4 .* item {item}"
    ) as caught:
        target_ranks(lambda b, e: scores[:, b:e], num_items=50, targets=targets, tile=20)
    assert (caught.value.count, caught.value.case, caught.value.item) == (1, 4, item)
    with pytest.raises(ValueError, match="scores must be finite, got 1"):
        reference.target_ranks(scores, targets)


def test_large_finite_scores_are_ranked():
    scores = torch.full((2, 50), 3e38)  # their sum is infinite
    greater, equal = target_ranks(lambda b, e: scores[:, b:e], num_items=50, targets=torch.tensor([0, 49]))
    assert (greater.tolist(), equal.tolist()) == ([0, 0], [49, 49])


def test_one_pass_where_targets_share_a_tile():
    scores, _, _ = problem(5, 100, tied=True)
    queries = []

    def score_tile(begin, end):
        queries.append((begin, end))
        return scores[:, begin:end]

    target_ranks(score_tile, num_items=100, targets=torch.tensor([31, 30, 39, 35, 30]), tile=10)
    assert sorted(queries) == [(b, b + 10) for b in range(0, 100, 10)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.tensor([0, 50, 1])}, ValueError, "targets must be in 0 to 49, got 0 to 50"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, "targets must be in 0 to 49, got -1 to 1"),
        ({"targets": torch.tensor([0, 1, 1]).int()}, TypeError, "targets must be int64"),
        ({"tile": 0}, ValueError, "tile must be in 1 to"),
        ({"seen": (torch.tensor([0, 1]), torch.tensor([3]))}, ValueError, r"seen offsets must be \[4\]"),
        ({"seen": (torch.tensor([0, 1, 1, 1]), torch.tensor([50]))}, ValueError, "seen items must be in 0 to 49"),
        ({"score_tile": lambda b, e: torch.zeros(3, e - b).bfloat16()}, TypeError, "float32 or float64, got bfloat16"),
        (
            {"score_tile": lambda b, e: torch.zeros(2, e - b)},
            ValueError,
            r"items 0 to 50 must be \(3, 50\), got \(2, 50\)",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"score_tile": lambda b, e: torch.zeros(3, e - b), "num_items": 50, "targets": torch.tensor([0, 1, 2])}
    arguments |= change
    with pytest.raises(error, match=message):
        target_ranks(arguments.pop("score_tile"), **arguments)


def linear_problem(B=40, V=70, D=6):
    """Scores of small integers, terms on a few items, and their tiles without the class that is ranked at once."""
    torch.manual_seed(0)
    states, table, bias = (torch.randint(-3, 4, shape).float() for shape in ((B, D), (V, D), (V,)))
    items = torch.cat([torch.randperm(V)[:5].sort().values for _ in range(B)])
    scores = LinearScores(states, table, bias, (torch.arange(B + 1) * 5, items, torch.randint(4, (5 * B,)).float()))
    return scores, lambda begin, end: scores(begin, end)


@pytest.mark.parametrize("added", [False, True])
def test_linear_scores_are_ranked_as_their_tiles(added):
    scores, tiles = linear_problem()
    if not added:
        scores = replace(scores, added=None)
        tiles = scores.__call__
    _, targets, seen = problem(40, 70, tied=True)
    for out in (None, seen):
        expected = target_ranks(tiles, num_items=70, targets=targets, seen=out, tile=16)
        ours = target_ranks(scores, num_items=70, targets=targets, seen=out)
        assert torch.equal(ours[0], expected[0])
        assert torch.equal(ours[1], expected[1])
    assert expected[1].any()


@pytest.mark.parametrize("at", ["table", "added"])
def test_non_finite_linear_scores_are_refused(at):
    scores, tiles = linear_problem()
    targets = torch.zeros(40, dtype=torch.int64)
    if at == "table":
        scores.table[31] = float("nan")
        count, cases, case, item = 40, 40, 0, 31
    else:
        scores.added[2][4 * 5 + 2] = float("inf")
        count, cases, case, item = 1, 1, 4, int(scores.added[1][4 * 5 + 2])
    message = rf"got {count} that are not, in {cases} cases; .* case {case} .* item {item}"
    for score_tile in (scores, tiles):
        with pytest.raises(NonFiniteScoresError, match=message):
            target_ranks(score_tile, num_items=70, targets=targets)


def test_linear_scores_of_another_shape_are_refused():
    scores, _ = linear_problem()
    with pytest.raises(ValueError, match=r"scores must be \(40, 69\), got \(40, 70\)"):
        target_ranks(scores, num_items=69, targets=torch.zeros(40, dtype=torch.int64))
    half = LinearScores(scores.states.bfloat16(), scores.table.bfloat16())
    with pytest.raises(TypeError, match="must be float32 or float64, got bfloat16"):
        target_ranks(half, num_items=70, targets=torch.zeros(40, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", [False, True])
def test_tiles_on_a_gpu(on_gpu):
    scores, targets, seen = problem(40, 200, tied=True)
    expected = reference.target_ranks(scores, targets, seen)
    on_device = scores.cuda()
    if on_gpu:
        targets, seen = targets.cuda(), (seen[0].cuda(), seen[1].cuda())
    ours = target_ranks(lambda b, e: on_device[:, b:e], num_items=200, targets=targets, seen=seen, tile=64)
    for count, right in zip(ours, expected, strict=True):
        assert count.is_cuda
        assert torch.equal(count.cpu(), right)


def test_no_cases():
    greater, equal = target_ranks(
        lambda b, e: torch.zeros(0, e - b), num_items=5, targets=torch.zeros(0, dtype=torch.int64)
    )
    assert len(greater) == len(equal) == 0
