"""K-means initialisation of a codebook."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from metarec_fast.ops import nearest_codeword, vq_ema_update_, vq_statistics
from metarec_fast.ops.register import define
from metarec_fast.vq.parts.sampling import draw_rows, sum_over_ranks, world_size


def init_by_kmeans_(
    embed: Tensor,
    embed_avg: Tensor,
    cluster_size: Tensor,
    initted: Tensor,
    rows: Tensor,
    valid: Tensor,
    *,
    iterations: int,
    eps: float,
    cosine: bool,
    sync: bool,
) -> bool:
    """Set codes and averages to the centres that Lloyd's algorithm finds from random rows, unless ``initted``.

    embed, embed_avg: [H, K, D], cluster_size: [H, K], and initted: bool [], written in place. rows: [H, N, D].
    valid: bool [H, N]. sync: over the rows of all ranks; if some of them are initialised, the first of these sends its
    codes to those that are not, with a warning there. Waits for the device.
    Returns whether the codes are initialised now: False, with nothing done, if a codebook has no row.

    A centre that loses its rows stays where it is, and may win some back. One that has none in the end (fewer distinct
    rows than codes) is set to a random row, as if that row were its only one: cluster_size 1, so that no average
    shrinks it to the origin. cosine: rows are of length 1 and join the centre of largest product; rows that have no
    direction must not be valid, and a centre whose rows cancel stays where it is.
    """
    K = embed.shape[1]
    num_rows, source = _ranks_agree(initted, valid, sync=sync)
    if source is not None:
        _take_codes_(embed, embed_avg, cluster_size, initted, source=source)
    if bool(initted):
        return True
    if num_rows == 0:
        return False
    if num_rows < K:
        warnings.warn(f"k-means initialises {K} codes from {num_rows} rows: some codes are equal", stacklevel=4)
    rows = torch.where(valid.unsqueeze(-1), rows, 0)
    means, _ = draw_rows(rows, valid, torch.ones_like(cluster_size, dtype=torch.bool), sync=sync)
    for _ in range(iterations):
        nearest = nearest_codeword(rows, means, metric="product" if cosine else "distance", with_margin=False)
        indices = nearest.indices.masked_fill(~valid, -1)
        counts, sums = statistics(rows, indices, K, sync=sync)
        centres, moves = sums / counts.clamp_min(1).unsqueeze(-1), counts > 0
        if cosine:
            centres = F.normalize(centres, dim=-1, eps=1e-6)
            moves = moves & (torch.linalg.vector_norm(centres, dim=-1) > 0.5)
        means = torch.where(moves.unsqueeze(-1), centres, means)
    empty = counts == 0
    if empty.any():
        drawn, _ = draw_rows(rows, valid, empty, sync=sync)
        means = torch.where(empty.unsqueeze(-1), drawn, means)
        counts = counts.masked_fill(empty, 1)
    # decay 0: the averages become these statistics, and the codes follow from them as in any step
    sums = means * counts.unsqueeze(-1)
    vq_ema_update_(cluster_size, embed_avg, embed, counts, sums, decay=0.0, eps=eps, normalize=cosine)
    initted.fill_(True)
    return True


def _ranks_agree(initted: Tensor, valid: Tensor, *, sync: bool) -> tuple[int, int | None]:
    """The number of rows over all ranks, and the rank to copy codes from if only some ranks are initialised.

    One reduction, so that no rank runs k-means while another runs a training step.
    """
    num_rows = valid.sum(-1).amin()
    if not sync or world_size() == 1:
        return int(num_rows), None
    counts = torch.zeros(1 + world_size(), dtype=torch.float64, device=valid.device)
    counts[0], counts[1 + dist.get_rank()] = num_rows, initted
    total, *ready = sum_over_ranks(counts, sync=True).tolist()
    return int(total), ready.index(1) if 0 < sum(ready) < len(ready) else None


def _take_codes_(embed: Tensor, embed_avg: Tensor, cluster_size: Tensor, initted: Tensor, *, source: int) -> None:
    """Copy the codes of rank ``source`` on ranks that are not initialised."""
    state = torch.cat((embed, embed_avg, cluster_size.unsqueeze(-1)), -1)
    state = sum_over_ranks(state if dist.get_rank() == source else torch.zeros_like(state), sync=True)
    if bool(initted):
        return
    warnings.warn(
        f"rank {dist.get_rank()} has no codes yet, as its `initted` says, and rank {source} has: they are taken from "
        "there; load the same state on every rank",
        stacklevel=5,
    )
    D = embed.shape[-1]
    for tensor, given in zip((embed, embed_avg, cluster_size), state.split((D, D, 1), -1), strict=True):
        tensor.copy_(given.view_as(tensor))
    initted.fill_(True)


def statistics(rows: Tensor, indices: Tensor, codebook_size: int, *, sync: bool) -> tuple[Tensor, Tensor]:
    """Counts [H, K] and sums [H, K, D] of rows [H, N, D] by code, in float32; over all ranks in one reduction."""
    counts, sums = vq_statistics(rows.float(), indices, codebook_size)
    if sync:
        packed = sum_over_ranks(torch.cat((sums, counts.unsqueeze(-1)), -1), sync=True)
        sums, counts = packed[..., :-1].contiguous(), packed[..., -1].contiguous()
    return counts, sums


def _run(*args: Any) -> None:
    *tensors, iterations, eps, cosine, sync = args
    if not init_by_kmeans_(*tensors, iterations=iterations, eps=eps, cosine=cosine, sync=sync):
        raise RuntimeError(
            "under torch.compile the first batch must have a finite row that is kept"
            f"{' and is not 0' if cosine else ''}, got none"
        )


# For a trace, which cannot wait for a first batch that has rows.
traced_init_by_kmeans_ = define(
    "vq_init_by_kmeans_(Tensor(a!) embed, Tensor(b!) embed_avg, Tensor(c!) cluster_size, Tensor(d!) initted, "
    "Tensor rows, Tensor valid, int iterations, float eps, bool cosine, bool sync) -> ()",
    cpu=_run,
    cuda=_run,
    fake=lambda *args: None,
)
