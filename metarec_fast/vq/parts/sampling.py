"""Rows of a batch drawn at random without leaving the device, the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from metarec_fast.vq.parts.recomputation import summed


def world_size() -> int:
    """Number of ranks, read at each call: a module may be built before the process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor, *, sync: bool) -> Tensor:
    """Sum of ``x`` over all ranks, in place; ``x`` itself when not ``sync`` or alone."""
    if sync and world_size() > 1:
        if torch.compiler.is_compiling():
            dist.all_reduce(x)
        else:
            summed(x, dist.all_reduce)
    return x


def draw_rows(rows: Tensor, valid: Tensor, vacant: Tensor, *, sync: bool = False) -> tuple[Tensor, Tensor]:
    """Draw a valid row for each vacant place, no row twice while there are enough.

    rows: [H, N, D]. valid: bool [H, N]. vacant: bool [H, K]. sync: rows of all ranks, the same result on each.
    The valid rows are cut into as many equal runs as places can be filled, and one row is drawn from each run:
    distinct by construction, without a sort over rows, a compaction or a number that the host must read.

    Returns (drawn [H, K, D], distinct bool [H, K]): the vacant places that got a row of their own. With fewer rows
    than places a random stretch of them is distinct and the others share runs. Draws come from torch's generator of
    the device.
    """
    (H, N, D), K = rows.shape, vacant.shape[1]
    rank, world = (dist.get_rank(), world_size()) if sync and world_size() > 1 else (0, 1)
    # One reduction agrees on the draws (a sum of uniforms modulo 1 is uniform) and gives every rank the counts.
    shared = torch.zeros(H, K + 2 + world, dtype=torch.float64, device=rows.device)
    shared[:, : K + 2] = torch.rand(H, K + 2, dtype=torch.float64, device=rows.device)
    shared[:, K + 2 + rank] = valid.sum(-1).double()
    sum_over_ranks(shared, sync=sync)
    first_place, first_row, draw = shared[:, : K + 2].frac().split((1, 1, K), -1)
    counts = shared[:, K + 2 :].long()
    total, before = counts.sum(-1, keepdim=True), counts[:, :rank].sum(-1, keepdim=True)

    places = vacant.sum(-1, keepdim=True)
    runs = torch.minimum(places, total)
    run = (vacant.cumsum(-1) - 1 + (first_place * places).long()) % places.clamp_min(1)
    distinct = vacant & (run < runs)
    runs = runs.clamp_min(1)
    run = run % runs
    begin = run * total // runs
    length = (run + 1) * total // runs - begin
    # from a random first row on, so that rows in shorter runs are no likelier
    chosen = (begin + (draw * length).long() + (first_row * total).long()) % total.clamp_min(1) - before

    own = (chosen >= 0) & (chosen < counts[:, rank : rank + 1])
    if N == 0:
        drawn = rows.new_zeros(H, K, D)
    else:
        # the valid row number i is the first row up to which i + 1 rows are valid
        at = torch.searchsorted(valid.cumsum(-1), chosen.clamp_min(0) + 1).clamp_max(N - 1)
        drawn = rows.gather(1, at.unsqueeze(-1).expand(H, K, D))
        drawn = torch.where(own.unsqueeze(-1), drawn, 0)  # where, not a product: a row left out may be NaN
    return sum_over_ranks(drawn, sync=sync), distinct
