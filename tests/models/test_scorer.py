"""Scores of a trained model: states after the last event, and bias."""

import numpy as np
import pytest
import torch

from metarec_fast.data import Sequences
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer, pack_recent
from tests.tiny import DOMAINS, config


def histories(*rows) -> Sequences:
    return Sequences(
        np.cumsum([0, *map(len, rows)]).astype(np.int64),
        np.concatenate(rows).astype(np.int32),
        DOMAINS.target.num_items,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Recommender(config().model, {"target": DOMAINS.target.num_items})
    torch.nn.init.normal_(model.table("target").bias)
    return model.eval()


def test_the_most_recent_events_are_kept():
    items, offsets = pack_recent(histories([1, 2, 3, 4], [], [5], [6, 7, 8]), 2)
    assert items.tolist() == [3, 4, 5, 7, 8] and offsets.tolist() == [0, 2, 2, 3, 5]
    assert items.dtype == offsets.dtype == torch.int64


def test_scores_are_state_times_row_plus_bias_in_any_tiles(model):
    queries = histories([1, 2, 3], [4, 5])
    scorer = ModelScorer(model, "target")
    states, table = scorer.states(queries), model.table("target")
    want = states @ table.weight.T + table.bias
    score_tile = scorer.prepare(queries)
    torch.testing.assert_close(score_tile(0, 30), want)
    torch.testing.assert_close(torch.cat([score_tile(b, b + 10) for b in (0, 10, 20)], 1), want)
    # a state belongs to its history alone, whoever stands beside it
    torch.testing.assert_close(scorer.states(histories([4, 5])), states[1:])


def test_events_before_the_longest_window_are_not_read(model):
    recent = list(range(12))  # model.max_length
    scorer = ModelScorer(model, "target")
    assert torch.equal(scorer.states(histories([20, 21, *recent])), scorer.states(histories(recent)))


@pytest.mark.parametrize("rows", [([], [1, 2]), ([1, 2], []), ([], [])], ids=str)
def test_without_history_the_bias_decides(model, rows):
    scores = ModelScorer(model, "target").prepare(histories(*rows))(0, 30)
    for row, score in zip(rows, scores, strict=True):
        assert torch.equal(score, model.table("target").bias) == (not row)
