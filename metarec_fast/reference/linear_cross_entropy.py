"""Definition of softmax cross-entropy over the items of a table."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: str = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """loss_t = log sum_v exp(logit_tv) - (1 - s) logit_(t, target_t) - s mean_v logit_tv, s = label_smoothing,
    with logit_tv = <h_t, table_v> + bias_v; 0 where the target is ignore_index.

    h: [T, D], table: [V, D], targets: [T] int64 in [0, V) or ignore_index, bias: [V], row_weight: [T].
    Returns row_weight * loss: [T]; or its sum, or its sum over that of the weights of rows that are not ignored.
    """
    keep_T = targets != ignore_index
    logits_TV = h.masked_fill(~keep_T[:, None], 0.0) @ table.T  # nothing of an ignored row counts, not even a NaN
    if bias is not None:
        logits_TV = logits_TV + bias
    loss_T = torch.logsumexp(logits_TV, 1)
    loss_T = loss_T - (1 - label_smoothing) * logits_TV.gather(1, targets.where(keep_T, 0)[:, None]).squeeze(1)
    if label_smoothing:
        loss_T = loss_T - label_smoothing * logits_TV.mean(1)
    weight_T = torch.ones_like(loss_T) if row_weight is None else row_weight
    loss_T = (weight_T * loss_T).masked_fill(~keep_T, 0.0)
    if reduction == "none":
        return loss_T
    return loss_T.sum() if reduction == "sum" else loss_T.sum() / weight_T.masked_fill(~keep_T, 0.0).sum()
