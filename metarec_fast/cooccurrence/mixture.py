"""Encoder and co-occurrence scores mixed, and the weights of both by maximum likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metarec_fast.cooccurrence.scorer import CooccurrenceScorer, TransitionTerms
from metarec_fast.data.domain import Cases, Sequences
from metarec_fast.evaluation.catalogue import inside
from metarec_fast.evaluation.evaluate import batches
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.models.scorer import ModelScorer

_LOGITS = 1 << 19  # of a part at a time: few enough for caches, and several cases a pass over a large table
_BATCH, _HELD = 1024, 4096  # cases prepared at a time, and those kept; of more, each pass prepares the others again
_STEPS, _HALVINGS, _ENOUGH = 20, 10, 1e-6  # of Newton's method, and the gain of the mean loss that ends it


@dataclass(frozen=True)
class MixtureWeights:
    """What scores count for in a mixture; by default the encoder alone."""

    encoder: float = 1.0
    cooccurrence: float = 0.0


ENCODER_ALONE = MixtureWeights()


@dataclass(frozen=True, eq=False)
class MixedScores:
    """Scores of the same cases by the encoder and by the co-occurrence scorer, computed once for any weights.

    encoder: without added terms. cooccurrence: without bias. table: [V, both widths], the tables of both side by side.
    """

    encoder: LinearScores
    cooccurrence: LinearScores
    table: Tensor

    def weighted(self, weights: MixtureWeights) -> LinearScores:
        a, b = weights.encoder, weights.cooccurrence
        bias = None if self.encoder.bias is None else a * self.encoder.bias
        states = torch.cat((a * self.encoder.states, b * self.cooccurrence.states), 1)
        offsets, items, terms = self.cooccurrence.added
        return LinearScores(states, self.table, bias, (offsets, items, b * terms))


class MixtureScorer(Protocol):
    """Gives the scores of encoder and co-occurrence scorer apart, so that many weights can be tried."""

    @property
    def num_items(self) -> int: ...

    def parts(self, histories: Sequences) -> MixedScores:
        """The scores of both for these cases. histories: B item sequences, some perhaps empty."""
        ...


class ScoreMixture:
    """logit = weights.encoder * the encoder's + weights.cooccurrence * what ``cooccurrence`` gives.

    cooccurrence: a learned scorer, the terms of transitions, which come on top of the encoder's own logits, or None.
    """

    def __init__(
        self,
        encoder: ModelScorer,
        cooccurrence: CooccurrenceScorer | TransitionTerms | None = None,
        *,
        weights: MixtureWeights = ENCODER_ALONE,
    ) -> None:
        self.encoder, self.cooccurrence, self.weights = encoder, cooccurrence, weights
        self.num_items = encoder.num_items
        if isinstance(cooccurrence, CooccurrenceScorer):
            if self.num_items != cooccurrence.num_items:
                raise ValueError(
                    f"encoder and co-occurrence must rank as many items, got {encoder.num_items} and "
                    f"{cooccurrence.num_items}"
                )
            weight = encoder.table.weight.detach()
            self._table = torch.cat((weight, cooccurrence.items.to(weight)), 1)
        elif cooccurrence is not None and weights.encoder != 1:
            raise ValueError(f"weights.encoder must be 1 beside transitions, got {weights.encoder}")

    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> LinearScores:
        if self.cooccurrence is None or not self.weights.cooccurrence:
            return self.encoder.prepare(histories)
        if isinstance(self.cooccurrence, TransitionTerms):
            return self._with_terms(histories)
        if self.weights == MixtureWeights(0.0, 1.0):
            return self.cooccurrence.prepare(histories)
        return self.parts(histories).weighted(self.weights)

    def _with_terms(self, histories: Sequences) -> LinearScores:
        encoder = self.encoder.prepare(histories)
        offsets, items, terms = (x.to(encoder.states.device) for x in self.cooccurrence(histories))
        terms = self.weights.cooccurrence * terms.to(encoder.states)
        return LinearScores(encoder.states, encoder.table, encoder.bias, (offsets, items, terms))

    @torch.no_grad()
    def parts(self, histories: Sequences) -> MixedScores:
        """The scores of encoder and learned scorer, before they are weighted."""
        encoder, cooccurrence = self.encoder.prepare(histories), self.cooccurrence.prepare(histories)
        states, terms = (x.to(encoder.states) for x in (cooccurrence.states, cooccurrence.added[2]))
        offsets, items = (x.to(states.device) for x in cooccurrence.added[:2])
        table = self._table[:, encoder.table.shape[1] :]
        return MixedScores(encoder, LinearScores(states, table, None, (offsets, items, terms)), self._table)


@dataclass(frozen=True)
class FittedMixture:
    """Weights of both scores, the mean loss of the targets with them, and that of co-occurrence alone at weight 1."""

    encoder: float
    cooccurrence: float
    loss: float
    cooccurrence_loss: float

    def weights(self) -> MixtureWeights:
        """Scaled to co-occurrence at weight 1, which leaves ranks as they are; the encoder alone where that is 0."""
        if not self.cooccurrence:
            return ENCODER_ALONE
        return MixtureWeights(self.encoder / self.cooccurrence, 1.0)


@torch.no_grad()
def fit_mixture(
    scored_cases: Sequence[tuple[MixtureScorer, Cases]], *, catalogue: np.ndarray | None = None
) -> FittedMixture:
    """The weights, neither below 0, of the greatest likelihood of the targets; scores are logits over the catalogue.

    The loss is convex in both, so Newton's method finds the only minimum in a few passes. Both weights are fitted
    without a penalty: the scores of an overconfident encoder are scaled down.

    scored_cases: scorers of one catalogue, each with its evaluation cases, which are prepared once.
    catalogue: bool [V], the items that are ranked, by default all; cases with another target do not count.
    Raises ValueError for no cases, or scores that are not finite.
    """
    prepared = _Prepared(scored_cases, catalogue)
    count = len(prepared)
    if not count:
        raise ValueError("scored_cases must have at least one case, got none")
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
    """The scores of both for all cases, a batch at a time, and the targets; kept for the first _HELD cases."""

    def __init__(self, scored_cases: Sequence[tuple[MixtureScorer, Cases]], catalogue: np.ndarray | None) -> None:
        among = [(scorer, inside(cases, catalogue)) for scorer, cases in scored_cases]
        self._scored_cases = [(scorer, cases) for scorer, cases in among if len(cases)]
        self._kept: list[tuple[MixedScores, Tensor]] = []
        self._place = self.items = None
        if catalogue is not None and not catalogue.all():
            self.items = torch.from_numpy(np.flatnonzero(catalogue))
            self._place = torch.from_numpy(np.cumsum(catalogue) - 1)

    def __len__(self) -> int:
        return sum(len(cases) for _, cases in self._scored_cases)

    def __iter__(self) -> Iterator[tuple[MixedScores, Tensor]]:
        number = held = 0
        for scorer, cases in self._scored_cases:
            for batch in batches(scorer.num_items, cases, _BATCH, mask_history=False):
                held += len(batch.targets)
                if number < len(self._kept):
                    yield self._kept[number]
                else:
                    targets = batch.targets if self._place is None else self._place[batch.targets]
                    made = scorer.parts(batch.histories), targets
                    if held <= _HELD:
                        self._kept.append(made)
                    yield made
                number += 1


def _moments(prepared: _Prepared, weights: Tensor, count: int) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy of the targets, with its gradient [2] and second derivatives [2, 2] by the weights."""
    loss, slope, curve = 0.0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    a, b = weights.tolist()
    for encoder, cooccurrence, targets in _pieces(prepared):
        logits = a * encoder + b * cooccurrence
        top = logits.logsumexp(1, keepdim=True)
        p = (logits - top).exp_()
        loss += float((top - logits.gather(1, targets)).double().sum())
        means = [(p * x).sum(1, keepdim=True) for x in (encoder, cooccurrence)]
        for i, (x, mean) in enumerate(zip((encoder, cooccurrence), means, strict=True)):
            slope[i] += float((mean - x.gather(1, targets)).double().sum())
            spread = p * (x - mean)
            curve[i, i] += float((spread * (x - mean)).double().sum())
            if i == 0:
                curve[0, 1] += float((spread * (cooccurrence - means[1])).double().sum())
    curve[1, 0] = curve[0, 1]
    return loss / count, slope / count, curve / count


def _pieces(prepared: _Prepared) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both scores [b, V] of a few cases at a time, and their targets [b, 1]."""
    for parts, targets in prepared:
        V = len(parts.table)
        rows = max(1, _LOGITS // V)
        for begin in range(0, len(targets), rows):
            encoder, cooccurrence = (s.rows(begin, begin + rows)(0, V) for s in (parts.encoder, parts.cooccurrence))
            if prepared.items is not None:
                encoder, cooccurrence = (s[:, prepared.items.to(s.device)] for s in (encoder, cooccurrence))
            yield encoder, cooccurrence, targets[begin : begin + rows, None].to(encoder.device)
