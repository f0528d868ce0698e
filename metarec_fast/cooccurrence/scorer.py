"""The co-occurrence scorer: a small network over what a domain's statistics say of each candidate.

It has no parameter of any item or domain, so that all domains' gradients speak of the same thing: what sources teach it
holds in the target as it stands.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarec_fast.cooccurrence.features import (
    CANDIDATE_FEATURES,
    CASE_FEATURES,
    ITEM_FEATURES,
    CooccurrenceFeatures,
    CooccurrenceStatistics,
)
from metarec_fast.data.domain import Sequences
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.statistics.transitions import TransitionKernel

CASES = 64  # at a time: the features of a case's candidates are many times as large as their scores

Parameters = dict[str, Tensor]


class CooccurrenceNetwork(nn.Module):
    """logit(case, item) = base(case) . features of the item's popularity and order, plus term(features) of candidates.

    An item without co-occurrence costs nothing of its own: a case costs its candidates, not the catalogue.
    """

    def __init__(self, *, hidden: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(CANDIDATE_FEATURES, 1)
        self.network = nn.Sequential(
            nn.Linear(CANDIDATE_FEATURES, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )
        self.base = nn.Sequential(nn.Linear(CASE_FEATURES, hidden), nn.GELU(), nn.Linear(hidden, ITEM_FEATURES))
        nn.init.zeros_(self.base[2].weight)
        nn.init.zeros_(self.base[2].bias)

    def forward(self, cases: CooccurrenceFeatures) -> tuple[Tensor, Tensor]:
        """base [B, ITEM_FEATURES] and term [N]."""
        x = cases.of_candidates
        return self.base(cases.case), (self.linear(x) + self.network(x)).squeeze(1)

    def loss(self, parameters: Parameters, private: Parameters, cases: CooccurrenceFeatures) -> Tensor:
        """Mean cross-entropy of the targets over the whole catalogue, which is never spread out.

        Items without co-occurrence have one logit for each level of popularity and order: the sum over the catalogue is
        one over levels, less the candidates of each, plus one over candidates.
        private: nothing, since a domain has no parameters here; the meta step passes it.
        """
        base, term = functional_call(self, parameters, (cases,))
        B, P = len(base), len(cases.levels)
        level, case = cases.level_of[cases.candidates], cases.case_of
        by_level = base @ cases.levels.T
        taken = torch.bincount(case * P + level, minlength=B * P).view(B, P)
        left = (cases.multiplicity - taken).clamp_min(0)
        logit = by_level[case, level] + term
        # the largest logit of each case that some item has, found without its gradient
        rest = by_level.detach().masked_fill(left == 0, -torch.inf)
        top = rest.amax(1).scatter_reduce(0, case, logit.detach(), "amax")
        total = (left * (by_level - top[:, None]).masked_fill(left == 0, 0).exp()).sum(1)
        total = total.index_add(0, case, (logit - top[case]).exp())
        target = by_level.gather(1, cases.level_of[cases.targets][:, None]).squeeze(1)
        hit = cases.candidates == cases.targets[case]
        target = target.index_add(0, case, torch.where(hit, term, 0))
        return (total.log() + top - target).mean()


class CooccurrenceScorer:
    """A trained scorer with the statistics of one domain: logits of its whole catalogue after any history."""

    def __init__(self, scorer: CooccurrenceNetwork, statistics: CooccurrenceStatistics) -> None:
        self.scorer, self.statistics = scorer, statistics
        self.items = statistics.levels[statistics.level_of]

    @property
    def num_items(self) -> int:
        return self.statistics.num_items

    @torch.no_grad()
    def prepare(self, histories: Sequences, users: object = None) -> LinearScores:
        bases, terms, candidates, counts = [], [], [], []
        for begin in range(0, max(1, len(histories)), CASES):
            cases = self.statistics.cases(histories.take(np.arange(begin, min(begin + CASES, len(histories)))))
            base, term = self.scorer(cases)
            bases.append(base)
            terms.append(term)
            candidates.append(cases.candidates)
            counts.append(cases.offsets.diff())
        offsets = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
        return LinearScores(torch.cat(bases), self.items, None, (offsets, torch.cat(candidates), torch.cat(terms)))


class TransitionTerms:
    """Terms of the items that followed the last three events of a history in the domain's transitions: log(1 + 20 c).

    c sums cosine-normalised transition counts (window 5, fading .8 a lag), half as much for each event further back.
    """

    def __init__(self, train: Sequences) -> None:
        self.kernel = TransitionKernel.fit(train, window=5, decay=0.8).normalised(row=0.5, column=0.5)

    def __call__(self, histories: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        """CSR (offsets [B+1], items, values float32): the items that have any, ascending in each case."""
        offsets, items, c = self.kernel.scores(histories, last=3, fade=0.5)
        return offsets, items, torch.log1p(20 * c)
