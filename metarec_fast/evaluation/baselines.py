"""Baselines: what can be had without training. A model that does not beat them has learned little.

All statistics come from training sequences alone.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data import csr
from metarec_fast.data.domain import Catalogue, Sequences, Split
from metarec_fast.evaluation.catalogue import choice_catalogue
from metarec_fast.evaluation.evaluate import evaluate
from metarec_fast.evaluation.metrics import Metrics
from metarec_fast.evaluation.scorer import Scorer, ScoreTile
from metarec_fast.statistics.transitions import TransitionKernel


class Popularity:
    """Scores an item by its number of training events, whatever the history."""

    def __init__(self, train: Sequences) -> None:
        self._counts = torch.from_numpy(_counts(train)).double()

    @property
    def num_items(self) -> int:
        return len(self._counts)

    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> ScoreTile:
        return lambda begin, end: self._counts[begin:end].expand(len(histories), end - begin)


class Transitions:
    """Scores an item by how often it followed the last items of the history, and popularity where that is silent.

    kernel: see `TransitionKernel`; last, fade: see `TransitionKernel.scores`.

    Popularity only breaks ties. With p in [0, 1) the item's place among the distinct numbers of
    events, an item of score x gets x (1 + 2**-25 p) and one without a score p - 1: x is a float32 and the score a
    float64, and 2**-25 is less than half the gap to the next float32, so that the order of scores never changes.
    """

    def __init__(self, train: Sequences, kernel: TransitionKernel, *, last: int = 1, fade: float = 1.0) -> None:
        if kernel.num_items != train.num_items:
            raise ValueError(f"kernel must have the {train.num_items} items of train, got {kernel.num_items}")
        levels, place = np.unique(_counts(train), return_inverse=True)
        self._popularity = torch.from_numpy(place / len(levels))
        self._kernel, self._last, self._fade = kernel, last, fade

    @property
    def num_items(self) -> int:
        return self._kernel.num_items

    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> ScoreTile:
        offsets, items, x = self._kernel.scores(histories, last=self._last, fade=self._fade)
        case = torch.arange(len(histories)).repeat_interleave(offsets.diff())
        known = x.double() * (1 + 2.0**-25 * self._popularity[items])

        def score_tile(begin: int, end: int) -> Tensor:
            scores = (self._popularity[begin:end] - 1).repeat(len(histories), 1)
            here = (items >= begin) & (items < end)
            scores[case[here], items[here] - begin] = known[here]
            return scores

        return score_tile


def item_neighbours(train: Sequences, *, k: int = 100, longest: int = 200) -> TransitionKernel:
    """Item-kNN (Sarwar et al., 2001): the ``k`` items of highest cosine between the sets of users who chose them.

    Users count with their newest ``longest`` different items, so that time is of the order of longest x events.
    """
    user = np.repeat(np.arange(len(train)), train.lengths)
    pair = (user * train.num_items + train.items)[::-1]  # newest first
    _, first = np.unique(pair, return_index=True)
    user, item = np.divmod(pair[np.sort(first)][::-1], train.num_items)
    lengths = np.bincount(user, minlength=len(train))
    keep = np.arange(len(item)) >= np.repeat(np.cumsum(lengths) - longest, lengths)
    lengths = np.minimum(lengths, longest)
    sets = Sequences(csr.offsets(lengths), item[keep].astype(train.items.dtype), train.num_items)
    together = TransitionKernel.fit(sets, window=max(1, int(lengths.max()) - 1), decay=1).symmetric()
    sizes = np.sqrt(np.maximum(_counts(sets), 1))
    rows = np.repeat(np.arange(train.num_items), np.diff(together.offsets))
    cosines = (together.weights / (sizes[rows] * sizes[together.columns])).astype(np.float32)
    return TransitionKernel(together.offsets, together.columns, cosines).strongest(k)


BASELINES = (
    "popularity",
    "transitions, window 1, last item",
    "transitions, window 5, last item",
    "transitions, window 5 fading, last item",
    "transitions, window 5 fading, last 3 items",
    "shares, window 5 fading, last 3 items",
    "cosines, window 5 fading, last 3 items",
    "item-kNN",
)


def baselines(train: Sequences) -> dict[str, Scorer]:
    """The baselines that a result is compared with, by the names of ``BASELINES``."""
    counts = TransitionKernel.fit(train, window=5, decay=0.8)
    made = (
        Popularity(train),
        Transitions(train, TransitionKernel.fit(train, window=1)),
        Transitions(train, TransitionKernel.fit(train, window=5, decay=1)),
        Transitions(train, counts),
        Transitions(train, counts, last=3, fade=0.5),
        Transitions(train, counts.normalised(), last=3, fade=0.5),
        Transitions(train, counts.normalised(row=0.5, column=0.5), last=3, fade=0.5),
        Transitions(train, item_neighbours(train), last=50),
    )
    return dict(zip(BASELINES, made, strict=True))


def best_baseline(
    split: Split, *, mask_history: bool, catalogue: Catalogue = "training"
) -> tuple[str, Scorer, dict[str, Metrics]]:
    """The baseline with the highest NDCG@10 on validation: its name, the scorer, and what each reached there.

    catalogue: what is ranked, see `Split.candidates`.
    The scorer is fitted to training events alone, also where it is then used for test cases.
    """
    scorers, among = baselines(split.train), choice_catalogue(split, catalogue)
    with warnings.catch_warnings():
        # baselines tie in their tails by design, and the expectation over ties is exact
        warnings.filterwarnings("ignore", message=".* items tie with the target", category=RuntimeWarning)
        table = {
            name: evaluate(
                scorer, split.valid, mask_history=mask_history, protocol=f"{split.protocol}; valid", catalogue=among
            )
            for name, scorer in scorers.items()
        }
    best = max(table, key=lambda name: table[name]["ndcg@10"])
    return best, scorers[best], table


def _counts(train: Sequences) -> np.ndarray:
    return np.bincount(train.items, minlength=train.num_items)
