"""How far codes are from orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def orthogonality_loss(codebook: Tensor, *, used: Tensor | None = None, max_codes: int | None = None) -> Tensor:
    """Mean squared cosine over all pairs of codes, less what each code's pair with itself adds.

    codebook: [H, K, D]. used: indices [1, N] of the codes to count (-1: none), None for all; needs H = 1.
    max_codes: count at most so many codes, drawn at random. Source: equation 2 of arXiv 2112.00384.
    """
    H, K, _ = codebook.shape
    codes = F.normalize(codebook, dim=-1, eps=1e-6)
    if used is None:
        if max_codes is not None and max_codes < K:
            codes, K = codes[:, torch.randperm(K, device=codes.device)[:max_codes]], max_codes
        return _squared_cosines(codes) / (H * K**2) - 1 / K
    # Codes left out become zero rows: how many are in use stays on the device.
    hits = torch.zeros(K + 1, dtype=codes.dtype, device=codes.device).index_fill(0, used.reshape(-1) + 1, 1.0)
    counted = hits[1:]
    if max_codes is not None and max_codes < K:
        order = (
            (torch.rand(K, dtype=counted.dtype, device=codes.device) + counted).topk(max_codes).indices
        )  # codes in use come first
        counted = counted * torch.zeros_like(counted).index_fill(0, order, 1.0)
    number = counted.sum().clamp_min(1)
    return _squared_cosines(codes * counted.unsqueeze(-1)) / number**2 - 1 / number


def _squared_cosines(codes: Tensor) -> Tensor:
    # |C C^T|^2 = |C^T C|^2: take the smaller of the two
    gram = codes.mT @ codes if codes.shape[-1] < codes.shape[-2] else codes @ codes.mT
    return gram.square().sum()
