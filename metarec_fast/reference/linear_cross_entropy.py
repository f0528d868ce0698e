"""Definition of softmax cross-entropy over the items of a table."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """loss_t = log sum_v exp(logit_tv) - logit_(t, target_t), with logit_tv = <h_t, table_v> + bias_v.

    h: [T, D], table: [V, D], targets: [T] int64 in [0, V), bias: [V]. Returns loss: [T].
    """
    logits_TV = h @ table.T if bias is None else h @ table.T + bias
    return torch.logsumexp(logits_TV, 1) - logits_TV.gather(1, targets[:, None]).squeeze(1)
