"""Scores of a trained model over its catalogue, tile by tile."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec_fast.cooccurrence.scorer import CooccurrenceScorer
from metarec_fast.data.domain import Sequences
from metarec_fast.evaluation.linear_scores import LinearScores, MixedScores
from metarec_fast.models.recommender import Recommender
from metarec_fast.statistics.transitions import TransitionKernel


def pack_recent(histories: Sequences, max_length: int) -> tuple[Tensor, Tensor]:
    """The most recent ``max_length`` events of each history: items [T] and offsets [B+1], both int64."""
    lengths = np.minimum(histories.lengths, max_length)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    first = np.repeat(histories.offsets[1:] - lengths - offsets[:-1], lengths)
    items = histories.items[first + np.arange(offsets[-1])]
    return torch.from_numpy(items.astype(np.int64)), torch.from_numpy(offsets)


class TransitionTerms:
    """What the last three events of a history speak for, by the domain's own transitions: log(1 + 20 c).

    c sums cosine-normalised transition counts (window 5, fading .8 a lag), half as much for each event further back.
    """

    def __init__(self, train: Sequences) -> None:
        self.kernel = TransitionKernel.fit(train, window=5, decay=0.8).normalised(row=0.5, column=0.5)

    def __call__(self, histories: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """CSR (offsets [B+1], items, co-occurrence float32): the items that have any, rising in each case."""
        offsets, items, c = self.kernel.cooccurrence(histories, last=3, fade=0.5)
        return offsets, items, torch.log1p(20 * c)


class ModelScorer:
    """logit = state . item row + item bias, plus ``cooccurrence_weight`` times the co-occurrence of transitions.

    A user without history is scored by item bias alone.
    """

    def __init__(
        self,
        model: Recommender,
        domain: str,
        *,
        cooccurrence: TransitionTerms | None = None,
        cooccurrence_weight: float = 0.0,
    ) -> None:
        self.model, self.domain = model, domain
        self.cooccurrence, self.cooccurrence_weight = cooccurrence, cooccurrence_weight
        self.table = model.table(domain)
        self.num_items = self.table.weight.shape[0]

    @torch.no_grad()
    def states(self, histories: Sequences) -> Tensor:
        """[B, D] state after each history's last event."""
        items, offsets = (t.to(self.table.weight.device) for t in pack_recent(histories, self.model.config.max_length))
        h_TD, _ = self.model.states(
            self.model.shared_parameters(), self.model.private_parameters(self.domain), items, offsets
        )
        last = (offsets[1:] - 1).clamp_min(0)
        known = (offsets[1:] > offsets[:-1])[:, None]
        if not len(items):
            return h_TD.new_zeros(len(histories), self.model.config.dim)
        return h_TD[last] * known

    @torch.no_grad()
    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> LinearScores:
        states, weight, bias = self.states(histories), self.table.weight.detach(), self.table.bias.detach()
        if self.cooccurrence is None or not self.cooccurrence_weight:
            return LinearScores(states, weight, bias)
        offsets, items, cooccurrence = (x.to(weight.device) for x in self.cooccurrence(histories))
        return LinearScores(states, weight, bias, (offsets, items, self.cooccurrence_weight * cooccurrence.to(weight)))


class ScoreMixture:
    """logit = the co-occurrence scorer's, plus ``encoder_weight`` times the encoder's."""

    def __init__(self, encoder: ModelScorer, cooccurrence: CooccurrenceScorer, *, encoder_weight: float = 1.0) -> None:
        if encoder.num_items != cooccurrence.num_items:
            raise ValueError(
                f"encoder and co-occurrence must rank as many items, got {encoder.num_items} and "
                f"{cooccurrence.num_items}"
            )
        if encoder.cooccurrence is not None:
            raise ValueError("encoder must have no transition co-occurrence beside the scorer's, got one that has")
        self.encoder, self.cooccurrence, self.encoder_weight = encoder, cooccurrence, encoder_weight
        self.num_items = encoder.num_items
        weight = encoder.table.weight.detach()
        self._table = torch.cat((weight, cooccurrence.items.to(weight)), 1)

    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> LinearScores:
        if not self.encoder_weight:
            return self.cooccurrence.prepare(histories)
        return self.parts(histories).weighted(self.encoder_weight)

    @torch.no_grad()
    def parts(self, histories: Sequences) -> MixedScores:
        """What both say, before it is weighted."""
        encoder, cooccurrence = self.encoder.prepare(histories), self.cooccurrence.prepare(histories)
        states, terms = (x.to(encoder.states) for x in (cooccurrence.states, cooccurrence.added[2]))
        offsets, items = (x.to(states.device) for x in cooccurrence.added[:2])
        table = self._table[:, encoder.table.shape[1] :]
        return MixedScores(encoder, LinearScores(states, table, None, (offsets, items, terms)), self._table)
