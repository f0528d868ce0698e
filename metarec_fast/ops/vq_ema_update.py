"""vq_ema_update_: one step of the exponential moving average of a codebook, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast.ops.register import check_tensor, define
from metarec_fast.reference.vq_ema_update import vq_ema_update_ as reference_vq_ema_update_


def _run(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    weight: Tensor | None,
    normalize: bool,
) -> None:
    # A few elementwise passes over [K, D]: ordinary torch operations are at the memory's speed on every device.
    reference_vq_ema_update_(
        cluster_size, embed_avg, embed, counts, sums, decay=decay, eps=eps, weight=weight, normalize=normalize
    )


_op = define(
    "vq_ema_update_(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) embed, Tensor counts, Tensor sums, "
    "float decay, float eps, Tensor? weight, bool normalize) -> ()",
    cpu=_run,
    cuda=_run,
    fake=lambda *args: None,
)


def vq_ema_update_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float,
    weight: Tensor | None = None,
    normalize: bool = False,
) -> None:
    """Move cluster_size and embed_avg towards one batch's statistics and recompute the codes, all in place.

    cluster_size: [..., K] and embed_avg, embed: [..., K, D], float32 or float64, changed in place.
    counts: [..., K] and sums: [..., K, D], of `vq_statistics` (summed over ranks if there are several).
    decay: in [0, 1], the weight of the past. eps: >= 0, smooths the cluster sizes.
    weight: [K] or [..., K], scales the step of each code, or None for 1.
    normalize: scale each code to unit length (cosine codebooks).

    Same result as `reference.vq_ema_update_`. Not differentiable.
    Raises TypeError or ValueError for arguments of another dtype, shape, range or device.
    """
    check_tensor(embed, "embed", dtypes=(torch.float32, torch.float64), dims=max(2, embed.dim()))
    codes = embed.shape[:-1]
    for name, value, shape in (
        ("cluster_size", cluster_size, codes),
        ("embed_avg", embed_avg, embed.shape),
        ("counts", counts, codes),
        ("sums", sums, embed.shape),
    ):
        check_tensor(value, name, dtypes=(embed.dtype,), dims=len(shape), device=embed.device)
        if value.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} to match embed, got {tuple(value.shape)}")
    if weight is not None and (weight.shape not in (codes, codes[-1:]) or weight.device != embed.device):
        raise ValueError(
            f"weight must be {tuple(codes)} or {tuple(codes[-1:])} on {embed.device}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    _op(
        cluster_size.detach(),
        embed_avg.detach(),
        embed.detach(),
        counts.detach(),
        sums.detach(),
        decay,
        eps,
        None if weight is None else weight.detach(),
        normalize,
    )
