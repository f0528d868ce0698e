"""How much an encoder and the co-occurrence beside it should count: the weights of the greatest likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Cases
from metarec_fast.evaluation.catalogue import inside
from metarec_fast.evaluation.evaluate import batches
from metarec_fast.evaluation.linear_scores import MixedScores
from metarec_fast.evaluation.scorer import MixtureScorer

_LOGITS = 1 << 19  # of a part at a time: few enough for caches, and several cases a pass over a large table
_BATCH, _HELD = 1024, 4096  # cases prepared at a time, and those kept; of more, each pass prepares the others again
_STEPS, _HALVINGS, _ENOUGH = 20, 10, 1e-6  # of Newton's method, and the gain of the mean loss that ends it


@dataclass(frozen=True)
class FittedMixture:
    """Weights of both scores, the mean loss of the answers with them, and of co-occurrence alone at weight 1."""

    encoder: float
    cooccurrence: float
    loss: float
    cooccurrence_loss: float


@torch.no_grad()
def fit_mixture(
    questions: Sequence[tuple[MixtureScorer, Cases]], *, catalogue: np.ndarray | None = None
) -> FittedMixture:
    """The weights, neither below 0, by which the answers are likeliest, scores taken as logits over the catalogue.

    The loss is convex in both, so that Newton's method finds the only minimum in a few passes. Two figures are fitted
    and no weight is favoured: an encoder too sure of itself is scaled down, where it would lose at any fixed scale.

    questions: scorers of one catalogue, each with the cases that it is to answer. What costs is prepared once.
    catalogue: bool [V], the items that can be answers, by default all; cases with another answer do not count.
    Raises ValueError for no cases, or scores that are not finite.
    """
    prepared = _Prepared(questions, catalogue)
    count = len(prepared)
    if not count:
        raise ValueError("questions must have at least one case, got none")
    alone = torch.tensor([0.0, 1.0], dtype=torch.float64)
    start, slope, curve = _moments(prepared, alone, count)
    if not start < torch.inf:
        raise ValueError("scores of encoder and co-occurrence must be finite, got some that are not")
    weights, loss = alone, start
    for _ in range(_STEPS):
        free = (weights > 0) | (slope < 0)  # the others stay at 0
        if not free.any():
            break
        step = torch.zeros(2, dtype=torch.float64)
        inner = torch.linalg.lstsq(curve[free][:, free], slope[free, None], driver="gelsd")
        step[free] = inner.solution[:, 0]
        if float(slope @ step) / 2 < _ENOUGH:
            break
        for _ in range(_HALVINGS):
            tried = (weights - step).clamp_min(0)
            found = _moments(prepared, tried, count)
            if found[0] <= loss:
                break
            step = step / 2
        else:
            break
        gained, weights = loss - found[0], tried
        loss, slope, curve = found
        if gained < _ENOUGH:
            break
    return FittedMixture(float(weights[0]), float(weights[1]), loss, start)


class _Prepared:
    """What both say of all cases, a batch at a time, and the answers: kept between passes for the first _HELD cases."""

    def __init__(self, questions: Sequence[tuple[MixtureScorer, Cases]], catalogue: np.ndarray | None) -> None:
        asked = [(scorer, inside(cases, catalogue)) for scorer, cases in questions]
        self._questions = [(scorer, cases) for scorer, cases in asked if len(cases)]
        self._kept: list[tuple[MixedScores, Tensor]] = []
        self._place = self.items = None
        if catalogue is not None and not catalogue.all():
            self.items = torch.from_numpy(np.flatnonzero(catalogue))
            self._place = torch.from_numpy(np.cumsum(catalogue) - 1)

    def __len__(self) -> int:
        return sum(len(cases) for _, cases in self._questions)

    def __iter__(self) -> Iterator[tuple[MixedScores, Tensor]]:
        number = held = 0
        for scorer, cases in self._questions:
            for batch in batches(scorer.num_items, cases, _BATCH, mask_history=False):
                held += len(batch.targets)
                if number < len(self._kept):
                    yield self._kept[number]
                else:
                    answers = batch.targets if self._place is None else self._place[batch.targets]
                    made = scorer.parts(batch.histories), answers
                    if held <= _HELD:
                        self._kept.append(made)
                    yield made
                number += 1


def _moments(prepared: _Prepared, weights: Tensor, count: int) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy of the answers, with its gradient [2] and second derivatives [2, 2] by the weights."""
    loss, slope, curve = 0.0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    a, b = weights.tolist()
    for encoder, cooccurrence, answers in _pieces(prepared):
        logits = a * encoder + b * cooccurrence
        top = logits.logsumexp(1, keepdim=True)
        p = (logits - top).exp_()
        loss += float((top - logits.gather(1, answers)).double().sum())
        means = [(p * x).sum(1, keepdim=True) for x in (encoder, cooccurrence)]
        for i, (x, mean) in enumerate(zip((encoder, cooccurrence), means, strict=True)):
            slope[i] += float((mean - x.gather(1, answers)).double().sum())
            spread = p * (x - mean)
            curve[i, i] += float((spread * (x - mean)).double().sum())
            if i == 0:
                curve[0, 1] += float((spread * (cooccurrence - means[1])).double().sum())
    curve[1, 0] = curve[0, 1]
    return loss / count, slope / count, curve / count


def _pieces(prepared: _Prepared) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both scores [b, V] of a few cases at a time, and their answers [b, 1]."""
    for parts, targets in prepared:
        V = len(parts.table)
        rows = max(1, _LOGITS // V)
        for begin in range(0, len(targets), rows):
            encoder, cooccurrence = (s.rows(begin, begin + rows)(0, V) for s in (parts.encoder, parts.cooccurrence))
            if prepared.items is not None:
                encoder, cooccurrence = (s[:, prepared.items.to(s.device)] for s in (encoder, cooccurrence))
            yield encoder, cooccurrence, targets[begin : begin + rows, None].to(encoder.device)
