"""What a domain's own training events say of pairs of items, in quantities that mean the same in every domain.

No item has a number of its own here: only how often, how soon and in which direction two items followed each other,
how popular an item is and where it stands in the course of time. A scorer that reads nothing else can be carried from
one domain to another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences
from metarec_fast.ops.gather_cooccurrence import CooccurrenceGraph, gather_cooccurrence
from metarec_fast.statistics.item_order import item_order
from metarec_fast.statistics.transitions import TransitionKernel

AGES = (0, 1, 2, 5, 20)
"""Groups of events by age: the newest, the one before, the next three, the next fifteen."""
LAGS = ((1, 1), (2, 3), (4, 10))
NEIGHBOURS, REACH = 30, 60  # of an item: taken a step from, and kept after two steps
RELATIONS = 6 + 2 * len(LAGS)
FEATURES = (len(AGES) - 1) * RELATIONS + 1
PLACES = 16  # to a deviation of the items' order
CENTRES = np.linspace(-2, 2, 8)  # of the bumps that tell where in the order an item stands
POPULARITY_FEATURES, CASE_FEATURES = 4, 8
ITEM_FEATURES = POPULARITY_FEATURES + 1 + len(CENTRES)
CANDIDATE_FEATURES = FEATURES + POPULARITY_FEATURES + CASE_FEATURES + 3


def cooccurrence_graph(train: Sequences) -> CooccurrenceGraph:
    """The relations of all pairs of items that occurred near each other, or both near a third.

    With A the followers at most 3 events later, fading .6 a lag, and B the neighbours at most 10 events away, fading
    .9, values for row item r and candidate c are: 5 log(1 + A[r,c]); 20 times the share of c among the followers of r;
    20 times its share among the predecessors of r; 20 times the cosine of r and c in B; 20 times the share of c after
    two steps along the strongest cosines; 1.5 log(1 + B[r,c]); and for lags of 1, 2-3 and 4-10 events, 20 times the
    shares of c among the followers and among the predecessors.
    """
    V = train.num_items
    near = TransitionKernel.fit(train, window=3, decay=0.6)
    wide = TransitionKernel.fit(train, window=10, decay=0.9).symmetric()
    cosine = wide.normalised(row=0.5, column=0.5).without_diagonal()
    step = cosine.strongest(NEIGHBOURS).normalised()
    relations = [
        (near, lambda w: 5 * np.log1p(w)),
        (near.normalised(), lambda w: 20 * w),
        (near.transposed().normalised(), lambda w: 20 * w),
        (cosine, lambda w: 20 * w),
        (step.two_steps().without_diagonal().strongest(REACH), lambda w: 20 * w),
        (wide, lambda w: 1.5 * np.log1p(w)),
    ]
    for first, last in LAGS:
        followers = TransitionKernel.fit(train, first=first, window=last, decay=1)
        relations += [(k.normalised(), lambda w: 20 * w) for k in (followers, followers.transposed())]
    cells = [np.repeat(np.arange(V), np.diff(k.offsets)) * V + k.columns for k, _ in relations]
    union = np.sort(np.concatenate(cells))
    union = union[np.diff(union, prepend=-1) > 0]
    union = union[union // V != union % V]
    values = np.zeros((len(union) + 1, RELATIONS), np.float32)  # one more for what is left out: the diagonal
    for r, ((kernel, scaled), cell) in enumerate(zip(relations, cells, strict=True)):
        at = np.minimum(np.searchsorted(union, cell), len(union) - 1) if len(union) else np.zeros(0, np.int64)
        values[np.where(union[at] == cell, at, len(union)) if len(union) else at, r] = scaled(kernel.weights)
    offsets = np.searchsorted(union, np.arange(V + 1, dtype=np.int64) * V)
    return CooccurrenceGraph(offsets, (union % V).astype(np.int32), np.ascontiguousarray(values[:-1]))


@dataclass(frozen=True, eq=False)
class CooccurrenceFeatures:
    """Histories with all that can be said for each item after them.

    offsets: int64 [B+1], candidates: int64 [N] rising in each case, cooccurrence: float32 [N, FEATURES].
    case: float32 [B, CASE_FEATURES]. targets: int64 [B], if known.
    levels: float32 [P, ITEM_FEATURES], the items' features: they depend on popularity and on the place in the items'
    order, in steps, so that there are fewer than items.
    level_of: int64 [V], each item's level. multiplicity: float32 [P], items of each level.
    """

    offsets: Tensor
    candidates: Tensor
    cooccurrence: Tensor
    case: Tensor
    levels: Tensor
    level_of: Tensor
    multiplicity: Tensor
    targets: Tensor | None = None

    def among(self, catalogue: np.ndarray) -> CooccurrenceFeatures:
        """The same cases ranked among the items of a catalogue, bool [V]: targets must be in it.

        Candidates all have training events; so they must be in it too.
        """
        counted = torch.bincount(self.level_of[torch.from_numpy(catalogue)], minlength=len(self.levels))
        return replace(self, multiplicity=counted.float())

    @cached_property
    def case_of(self) -> Tensor:
        """[N], the case of each candidate."""
        return torch.arange(len(self.case)).repeat_interleave(self.offsets.diff())

    @cached_property
    def of_candidates(self) -> Tensor:
        """[N, CANDIDATE_FEATURES]: co-occurrence, popularity, the case, and the item's distance from the history."""
        item, case = self.levels[self.level_of[self.candidates]], self.case[self.case_of]
        order, seen = item[:, POPULARITY_FEATURES], item[:, 2]
        centre, newest = ((order - case[:, i]) * seen for i in (4, 6))
        away = torch.stack((centre, newest, centre.abs()), 1)
        return torch.cat((self.cooccurrence, item[:, :POPULARITY_FEATURES], case, away), 1)


class CooccurrenceStatistics:
    """A domain's graph, popularity and order of items, from training events alone."""

    def __init__(self, train: Sequences) -> None:
        self.graph = cooccurrence_graph(train)
        self.counts = np.bincount(train.items, minlength=train.num_items)
        place = np.rint(np.clip(item_order(train), -4, 4) * PLACES).astype(np.int64)
        self.order = place / PLACES
        level, level_of, multiplicity = np.unique(
            self.counts * (8 * PLACES + 1) + place + 4 * PLACES, return_inverse=True, return_counts=True
        )
        self.level_of, self.multiplicity = torch.from_numpy(level_of), torch.from_numpy(multiplicity).float()
        counts, order = np.divmod(level, 8 * PLACES + 1)
        order = order / PLACES - 4
        log, seen = np.log1p(counts), counts > 0
        known = log[level_of][self.counts > 0]
        z = (log - known.mean()) / (known.std() + 1e-6) * seen if len(known) else 0 * log
        bumps = np.exp(-0.5 * ((order[:, None] - CENTRES) / 0.6) ** 2) * seen[:, None]
        features = np.column_stack((z, 0.3 * z * z, seen, np.ones(len(level)), order, bumps))
        self.levels = torch.from_numpy(features.astype(np.float32))

    @property
    def num_items(self) -> int:
        return self.graph.num_items

    def cases(self, histories: Sequences, targets: np.ndarray | None = None) -> CooccurrenceFeatures:
        """All that can be said after each of these histories, oldest event first; they may be empty.

        Raises ValueError for histories of another catalogue.
        """
        if histories.num_items != self.num_items:
            raise ValueError(
                f"histories must be of the statistics' {self.num_items} items, got ones of {histories.num_items}"
            )
        items = histories.items.astype(np.int32)
        offsets, candidates, cooccurrence = gather_cooccurrence(self.graph, histories.offsets, items, ages=AGES)
        lengths, last = histories.lengths, histories.offsets[1:] - 1
        row = np.repeat(np.arange(len(lengths)), lengths)
        counts, order = (np.append(x[items], 0) for x in (self.counts, self.order))
        # of an empty history's last event: index -1 or another's, masked
        newest, newest_order = (np.where(lengths > 0, x[last], 0) for x in (counts, order))
        known, order = counts[:-1] > 0, order[:-1]
        weights = known * 0.7 ** (last[row] - np.arange(len(items)))

        def recent(values: np.ndarray) -> np.ndarray:
            return np.bincount(row, weights * values, len(lengths))

        total = recent(known)
        centre = recent(order) / np.maximum(total, 1e-6)
        spread = np.sqrt(recent((order - centre[row]) ** 2) / np.maximum(total, 1e-6))
        share = np.bincount(row, known, len(lengths)) / np.maximum(lengths, 1)
        popularity = (np.log1p(lengths) / 2 - 0.8, newest > 0, np.log1p(newest) / 3, share)
        case = np.column_stack((*popularity, centre, spread, newest_order, np.minimum(total, 1)))
        return CooccurrenceFeatures(
            offsets,
            candidates,
            cooccurrence.log1p_(),
            torch.from_numpy(case.astype(np.float32)),
            self.levels,
            self.level_of,
            self.multiplicity,
            None if targets is None else torch.from_numpy(targets.astype(np.int64)),
        )


class CooccurrenceEpisode:
    """Cases of some users of a domain with the statistics of others: no query user is counted.

    statistics: users whose training events are counted. query_users: users whose cases are made: the
    target of each is one of the user's last four events, at random.
    """

    def __init__(self, train: Sequences, *, statistics: np.ndarray, query_users: np.ndarray) -> None:
        self.statistics = CooccurrenceStatistics(train.take(statistics, times=False))
        self.train, self.query_users = train, query_users[train.lengths[query_users] >= 2]
        if not len(self.query_users):
            raise ValueError("query_users must have a user of at least two events")

    def batch(self, size: int, *, seed: tuple[int, ...]) -> CooccurrenceFeatures:
        """``size`` cases: a pure function of the seed."""
        rng = np.random.default_rng(seed)
        users = self.query_users[rng.integers(len(self.query_users), size=size)]
        lengths = self.train.lengths[users]
        cut = rng.integers(np.maximum(1, lengths - 4), lengths)
        begins = self.train.offsets[:-1][users]
        taken = np.minimum(cut, AGES[-1])
        histories = self.train.slices(begins + cut - taken, taken, times=False)
        return self.statistics.cases(histories, self.train.items[begins + cut])
