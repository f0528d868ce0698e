"""Definition of what AdamW does to rows that get no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def missed_steps_(
    p: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last: Tensor,
    lrs: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Take, in place, the steps with zero gradient that each row has missed since step ``last``, one after the other.

    p, exp_avg, exp_avg_sq: [V, D]. last: [V] int64, the steps that each row is up to date with. lrs: [steps], the
    learning rates of all steps so far, the first being step 1.
    """
    for step in range(int(last.min()) + 1, len(lrs) + 1):
        lr, late = float(lrs[step - 1]), last < step
        m, v = betas[0] * exp_avg[late], betas[1] * exp_avg_sq[late]
        move = m / (1 - betas[0] ** step) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        p[late] = (1 - lr * weight_decay) * p[late] - lr * move
        exp_avg[late], exp_avg_sq[late] = m, v
        last[late] = torch.full_like(last[late], step)
