"""Definition of the diagonal complex recurrence over packed rows."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan(a: Tensor, u: Tensor, offsets: Tensor, *, reverse: bool = False) -> Tensor:
    """h_t = a * h_(t-1) + u_t, restarting at every offset; ``reverse`` runs from the end of each segment.

    a: [2, D], u: [T, 2, D], real and imaginary planes; offsets: [B+1] int64. Returns h: [T, 2, D].
    """
    a_D, u_TD = torch.complex(*a.unbind(0)), torch.complex(*u.unbind(1))
    rows: list[Tensor] = [u_TD.new_zeros(0)] * u.shape[0]
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        order = range(end - 1, begin - 1, -1) if reverse else range(begin, end)
        h_D = torch.zeros_like(a_D)
        for t in order:
            h_D = a_D * h_D + u_TD[t]
            rows[t] = h_D
    if not rows:
        return torch.zeros_like(u)
    return torch.view_as_real(torch.stack(rows)).movedim(-1, 1).contiguous()
