"""The part of a domain's items that is ranked: by default those of training events, for of others nothing is known."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Cases, Catalogue, Split
from metarec_fast.data.split import select_cases
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.evaluation.ranks import TILE
from metarec_fast.evaluation.scorer import ScoreTile


class Candidates:
    """Some items of a domain, under numbers of their own: those that ``mask``, bool [V], marks.

    Raises TypeError or ValueError for a mask of another kind or length, or one that marks nothing.
    """

    def __init__(self, mask: np.ndarray, num_items: int) -> None:
        if np.asarray(mask).dtype != bool:
            raise TypeError(f"catalogue must be bool [{num_items}], got {np.asarray(mask).dtype}")
        if np.shape(mask) != (num_items,):
            raise ValueError(f"catalogue must be [{num_items}], one for each item, got shape {np.shape(mask)}")
        if not np.any(mask):
            raise ValueError("catalogue must hold an item at least, got none")
        self.mask = torch.from_numpy(np.ascontiguousarray(mask))
        self.items = self.mask.nonzero()[:, 0]
        self._place = torch.where(self.mask, self.mask.cumsum(0) - 1, -1)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def whole(self) -> bool:
        return len(self.items) == len(self.mask)

    def places(self, items: Tensor) -> Tensor:
        """The new numbers of items; -1 for those outside."""
        return self._place[items.cpu().long()]

    def seen(self, offsets: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """A CSR of items under their new numbers, without those outside."""
        place = self.places(items)
        before = torch.nn.functional.pad((place >= 0).cumsum(0), (1, 0))
        return before[offsets.cpu()], place[place >= 0]

    def scores(self, score_tile: ScoreTile) -> ScoreTile:
        """Scores of the candidates alone; ``score_tile`` is called for at most TILE items."""
        if isinstance(score_tile, LinearScores):
            return score_tile.of_items(self.items.to(score_tile.table.device))

        def tile(begin: int, end: int) -> Tensor:
            items, parts = self.items[begin:end], []
            while len(items):
                first = int(items[0])
                inside = items < first + TILE
                near, items = items[inside], items[~inside]
                scores = score_tile(first, int(near[-1]) + 1)
                parts.append(scores[:, (near - first).to(scores.device)])
            return torch.cat(parts, 1)

        return tile


def inside(cases: Cases, catalogue: np.ndarray | None) -> Cases:
    """The cases whose target is in the catalogue, bool [V]; all of them for None."""
    return cases if catalogue is None else select_cases(cases, np.flatnonzero(catalogue[cases.targets]))


def choice_catalogue(split: Split, catalogue: Catalogue) -> np.ndarray | None:
    """The items among which validation chooses, bool [V] or None for all; `Split.candidates`, where that can choose.

    Where no validation target is in the catalogue every model would be as good as any other. All items are ranked then,
    with a warning.
    """
    mask = split.candidates(catalogue)
    if mask is not None and len(split.valid) and not mask[split.valid.targets].any():
        warnings.warn(
            f"no validation target of {split.domain.name!r} occurs in training events: validation ranks all items "
            "to choose by",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return mask
