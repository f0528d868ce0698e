"""The co-occurrence scorer: its loss over the whole catalogue, and the same logits wherever they are asked for."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metarec_fast.cooccurrence.features import CooccurrenceStatistics
from metarec_fast.cooccurrence.mixture import MixtureWeights, ScoreMixture
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer, TransitionTerms
from metarec_fast.data import leave_one_out
from metarec_fast.evaluation import evaluate
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer
from tests.statistics.test_transitions import packed
from tests.tiny import DOMAINS, config

V = 60
ROWS = [[(7 * u + 3 * e * e + e * u) % 50 for e in range(1 + u % 9)] for u in range(40)]  # items from 50 on: unseen
HISTORIES = [[], [4], [55], [3, 4, 3], *[row[:5] for row in ROWS[:20]], [51, 52], []]


@pytest.fixture(scope="module")
def statistics():
    return CooccurrenceStatistics(packed(ROWS, V))


@pytest.fixture
def scorer():
    scorer = CooccurrenceNetwork(hidden=8)
    with torch.no_grad():  # a base that says something, as after training
        for p in scorer.base[2].parameters():
            p.normal_()
    return scorer


def spread(scorer, cases):
    """Logits [B, V] by the definition, item after item."""
    base, term = scorer(cases)
    logits = base @ cases.levels[cases.level_of].T
    return logits.index_put((cases.case_of, cases.candidates), term, accumulate=True)


def test_a_fresh_scorer_has_no_opinion_where_there_is_no_cooccurrence(statistics):
    base, term = CooccurrenceNetwork()(statistics.cases(packed(HISTORIES, V)))
    assert not base.any() and term.any()


@pytest.mark.parametrize("which", ["candidates", "others", "unseen", "mixed"])
def test_the_loss_and_its_gradients_are_those_of_the_spread_out_catalogue(statistics, scorer, which):
    cases = statistics.cases(packed(HISTORIES, V))
    targets = []
    for b in range(len(HISTORIES)):
        mine = set(cases.candidates[cases.offsets[b] : cases.offsets[b + 1]].tolist())
        others = sorted(set(range(50)) - mine)
        if which == "unseen" or (which == "mixed" and b % 3 == 0):
            targets.append(50 + b % 10)
        elif mine and (which == "candidates" or (which == "mixed" and b % 3 == 1)):
            targets.append(sorted(mine)[b % len(mine)])
        else:
            targets.append(others[b % len(others)])
    cases = statistics.cases(packed(HISTORIES, V), np.array(targets))
    parameters = dict(scorer.named_parameters())
    expected = F.cross_entropy(spread(scorer, cases), cases.targets)
    got = scorer.loss(parameters, {}, cases)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(expected, parameters.values())
    for name, ours, theirs in zip(parameters, torch.autograd.grad(got, parameters.values()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
        assert theirs.any(), name


def test_large_logits_do_not_overflow(statistics, scorer):
    with torch.no_grad():
        scorer.linear.weight *= 300
    cases = statistics.cases(packed(HISTORIES, V), np.arange(len(HISTORIES)))
    expected = F.cross_entropy(spread(scorer, cases), cases.targets)
    assert spread(scorer, cases).abs().max() > 200
    assert scorer.loss(dict(scorer.named_parameters()), {}, cases).item() == pytest.approx(expected.item(), rel=1e-5)


def test_all_items_are_candidates():
    """No item is left to its level: what rounding leaves of a level's count is no item either."""
    ring = [[(u + e) % 6 for e in range(12)] for u in range(6)]
    statistics = CooccurrenceStatistics(packed(ring, 6))
    cases = statistics.cases(packed([[0, 1, 2], [3]], 6), np.array([3, 4]))
    assert cases.offsets.tolist() == [0, 6, 11]
    scorer = CooccurrenceNetwork(hidden=4)
    expected = F.cross_entropy(spread(scorer, cases), cases.targets)
    assert scorer.loss(dict(scorer.named_parameters()), {}, cases).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_level_whose_items_are_all_candidates_says_nothing():
    """Its logit may tower over all that some item has: the loss is still the spread-out catalogue's."""
    ring = [[(u + e) % 6 for e in range(12)] for u in range(6)]
    statistics = CooccurrenceStatistics(packed(ring, 7))  # item 6 is never seen
    cases = statistics.cases(packed([[0, 1, 2], [1, 2, 0]], 7), np.array([3, 4]))
    assert cases.offsets.tolist() == [0, 6, 12]
    scorer = CooccurrenceNetwork(hidden=4)
    with torch.no_grad():
        scorer.base[2].bias[:3] = torch.tensor([0.0, 0.0, 400.0])  # for items that were seen
        scorer.linear.bias -= 400
    expected = F.cross_entropy(spread(scorer, cases), cases.targets)
    parameters = dict(scorer.named_parameters())
    got = scorer.loss(parameters, {}, cases)
    assert got.item() == pytest.approx(expected.item(), rel=1e-4) and 0 < got.item() < 10
    wanted = torch.autograd.grad(expected, parameters.values())
    for name, ours, theirs in zip(parameters, torch.autograd.grad(got, parameters.values()), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4, msg=name)


def test_the_loss_reads_the_parameters_that_it_is_given(statistics, scorer):
    cases = statistics.cases(packed(HISTORIES, V), np.arange(len(HISTORIES)))
    other = CooccurrenceNetwork(hidden=8)
    given = scorer.loss(dict(other.named_parameters()), {}, cases)
    assert torch.equal(given, other.loss(dict(other.named_parameters()), {}, cases))


def test_a_path_scores_the_catalogue_in_any_tiles(statistics, scorer):
    path = CooccurrenceScorer(scorer, statistics)
    scores = path.prepare(packed(HISTORIES, V))
    expected = spread(scorer, statistics.cases(packed(HISTORIES, V))).detach()
    assert path.num_items == V
    torch.testing.assert_close(scores(0, V), expected)
    torch.testing.assert_close(torch.cat([scores(b, min(b + 7, V)) for b in range(0, V, 7)], 1), expected)
    assert not scores(0, V).requires_grad
    # a case is answered alike whoever stands beside it
    torch.testing.assert_close(path.prepare(packed(HISTORIES[3:4], V))(0, V), expected[3:4])


# beside an encoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = Recommender(config().model, {"target": DOMAINS.target.num_items})
    torch.nn.init.normal_(model.table("target").bias)
    return ModelScorer(model.eval(), "target")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.5])
def test_a_mixture_is_cooccurrence_plus_the_weighted_encoder(encoder, scorer, weight):
    split = leave_one_out(DOMAINS.target)
    path = CooccurrenceScorer(scorer, CooccurrenceStatistics(split.train))
    queries, N = packed([[], *(split.valid.histories[u].tolist() for u in range(12))], 30), 30
    mixture = ScoreMixture(encoder, path, weights=MixtureWeights(weight, 1.0))
    assert mixture.num_items == N
    expected = path.prepare(queries)(0, N) + weight * encoder.prepare(queries)(0, N)
    scores = mixture.prepare(queries)
    torch.testing.assert_close(scores(0, N), expected, rtol=1e-5, atol=1e-5)
    tiles = torch.cat([scores(b, min(b + 11, N)) for b in range(0, N, 11)], 1)
    torch.testing.assert_close(tiles, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.5, 3.0])
def test_parts_mix_with_any_weight(encoder, scorer, weight):
    split = leave_one_out(DOMAINS.target)
    path = CooccurrenceScorer(scorer, CooccurrenceStatistics(split.train))
    queries = packed([[], *(split.valid.histories[u].tolist() for u in range(12))], 30)
    parts = ScoreMixture(encoder, path).parts(queries)
    expected = weight * encoder.prepare(queries)(0, 30) + path.prepare(queries)(0, 30)
    mixed = parts.weighted(MixtureWeights(weight, 1.0))
    torch.testing.assert_close(mixed(0, 30), expected, rtol=1e-5, atol=1e-5)
    for begin, end in ((0, 1), (3, 9), (10, 20)):  # past the last case there is none
        torch.testing.assert_close(mixed.rows(begin, end)(0, 30), mixed(0, 30)[begin:end])


def test_another_catalogue_is_refused(encoder, scorer, statistics):
    with pytest.raises(ValueError, match="encoder and co-occurrence must rank as many items, got 30 and 60"):
        ScoreMixture(encoder, CooccurrenceScorer(scorer, statistics))


# transitions beside an encoder

TARGET = leave_one_out(DOMAINS.target)


def test_ranks_are_those_of_the_scores_as_they_are_given_in_tiles(encoder):
    cases = TARGET.test
    scorer = ScoreMixture(encoder, TransitionTerms(TARGET.train), weights=MixtureWeights(1.0, 2.0))

    class InTiles:
        num_items = scorer.num_items

        def prepare(self, histories, users=None):
            scores = scorer.prepare(histories, users)
            assert len(scores.added[1]) > 0
            return lambda begin, end: scores(begin, end)

    for masked in (False, True):
        ours, tiles = (evaluate(s, cases, mask_history=masked, protocol="") for s in (scorer, InTiles()))
        assert ours.greater.tolist() == tiles.greater.tolist()
        assert ours.equal.tolist() == tiles.equal.tolist()


def test_transition_terms_are_added_by_their_weight(encoder):
    queries, cooccurrence = packed([[1, 2, 3], [4, 5]], 30), TransitionTerms(TARGET.train)
    plain = encoder.prepare(queries)(0, 30)
    scorer = ScoreMixture(encoder, cooccurrence, weights=MixtureWeights(1.0, 2.0))
    offsets, items, values = cooccurrence(queries)
    found = torch.zeros(2, 30)
    found[torch.arange(2).repeat_interleave(offsets.diff()), items] = values
    assert (found > 0).any() and (found >= 0).all()
    torch.testing.assert_close(scorer.prepare(queries)(0, 30), plain + 2 * found)
    torch.testing.assert_close(scorer.prepare(queries)(10, 20), (plain + 2 * found)[:, 10:20])
    silent = ScoreMixture(encoder, cooccurrence, weights=MixtureWeights(1.0, 0.0))
    assert torch.equal(silent.prepare(queries)(0, 30), plain)
    with pytest.raises(ValueError, match=r"weights.encoder must be 1 beside transitions, got 0.5"):
        ScoreMixture(encoder, cooccurrence, weights=MixtureWeights(0.5, 1.0))
