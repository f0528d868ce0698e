"""The best items of a catalogue after each history: memory follows the batch and the tile, not users or items."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences
from metarec_fast.evaluation.ranks import NonFiniteScoresError
from metarec_fast.evaluation.scorer import Scorer, ScoreTile

BATCH, TILE = 256, 8192


@torch.no_grad()
def top_k_items(
    scorer: Scorer,
    histories: Sequences,
    *,
    k: int,
    exclude_seen: bool,
    catalogue: np.ndarray | None = None,
    batch_size: int = BATCH,
    tile: int = TILE,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each history in turn at most ``k`` items, int64, and their scores, best first; of equal ones the first items.

    exclude_seen: leave the items of the history out. catalogue: bool [V], the items to choose from, by default all.
    Raises NonFiniteScoresError for any score that is not finite; its case is the number of the history.
    """
    outside = None if catalogue is None else torch.from_numpy(~catalogue)
    for begin in range(0, len(histories), batch_size):
        batch = histories.take(np.arange(begin, min(begin + batch_size, len(histories))))
        best, ids = _best(
            scorer.prepare(batch), batch, k=k, exclude_seen=exclude_seen, outside=outside, tile=tile, first=begin
        )
        for scores, items in zip(best.numpy(), ids.numpy(), strict=True):
            kept = scores > -np.inf
            yield items[kept], scores[kept]


def _best(
    score_tile: ScoreTile,
    batch: Sequences,
    *,
    k: int,
    exclude_seen: bool,
    outside: Tensor | None,
    tile: int,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Scores and items of a batch, [B, k] each; -inf where there are fewer. first: the number of its first history."""
    B, V = len(batch), batch.num_items
    case = torch.arange(B).repeat_interleave(torch.from_numpy(batch.lengths))
    seen = torch.from_numpy(batch.items.astype(np.int64))
    best, ids = None, torch.empty(B, 0, dtype=torch.int64)
    for begin in range(0, V, tile):
        end = min(begin + tile, V)
        scores = score_tile(begin, end).to("cpu", copy=True)
        if not scores.sum().isfinite():  # a sum of finite scores may overflow: look again
            _raise_if_not_finite(scores, first=first, begin=begin)
        if outside is not None:
            scores[:, outside[begin:end]] = -torch.inf
        if exclude_seen:
            here = (seen >= begin) & (seen < end)
            scores[case[here], seen[here] - begin] = -torch.inf
        columns = torch.arange(begin, end).expand(B, -1)
        pool = scores if best is None else torch.cat((best, scores), 1)
        at = _first_of_the_best(pool, min(k, pool.shape[1]))
        best, ids = pool.gather(1, at), torch.cat((ids, columns), 1).gather(1, at)
    assert best is not None
    return best, ids


def _first_of_the_best(pool: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest of each row are, largest first and of equal ones the first: `torch.topk` takes any."""
    values, at = pool.topk(k, 1)
    least = values[:, -1:]
    equal = pool == least
    unsure = (equal.sum(1) > (values == least).sum(1)) & (least[:, 0] > -torch.inf)
    for row in unsure.nonzero()[:, 0].tolist():
        above = (pool[row] > least[row]).nonzero()[:, 0]
        at[row] = torch.cat((above, equal[row].nonzero()[: k - len(above), 0]))
    at = at.sort(1).values
    return at.gather(1, pool.gather(1, at).sort(dim=1, descending=True, stable=True).indices)


def _raise_if_not_finite(scores: Tensor, *, first: int, begin: int) -> None:
    bad = ~scores.isfinite()
    if bad.any():
        case, column = bad.nonzero()[0].tolist()
        value = float(scores[case, column])
        raise NonFiniteScoresError(int(bad.sum()), int(bad.any(1).sum()), first + case, begin + column, value)
