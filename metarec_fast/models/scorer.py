"""Scores of a trained model over its catalogue, tile by tile."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.models.recommender import Recommender


def pack_recent(histories: Sequences, max_length: int) -> tuple[Tensor, Tensor]:
    """The most recent ``max_length`` events of each history: items [T] and offsets [B+1], both int64."""
    lengths = np.minimum(histories.lengths, max_length)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    first = np.repeat(histories.offsets[1:] - lengths - offsets[:-1], lengths)
    items = histories.items[first + np.arange(offsets[-1])]
    return torch.from_numpy(items.astype(np.int64)), torch.from_numpy(offsets)


class ModelScorer:
    """logit = state . item row + item bias. A user without history is scored by item bias alone."""

    def __init__(self, model: Recommender, domain: str) -> None:
        self.model, self.domain = model, domain
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
        return LinearScores(self.states(histories), self.table.weight.detach(), self.table.bias.detach())
