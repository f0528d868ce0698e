"""Definition of the nearest codeword: squared distances in float64, ties to the lowest index."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18  # distances held at a time


def squared_distances(x_HND: Tensor, codebook_HKD: Tensor) -> Tensor:
    """[H, N, K]: sum over d in ascending order of (x_d - c_d)^2, each operation rounded to float64.

    A distance that is not finite, from a NaN or an infinity in the input, counts as infinite.
    """
    x_HND, codebook_HKD = x_HND.double(), codebook_HKD.double()
    distance_HNK = (x_HND[:, :, 0, None] - codebook_HKD[:, None, :, 0]).square()
    for d in range(1, x_HND.shape[-1]):
        distance_HNK = distance_HNK + (x_HND[:, :, d, None] - codebook_HKD[:, None, :, d]).square()
    return distance_HNK.nan_to_num(nan=float("inf"), posinf=float("inf"))


def nearest_codeword(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest k of least ||x - c_k||^2, and how much farther the second code is.

    x: [N, D] or [H, N, D]; codebook: [K, D] or [H, K, D], K >= 1 and D >= 1.
    Returns indices, int64 [N] or [H, N], and margin, the second least minus the least squared distance in float32:
    infinite if K is 1, zero if both distances are infinite.
    """
    if x.dim() == 2:
        indices, margin = nearest_codeword(x[None], codebook[None])
        return indices[0], margin[0]
    K = codebook.shape[1]
    rows = max(1, CHUNK_ELEMENTS // (K * max(1, x.shape[0])))
    code_K = torch.arange(K, device=x.device)
    indices, margins = [], []
    for x_HnD in x.split(rows, dim=1):
        distance_HnK = squared_distances(x_HnD, codebook)
        least_Hn1 = distance_HnK.amin(-1, keepdim=True)
        index_Hn1 = torch.where(distance_HnK == least_Hn1, code_K, K).amin(-1, keepdim=True)
        second_Hn1 = torch.where(code_K == index_Hn1, float("inf"), distance_HnK).amin(-1, keepdim=True)
        margin_Hn1 = (second_Hn1 - least_Hn1).nan_to_num(nan=0.0 if K > 1 else float("inf"), posinf=float("inf"))
        indices.append(index_Hn1[..., 0])
        margins.append(margin_Hn1[..., 0])
    return torch.cat(indices, 1), torch.cat(margins, 1).float()
