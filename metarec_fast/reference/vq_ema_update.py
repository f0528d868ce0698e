"""Definition of the exponential moving average that moves a codebook."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
    """Move the averages towards the statistics of one batch and recompute the codes, all in place.

    cluster_size, counts: [..., K]; embed_avg, embed, sums: [..., K, D]; weight: [K] or [..., K], scales the step.
    Codes are embed_avg / cluster_size with cluster sizes smoothed so that none is zero: (n_k + eps) / (n + K eps) * n.
    normalize: scale each code to unit length (cosine codebooks).
    """
    step = 1 - decay
    if weight is None:
        cluster_size.lerp_(counts, step)
        embed_avg.lerp_(sums, step)
    else:
        cluster_size.lerp_(counts, (step * weight).to(counts.dtype).expand_as(counts))
        embed_avg.lerp_(sums, (step * weight).to(sums.dtype).unsqueeze(-1).expand_as(sums))
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total
    codes = embed_avg / smoothed.unsqueeze(-1)
    embed.copy_(F.normalize(codes, dim=-1, eps=1e-6) if normalize else codes)
