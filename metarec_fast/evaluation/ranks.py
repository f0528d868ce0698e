"""Ranks by counting: the catalogue passes in tiles, nothing is sorted and no B x V tensor is kept."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast import ops
from metarec_fast.evaluation.linear_scores import LinearScores
from metarec_fast.evaluation.scorer import ScoreTile

TILE = 2048


class NonFiniteScoresError(ValueError):
    """A scorer gave NaN or infinity. Strict comparison would turn a NaN target into a perfect rank."""

    def __init__(self, count: int, cases: int, case: int, item: int, value: float) -> None:
        self.count, self.cases, self.case, self.item, self.value = count, cases, case, item, value
        super().__init__(
            f"scores must be finite, got {count:,} that are not, in {cases:,} cases; "
            f"the first is {value} at case {case} of the batch, item {item}"
        )

    def of_item(self, item: int) -> NonFiniteScoresError:
        """The same of an item under another number."""
        return NonFiniteScoresError(self.count, self.cases, self.case, item, self.value)


@torch.no_grad()
def target_ranks(
    score_tile: ScoreTile,
    *,
    num_items: int,
    targets: Tensor,
    seen: tuple[Tensor, Tensor] | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """How many candidates of each case score above its target, and how many exactly the same.

    score_tile: see `ScoreTile`. targets: [B] int64. seen: CSR (offsets [B+1] int64, items) of items that are no
    candidates, in any order and with repeats; the target stays in, seen or not. tile: items scored at a time.

    A target's own score is read from the tile that also scores its neighbours, for a separate dot product rounds
    differently; then the target is left out of the counts by its index. Items seen are left out by taking their
    counts back, which costs their number and writes nothing into the scorer's tile. Cases whose targets lie close
    together share tiles: with all of them in one tile every tile is computed once. `LinearScores` need no tiles: all of
    this happens in one operator, `ops.target_ranks`.

    Returns greater [B] and equal [B], int64, on the device of the tiles. Same as `reference.target_ranks`.
    Raises NonFiniteScoresError, and TypeError or ValueError for arguments or tiles that do not fit.
    """
    B = len(targets)
    _check(num_items, targets, seen, tile)
    if B == 0:
        return targets.new_zeros(0), targets.new_zeros(0)
    if isinstance(score_tile, LinearScores):
        return _linear_target_ranks(score_tile, num_items, targets, seen)
    rows, items = _left_out(targets, seen)
    begins = torch.arange(0, num_items, tile)
    cuts = torch.searchsorted(items, torch.cat((begins, begins.new_tensor([num_items])))).tolist()
    tiles = [(begin, min(begin + tile, num_items)) for begin in begins.tolist()]

    targets, home = targets.cpu(), targets.cpu() // tile
    homes = home.unique().tolist()
    parts, where = [], []
    for index in homes:
        scores = _score(score_tile, *tiles[index], B)
        here = (home == index).nonzero()[:, 0]
        where.append(here)
        parts.append(scores[here.to(scores.device), (targets[here] - tiles[index][0]).to(scores.device)])
    device = scores.device
    own = torch.empty(B, dtype=scores.dtype, device=device)
    own[torch.cat(where).to(device)] = torch.cat(parts)
    rows, items, own = rows.to(device), items.to(device), own[:, None]

    greater, equal = torch.zeros(2, B, dtype=torch.int64, device=device)
    total = own.sum()
    # Comparisons written as numbers sum at the speed of memory; sums of booleans are ten times slower on CPU.
    flags = torch.empty(B, min(tile, num_items), dtype=own.dtype, device=device)
    at_hand = homes[-1]
    for index in (at_hand, *(i for i in range(len(tiles)) if i != at_hand)):
        begin, end = tiles[index]
        if index != at_hand:
            scores = _score(score_tile, begin, end, B)
        total = total + scores.sum()
        cut = slice(cuts[index], cuts[index + 1])
        out = scores[rows[cut], items[cut] - begin]
        for count, compare in ((greater, torch.gt), (equal, torch.eq)):
            count += compare(scores, own, out=flags[:, : end - begin]).sum(1).long()
            count.index_add_(0, rows[cut], compare(out, own[rows[cut], 0]).long(), alpha=-1)
    # One look at the end, not a synchronisation per tile: a sum over anything non-finite is non-finite.
    if not total.isfinite():
        _raise_if_not_finite(score_tile, tiles, B)
    return greater, equal


def _linear_target_ranks(
    scores: LinearScores, num_items: int, targets: Tensor, seen: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    states, table, bias = scores.states, scores.table, scores.bias
    if (len(states), len(table)) != (len(targets), num_items):
        raise ValueError(f"scores must be {(len(targets), num_items)}, got {(len(states), len(table))}")
    targets, seen = targets.to(states.device), seen and tuple(x.to(states.device) for x in seen)
    greater, equal, nonfinite = ops.target_ranks(states, table, targets, bias=bias, seen=seen, added=scores.added)
    if nonfinite.any():
        case = int(nonfinite.nonzero()[0])
        row = scores.rows(case, case + 1)(0, num_items)[0]
        # at the edge of overflow the last rounding decides: if all are finite here, the largest is at fault
        item = int(row.abs().nan_to_num(nan=torch.inf).argmax())
        raise NonFiniteScoresError(int(nonfinite.sum()), int((nonfinite > 0).sum()), case, item, float(row[item]))
    return greater, equal


def _left_out(targets: Tensor, seen: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Distinct (case, item) pairs that are not counted, by item: what was seen, and the targets themselves."""
    B = len(targets)
    rows, items = torch.arange(B), targets.cpu()
    if seen is not None:
        offsets, seen_items = (x.cpu() for x in seen)
        rows = torch.cat((rows, rows.repeat_interleave(offsets.diff())))
        items = torch.cat((items, seen_items.long()))
    pairs = (items * B + rows).unique()
    return pairs % B, pairs // B


def _score(score_tile: ScoreTile, begin: int, end: int, B: int) -> Tensor:
    scores = score_tile(begin, end)
    if scores.dtype not in (torch.float32, torch.float64):
        got = str(scores.dtype).removeprefix("torch.")
        raise TypeError(f"scores must be float32 or float64, got {got}: at 16 bits ties are the norm")
    if tuple(scores.shape) != (B, end - begin):
        raise ValueError(f"scores of items {begin} to {end} must be {(B, end - begin)}, got {tuple(scores.shape)}")
    return scores


def _raise_if_not_finite(score_tile: ScoreTile, tiles: list[tuple[int, int]], B: int) -> None:
    # A sum of finite scores may overflow, so that this pass may also find nothing.
    count, cases, first = 0, torch.zeros(B, dtype=torch.bool), None
    for begin, end in tiles:
        scores = score_tile(begin, end)
        bad = ~scores.isfinite()
        count += int(bad.sum())
        cases |= bad.any(1).cpu()
        if first is None and bad.any():
            case, column = bad.nonzero()[0].tolist()
            first = case, begin + column, float(scores[case, column])
    if first is not None:
        raise NonFiniteScoresError(count, int(cases.sum()), *first)


def _check(num_items: int, targets: Tensor, seen: tuple[Tensor, Tensor] | None, tile: int) -> None:
    if not 0 < tile <= 2**24:  # flags are summed in float32
        raise ValueError(f"tile must be in 1 to 2**24, got {tile}")
    if targets.dtype != torch.int64 or targets.dim() != 1:
        raise TypeError(f"targets must be int64 [B], got {targets.dtype} of shape {tuple(targets.shape)}")
    _check_range("targets", targets, num_items)
    if seen is not None:
        offsets, items = seen
        if offsets.shape != (len(targets) + 1,) or offsets[0] != 0 or offsets[-1] != len(items):
            raise ValueError(
                f"seen offsets must be [{len(targets) + 1}], from 0 to the number of items seen ({len(items)}), "
                f"got {offsets.tolist() if len(offsets) < 8 else f'{len(offsets)} of them'}"
            )
        _check_range("seen items", items, num_items)


def _check_range(name: str, items: Tensor, num_items: int) -> None:
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise ValueError(f"{name} must be in 0 to {num_items - 1}, got {int(items.min())} to {int(items.max())}")
