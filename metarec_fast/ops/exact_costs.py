"""The costs that define the nearest code, in float64: for the few pairs of a row and a code that bounds leave open."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast.ops.codebook_checks import Metric


def exact_costs(x_HND: Tensor, codebook_HKD: Tensor, metric: Metric = "distance") -> Tensor:
    """What each code costs a row, [H, N, K] float64: the bits of ``reference.nearest_codeword.costs``.

    Squared distances or minus inner products, summed over d in ascending order; infinite where they are not finite.
    """
    x, codebook = x_HND.double().unbind(-1), codebook_HKD.double().unbind(-1)
    total = None
    for x_HN, code_HK in zip(x, codebook, strict=True):
        if metric == "product":
            term = (x_HN.unsqueeze(-1) * code_HK.unsqueeze(1)).neg_()
        else:
            term = (x_HN.unsqueeze(-1) - code_HK.unsqueeze(1)).square_()
        total = term if total is None else total.add_(term)
    return total.masked_fill_(~total.isfinite(), torch.inf)
