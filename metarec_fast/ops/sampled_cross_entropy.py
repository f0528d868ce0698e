"""sampled_cross_entropy: softmax over the target and a sample of the table, corrected for how the sample was drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarec_fast.ops.register import check_tensor


def sampled_cross_entropy(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    logq: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each row's target against negatives, logits lowered by log(N q) (logQ correction).

    loss_t = -logit_t + log(exp(logit_t) + sum_n exp(logit_n - log(N q_n))), which estimates the full softmax loss: the
    sum over negatives is an unbiased estimate of the sum over the items that are not the target. A negative that is
    the target of its row is left out. The target is there by right, not by the draw, and needs no correction
    (arXiv 2507.09331).

    h: [T, D]. table: [V, D]. targets: [T] int64. bias: [V] or None.
    negatives: [N] int64 shared by all rows, or [T, N] of each row, drawn with replacement.
    logq: log of the probability of drawing each negative in one draw, shape of ``negatives``.

    Returns loss: [T]. Differentiable any number of times in h, table and bias. Costs [T, N] logits.
    Raises TypeError or ValueError for arguments of another dtype, shape or device.
    """
    check_tensor(h, "h", dtypes=(torch.float32, torch.float64), dims=2)
    check_tensor(table, "table", dtypes=(h.dtype,), dims=2, device=h.device)
    check_tensor(targets, "targets", dtypes=(torch.int64,), dims=1, device=h.device)
    check_tensor(negatives, "negatives", dtypes=(torch.int64,), dims=negatives.dim(), device=h.device)
    T, D = h.shape
    if table.shape[1] != D:
        raise ValueError(f"table must be [V, {D}] to match h, got {tuple(table.shape)}")
    if targets.shape[0] != T:
        raise ValueError(f"targets must be [{T}] to match h, got {tuple(targets.shape)}")
    if negatives.dim() not in (1, 2) or (negatives.dim() == 2 and negatives.shape[0] != T):
        raise ValueError(f"negatives must be [N] or [{T}, N], got {tuple(negatives.shape)}")
    if negatives.shape[-1] == 0:
        raise ValueError("negatives must hold at least one item, got none")
    if logq.shape != negatives.shape:
        raise ValueError(f"logq must have the shape of negatives {tuple(negatives.shape)}, got {tuple(logq.shape)}")
    target_rows = torch.nn.functional.embedding(targets, table)
    negative_rows = torch.nn.functional.embedding(negatives, table)
    positive = (h * target_rows).sum(1)
    if negatives.dim() == 1:
        logits = h @ negative_rows.T
    else:
        logits = torch.einsum("td,tnd->tn", h, negative_rows)
    if bias is not None:
        positive, logits = positive + bias[targets], logits + bias[negatives]
    logits = logits - (logq.to(h.dtype) + math.log(negatives.shape[-1]))
    logits = logits.masked_fill(negatives == targets[:, None], float("-inf"))
    return torch.logsumexp(torch.cat((positive[:, None], logits), 1), 1) - positive
