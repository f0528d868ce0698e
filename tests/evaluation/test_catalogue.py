"""What is ranked and recommended: all items, or those that training events hold."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from metarec_fast import data, reference
from metarec_fast.cooccurrence.features import CooccurrenceStatistics
from metarec_fast.cooccurrence.mixture import fit_mixture
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer
from metarec_fast.evaluation import (
    LinearScorer,
    NonFiniteScoresError,
    baselines,
    best_baseline,
    choice_catalogue,
    evaluate,
    expected_metric,
    inside,
    top_k_items,
)
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.evaluation.metrics import NAMES, OUTSIDE
from metarec_fast.train.cooccurrence import mean_loss, views_of
from tests.cooccurrence.test_mixture import FixedScores
from tests.evaluation.problems import TableScorer, leave_one_out, random_rows, sequences

V = 60


def problem(share=0.6, users=37):
    """Cases, whole-numbered scores with ties, and a catalogue of a share of the items."""
    rng = np.random.default_rng(0)
    cases = leave_one_out(random_rows(rng, users, V), V).test
    return cases, torch.tensor(rng.integers(-5, 6, (users, V)), dtype=torch.float32), rng.random(V) < share


class WithAdded:
    """The scores of a table as a product, and what is above a row's mean as terms that belong to few items."""

    def __init__(self, scores):
        self.scores, self.num_items = scores, scores.shape[1]

    def prepare(self, histories, users=None):
        scores = self.scores[users]
        few = scores > 2
        plain, terms = torch.where(few, 0, scores), scores[few]
        offsets = torch.nn.functional.pad(few.sum(1).cumsum(0), (1, 0))
        return LinearScores(plain, torch.eye(self.num_items), None, (offsets, few.nonzero()[:, 1], terms))


@pytest.mark.filterwarnings("ignore:.*items tie with the target:RuntimeWarning")
@pytest.mark.parametrize("kind", [TableScorer, WithAdded])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch_size", "tile"), [(256, 4096), (5, 7)])
def test_ranks_are_those_among_the_catalogue_and_another_target_is_a_miss(kind, masked, batch_size, tile):
    cases, scores, catalogue = problem()
    options = {"mask_history": masked, "protocol": "loo", "batch_size": batch_size, "tile": tile}
    found = evaluate(kind(scores), cases, catalogue=catalogue, among_all=True, **options)
    everywhere = evaluate(kind(scores), cases, **options)
    assert np.array_equal(found.among_all.greater, everywhere.greater)
    assert np.array_equal(found.among_all.equal, everywhere.equal)
    # items outside are below everything: they neither stand above a target nor tie with it
    seen = torch.from_numpy(cases.histories.offsets), torch.from_numpy(cases.histories.items)
    lowered = torch.where(torch.from_numpy(catalogue), scores, -99.0)
    greater, equal = reference.target_ranks(lowered, torch.from_numpy(cases.targets), seen if masked else None)
    known = catalogue[cases.targets]
    assert 0 < known.sum() < len(cases) == len(known)
    assert found.greater[known].tolist() == greater[torch.from_numpy(known)].tolist()
    assert found.equal[known].tolist() == equal[torch.from_numpy(known)].tolist()
    assert found.outside == (~known).sum() and (found.greater[~known] == OUTSIDE).all()
    for name in NAMES:
        assert not found.per_user(name)[~known].any() and found.per_user(name)[known].all() >= 0
    assert f"the {catalogue.sum()} items of training events ranked (of 60 known)" in found.protocol
    assert f"{found.outside} targets outside the catalogue count as misses" in found.protocol
    reported = found.to_dict()
    assert (reported["catalogue"], reported["items_ranked"], reported["targets_outside"]) == (
        "training",
        int(catalogue.sum()),
        found.outside,
    )
    assert reported["among_all"] == everywhere.to_dict() and everywhere.to_dict()["catalogue"] == "all"
    assert found.protocol in str(found) and everywhere.protocol in str(found)


def test_a_catalogue_of_all_items_has_the_bits_of_none():
    cases, scores, _ = problem()
    torch.manual_seed(0)
    scorer = LinearScorer(lambda histories, users: scores[users][:, :8], torch.randn(V, 8))
    every = evaluate(scorer, cases, mask_history=True, protocol="", catalogue=np.ones(V, bool), among_all=True)
    none = evaluate(scorer, cases, mask_history=True, protocol="")
    for found in (every, every.among_all):
        assert np.array_equal(found.greater, none.greater) and np.array_equal(found.equal, none.equal)
    assert every.catalogue == "training" and none.catalogue == "all" and every.outside == 0


def test_a_target_outside_is_a_miss_by_every_metric():
    for name in (*NAMES, "recall@100000"):
        assert expected_metric(name, np.array([OUTSIDE, 0]), np.array([0, 0])).tolist() == [0.0, 1.0]


def test_bad_catalogues():
    cases, scores, catalogue = problem()
    for bad, error in (
        (catalogue[:-1], r"catalogue must be \[60\], one for each item, got shape \(59,\)"),
        (np.zeros(V, bool), "catalogue must hold an item at least, got none"),
    ):
        with pytest.raises(ValueError, match=error):
            evaluate(TableScorer(scores), cases, mask_history=False, protocol="", catalogue=bad)
    with pytest.raises(TypeError, match=r"catalogue must be bool \[60\], got int64"):
        evaluate(TableScorer(scores), cases, mask_history=False, protocol="", catalogue=np.arange(V))


def test_scores_that_are_not_finite_are_laid_to_the_item_itself():
    cases, scores, catalogue = problem()
    item = int(np.flatnonzero(catalogue)[20])
    scores[17, item] = torch.nan
    table = torch.zeros(V, 3)
    table[item] = torch.nan
    linear = LinearScorer(lambda histories, users: torch.ones(len(histories), 3), table)
    for scorer, user in ((TableScorer(scores), "17"), (linear, r"\d+")):
        with pytest.raises(ValueError, match=rf"user {user}: scores must be finite.*item {item}$"):
            evaluate(scorer, cases, mask_history=False, protocol="", catalogue=catalogue)


def test_the_weights_of_a_mixture_are_fitted_among_the_catalogue():
    torch.manual_seed(0)
    rng, catalogue = np.random.default_rng(1), np.arange(12) % 3 > 0
    encoder, cooccurrence = torch.randn(2, 40, 12)
    cases = data.Cases(np.arange(40), sequences([[0]] * 40, 12), rng.integers(12, size=40))
    found = fit_mixture([(FixedScores(encoder, cooccurrence), cases)], catalogue=catalogue)
    known = inside(cases, catalogue)
    assert 0 < len(known) < 40
    targets = np.searchsorted(np.flatnonzero(catalogue), known.targets)
    few = data.Cases(known.users, sequences([[0]] * len(known), 8), targets)
    again = fit_mixture(
        [(FixedScores(encoder[: len(known)][:, catalogue], cooccurrence[: len(known)][:, catalogue]), few)]
    )
    assert found == again


def test_cooccurrence_is_judged_among_the_catalogue():
    """The loss over the catalogue is the cross-entropy of the logits of its items alone."""
    split = leave_one_out([[0, 1, 2, 0, 1], [2, 1, 0, 2, 3], [1, 2, 0, 4, 2]], 9)  # 4 to 8 in no training event but 0-2
    catalogue, statistics = split.trained_items, CooccurrenceStatistics(split.train)
    torch.manual_seed(0)
    scorer = CooccurrenceNetwork(hidden=8)
    torch.nn.init.normal_(scorer.base[2].weight)
    cases = inside(split.valid, catalogue)
    assert 0 < len(cases) < len(split.valid) and catalogue.sum() < 9
    logits = CooccurrenceScorer(scorer, statistics).prepare(cases.histories)(0, 9)[:, catalogue]
    targets = torch.from_numpy(np.searchsorted(np.flatnonzero(catalogue), cases.targets))
    expected = float(torch.nn.functional.cross_entropy(logits, targets))
    queries = scorer, views_of(scorer), statistics, cases
    assert mean_loss(*queries, catalogue=catalogue) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(*queries) > expected


def tied_domain(fresh):
    """Ten users; ``fresh`` of their validation targets occur in no training event."""
    rows = [[0, 1, 2, 3, 1, 2] for _ in range(10)]
    for u in range(fresh):
        rows[u][4] = 5 + u
    events = sequences(rows, 20)
    return data.leave_one_out(data.Domain("shop", events, data.Vocabulary(range(10)), data.Vocabulary(range(20))))


def test_the_catalogue_of_a_split_is_what_its_users_trained_on():
    split = tied_domain(4)
    assert np.flatnonzero(split.candidates("training")).tolist() == [0, 1, 2, 3] and split.candidates("all") is None
    with pytest.raises(ValueError, match="catalogue must be 'training' or 'all', got 'trained'"):
        split.candidates("trained")
    few = data.limit_users(data.leave_one_out(data.synthetic(target_items=200).target), 0.05, seed=0)
    assert few.trained_items.sum() == len(np.unique(few.train.items)) < 200


def test_validation_ranks_all_items_where_the_catalogue_has_no_answer():
    assert np.array_equal(choice_catalogue(tied_domain(9), "training"), tied_domain(9).trained_items)
    with pytest.warns(RuntimeWarning, match="no validation target of 'shop' occurs in training events"):
        assert choice_catalogue(tied_domain(10), "training") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice_catalogue(tied_domain(10), "all") is None


@pytest.mark.filterwarnings("ignore:.*items tie with the target:RuntimeWarning")
def test_a_baseline_is_chosen_among_the_catalogue():
    split = tied_domain(4)
    for catalogue, outside in (("training", 4), ("all", 0)):
        name, _, table = best_baseline(split, mask_history=False, catalogue=catalogue)
        assert table[name].catalogue == catalogue and table[name].outside == outside
    name, scorer = next(iter(baselines(split.train).items()))
    few = evaluate(scorer, split.valid, mask_history=False, protocol="", catalogue=split.trained_items)
    assert best_baseline(split, mask_history=False)[2][name]["mrr"] == few["mrr"]


# the best items


def listed(found):
    return [list(zip(items.tolist(), scores.tolist(), strict=True)) for items, scores in found]


class ByHistory(TableScorer):
    """The scores of the user that a history's only item names."""

    def prepare(self, histories, users=None):
        self.most = max(getattr(self, "most", 0), len(histories))
        return super().prepare(histories, histories.items)


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("catalogue", [None, np.arange(V) % 4 > 0])
@pytest.mark.parametrize(("batch_size", "tile"), [(64, 8192), (7, 9), (1, 1)])
def test_the_best_items_are_the_same_whatever_is_held_at_a_time(exclude_seen, catalogue, batch_size, tile):
    _, scores, _ = problem()
    histories, k = sequences([[u] for u in range(len(scores))], V), 11
    scorer = ByHistory(scores)
    options = {"exclude_seen": exclude_seen, "catalogue": catalogue, "batch_size": batch_size, "tile": tile}
    found = listed(top_k_items(scorer, histories, k=k, **options))
    for u, answer in enumerate(found):
        candidates = [i for i in range(V) if (catalogue is None or catalogue[i]) and not (exclude_seen and i == u)]
        assert answer == sorted(((i, float(scores[u, i])) for i in candidates), key=lambda x: (-x[1], x[0]))[:k]
    assert scorer.most <= batch_size


def test_fewer_items_than_requested():
    _, scores, _ = problem()
    (answer,) = top_k_items(
        ByHistory(scores), sequences([[3]], V), k=10, exclude_seen=True, catalogue=np.arange(V) < 5, tile=7
    )
    assert sorted(answer[0]) == [0, 1, 2, 4]


def test_the_best_of_scores_that_are_not_finite_are_an_error():
    _, scores, _ = problem()
    for value in (torch.nan, torch.inf, -torch.inf):
        scores[12, 40] = value
        with pytest.raises(NonFiniteScoresError, match="item 40") as error:
            histories = sequences([[u] for u in range(20)], V)
            list(top_k_items(ByHistory(scores), histories, k=3, exclude_seen=False, batch_size=5))
        assert (error.value.case, error.value.item) == (12, 40)
    fine = torch.full((1, 4), 3e38)  # whose sum is not finite
    (answer,) = top_k_items(ByHistory(fine), sequences([[0]], 4), k=2, exclude_seen=False)
    assert answer[0].tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:.*items tie with the target:RuntimeWarning")
def test_protocols_follow_a_change_of_the_catalogue():
    cases, scores, catalogue = problem()
    metrics = evaluate(TableScorer(scores), cases, mask_history=False, protocol="loo", catalogue=catalogue)
    assert metrics.among_all is None and "all 60 items ranked" in replace(metrics, num_ranked=None).protocol
