"""Definition of the nearest codeword: squared distances or inner products in float64, ties to the lowest index."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # costs held at a time

Metric = Literal["distance", "product"]
METRICS = ("distance", "product")


def costs(x_HND: Tensor, codebook_HKD: Tensor, metric: Metric = "distance") -> Tensor:
    """[H, N, K]: what each code costs a row, the less the nearer; summed over d in ascending order.

    "distance": the sum of (x_d - c_d)^2; "product": minus the sum of x_d c_d. Each operation is rounded to float64, in
    which products of float32 are exact. A cost that is not finite, from a NaN or an infinity in the input, counts as
    infinite.
    """
    x_HND, codebook_HKD = x_HND.double(), codebook_HKD.double()

    def term(d: int) -> Tensor:
        x_HN1, code_H1K = x_HND[:, :, d, None], codebook_HKD[:, None, :, d]
        return (x_HN1 - code_H1K).square() if metric == "distance" else -(x_HN1 * code_H1K)

    cost_HNK = term(0)
    for d in range(1, x_HND.shape[-1]):
        cost_HNK = cost_HNK + term(d)
    return torch.where(cost_HNK.isfinite(), cost_HNK, float("inf"))


def nearest_codeword(x: Tensor, codebook: Tensor, *, metric: Metric = "distance") -> tuple[Tensor, Tensor]:
    """The lowest k of least cost, and how much more the second code costs.

    x: [N, D] or [H, N, D]; codebook: [K, D] or [H, K, D], K >= 1 and D >= 1.
    metric: "distance", ||x - c_k||^2, or "product", -<x, c_k>: the largest inner product, whatever the codes' lengths.
    Returns indices, int64 [N] or [H, N], and margin, the second least minus the least cost in float32: infinite if K
    is 1, zero if both costs are infinite.
    """
    if x.dim() == 2:
        indices, margin = nearest_codeword(x[None], codebook[None], metric=metric)
        return indices[0], margin[0]
    K = codebook.shape[1]
    rows = max(1, CHUNK_ELEMENTS // (K * max(1, x.shape[0])))
    code_K = torch.arange(K, device=x.device)
    indices, margins = [], []
    for x_HnD in x.split(rows, dim=1):
        cost_HnK = costs(x_HnD, codebook, metric)
        least_Hn1 = cost_HnK.amin(-1, keepdim=True)
        # where every cost is infinite, the first code
        index_Hn1 = torch.where(cost_HnK == least_Hn1, code_K, K).amin(-1, keepdim=True)
        second_Hn1 = torch.where(code_K == index_Hn1, float("inf"), cost_HnK).amin(-1, keepdim=True)
        margin_Hn1 = (second_Hn1 - least_Hn1).nan_to_num(nan=0.0 if K > 1 else float("inf"), posinf=float("inf"))
        indices.append(index_Hn1[..., 0])
        margins.append(margin_Hn1[..., 0])
    return torch.cat(indices, 1), torch.cat(margins, 1).float()
