"""The weights of an encoder and the co-occurrence beside it."""

import numpy as np
import pytest
import torch

from metarec_fast import data
from metarec_fast.cooccurrence import mixture as module
from metarec_fast.cooccurrence.features import CooccurrenceStatistics
from metarec_fast.cooccurrence.mixture import MixedScores, ScoreMixture, fit_mixture
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer
from metarec_fast.data import Cases, select_cases
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer
from tests.evaluation.problems import sequences
from tests.tiny import DOMAINS, config

N = DOMAINS.target.num_items


@pytest.fixture
def mixture():
    """An encoder and co-occurrence of a small domain, and the cases they answer."""
    split = data.leave_one_out(DOMAINS.target)
    torch.manual_seed(0)
    model = Recommender(config().model, {"target": N}).eval()
    torch.nn.init.normal_(model.table("target").weight)
    torch.nn.init.normal_(model.table("target").bias)
    cooccurrence = CooccurrenceScorer(CooccurrenceNetwork(hidden=8), CooccurrenceStatistics(split.train))
    cases = split.valid
    rows = [cases.histories[u].tolist() if u % 3 else [] for u in range(len(cases))]
    scorer = ScoreMixture(ModelScorer(model, "target"), cooccurrence)
    return scorer, Cases(cases.users, sequences(rows, N), cases.targets)


def losses(scored_cases, weights):
    """Mean cross-entropy with each pair of weights, scores spread out in float64."""
    encoder, cooccurrence = (
        torch.cat([getattr(scorer, part).prepare(cases.histories)(0, N).double() for scorer, cases in scored_cases])
        for part in ("encoder", "cooccurrence")
    )
    targets = torch.from_numpy(np.concatenate([cases.targets for _, cases in scored_cases]))
    return [float(torch.nn.functional.cross_entropy(a * encoder + b * cooccurrence, targets)) for a, b in weights]


class FixedScores:
    """Scores of every item as they are given: encoder and co-occurrence, [V] for each case."""

    def __init__(self, encoder, cooccurrence):
        self.given, self.num_items = (encoder, cooccurrence), encoder.shape[1]

    def parts(self, histories):
        eye = torch.eye(self.num_items)
        encoder, cooccurrence = (LinearScores(given[: len(histories)], eye) for given in self.given)
        return MixedScores(encoder, cooccurrence, torch.cat((eye, eye), 1))


@pytest.mark.parametrize("logits", [1 << 20, 100])
def test_the_weights_have_the_least_loss(mixture, logits, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", logits)
    scorer, cases = mixture
    half = len(cases) // 2
    scored_cases = [
        (scorer, select_cases(cases, np.arange(half))),
        (scorer, select_cases(cases, np.arange(half, len(cases)))),
    ]
    found = fit_mixture(scored_cases)
    grid = [(a, b) for a in np.linspace(0, 1.5, 16) for b in np.linspace(0, 3, 16)]
    mine, alone, *others = losses(scored_cases, [(found.encoder, found.cooccurrence), (0.0, 1.0), *grid])
    assert found.loss == pytest.approx(mine, rel=1e-5) and found.cooccurrence_loss == pytest.approx(alone, rel=1e-5)
    assert found.loss <= min(others) + 1e-5


def logits_and_targets(*, encoder, cooccurrence, cases=1000, V=20):
    """Cases whose answers are drawn by the mixture of these weights."""
    torch.manual_seed(0)
    a, b = torch.randn(2, cases, V)
    targets = torch.distributions.Categorical(logits=encoder * a + cooccurrence * b).sample()
    order = torch.argsort(targets, stable=True)  # as a batch has them
    rows = [[] for _ in range(cases)]
    return FixedScores(a[order], b[order]), Cases(np.arange(cases), sequences(rows, V), targets[order].numpy())


@pytest.mark.parametrize(("encoder", "cooccurrence"), [(0.7, 1.3), (1.5, 0.2), (0.05, 2.0)])
def test_planted_weights_are_found(encoder, cooccurrence):
    scorer, cases = logits_and_targets(encoder=encoder, cooccurrence=cooccurrence)
    found = fit_mixture([(scorer, cases)])
    assert found.encoder == pytest.approx(encoder, abs=0.15) and found.cooccurrence == pytest.approx(
        cooccurrence, abs=0.15
    )
    assert found.loss < found.cooccurrence_loss


@pytest.mark.parametrize(("encoder", "cooccurrence"), [(-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_what_misleads_gets_no_weight(encoder, cooccurrence):
    scorer, cases = logits_and_targets(encoder=encoder, cooccurrence=cooccurrence)
    found = fit_mixture([(scorer, cases)])
    for weight, true in ((found.encoder, encoder), (found.cooccurrence, cooccurrence)):
        assert weight == 0 if true < 0 else weight == pytest.approx(true, abs=0.2)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 40.0])
def test_scale_does_not_matter(scale):
    scorer, cases = logits_and_targets(encoder=0.5, cooccurrence=1.0)
    scorer.given = (scale * scorer.given[0], scorer.given[1])
    found = fit_mixture([(scorer, cases)])
    assert found.cooccurrence == pytest.approx(1.0, abs=0.15)
    assert scale * found.encoder == pytest.approx(0.5 if scale else 0.0, abs=0.15)


def test_encoder_and_cooccurrence_score_a_case_once(mixture, monkeypatch):
    scorer, cases = mixture
    queries = []
    for part in (scorer.encoder, scorer.cooccurrence):
        prepare = part.prepare
        monkeypatch.setattr(part, "prepare", lambda rows, p=prepare: queries.append(len(rows)) or p(rows))
    fit_mixture([(scorer, cases)])
    assert queries == [len(cases)] * 2


def test_cases_and_finite_scores_are_needed(mixture):
    scorer, cases = mixture
    none = Cases(np.zeros(0, np.int64), sequences([], 30), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="scored_cases must have at least one case, got none"):
        fit_mixture([(scorer, none)])
    with torch.no_grad():
        scorer.encoder.table.bias[3] = torch.inf
    with pytest.raises(ValueError, match="scores of encoder and co-occurrence must be finite"):
        fit_mixture([(scorer, cases)])
