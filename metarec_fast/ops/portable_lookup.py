"""The lookup in torch's own operators, for programs that leave Python: traced, exported, translated to ONNX."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


def leaves_python() -> bool:
    """Whether a program is being recorded that has to run where metarec_fast is not installed."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def check_leaves_in_eval(module: nn.Module) -> None:
    """Raise RuntimeError if ``module`` is being recorded in training, where each call moves its codes."""
    if module.training and leaves_python():
        raise RuntimeError(
            f"{type(module).__name__} cannot be traced or exported in training mode, as every call moves its codes; "
            "call model.eval() first"
        )


def portable_nearest(
    x_HND: Tensor, codebook_HKD: Tensor, metric: Literal["distance", "product"] = "distance"
) -> Tensor:
    """The indices that `reference.nearest_codeword` gives, int64 [H, N]; holds H x N x K float64 values, twice.

    metric: "product" for the lowest code of largest inner product instead of the nearest.
    A float64 product gives every pair a score whose error is bounded. The pairs that can still be the best, mostly one
    for each row, are measured as the reference does: element after element. Pairs that tie take 8 D bytes each.
    """
    H, N, D = x_HND.shape
    K = codebook_HKD.shape[1]
    x, codes = x_HND.detach().double(), codebook_HKD.detach().double()
    square_HN1, square_HK = x.square().sum(-1, keepdim=True), codes.square().sum(-1)
    product_HNK = x @ codes.transpose(1, 2)
    score_HNK = -product_HNK if metric == "product" else square_HK.unsqueeze(1) - 2 * product_HNK
    # infinite or NaN: never the best
    score_HNK = torch.where(score_HNK.abs() < torch.inf, score_HNK, torch.inf)
    # D roundings in a score and as many in a distance, each below half an ulp of (|x| + |c|)^2
    longest_H11 = torch.where(square_HK < torch.inf, square_HK, 0).amax(1).view(H, 1, 1)
    slack_HN1 = (D + 4) * 2.0**-49 * (square_HN1 + longest_H11)
    possible_HNK = (score_HNK <= score_HNK.amin(-1, keepdim=True) + slack_HN1) & (score_HNK < torch.inf)
    head, row, code = possible_HNK.nonzero().unbind(1)
    of_rows, of_codes = x.reshape(-1, D)[head * N + row], codes.reshape(-1, D)[head * K + code]
    terms = -of_rows * of_codes if metric == "product" else (of_rows - of_codes).square()
    best = terms.cumsum(-1)[:, -1]
    return torch.full_like(score_HNK, torch.inf).index_put((head, row, code), best).argmin(-1)


def stable_order(values: Tensor) -> Tensor:
    """Positions along the last dimension from the least value up, at ties the lower first."""
    if torch.onnx.is_in_onnx_export():
        return values.sort(dim=-1).indices  # ONNX's TopK, which is stable; the exporters do not know the flag
    return values.sort(dim=-1, stable=True).indices
