"""Vector quantization as a function of a codebook: for codebooks that live in someone else's parameters."""

from __future__ import annotations

from torch import Tensor

from metarec_fast.ops import vq_commit
from metarec_fast.ops.codebook_checks import Metric
from metarec_fast.ops.gradient_estimators import GRADIENT_ESTIMATORS
from metarec_fast.ops.vq_commit import Gradient


def quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    gradient: Gradient = "rotation",
    row_weight: Tensor | None = None,
    codebook_grad: bool = True,
    metric: Metric = "distance",
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each row by its nearest code, with a gradient to the row.

    x: [N, D] rows. codebook: [K, D]. With a leading [H], H codebooks at once.
    gradient: what passes to x through ``quantized``: "rotation" (see rotate_to) or "straight_through".
    row_weight: weight of each row in the loss, 0 to leave it out; None counts all alike.
    codebook_grad: let the loss pull the codes to the rows as well; False when an average moves the codes.
    metric: what makes a code the nearest, "distance" or "product", the largest inner product: with rows of length 1,
        cosine similarity.

    Returns (quantized like x, indices int64 [N], loss: mean squared distance of row and code, one number). Nothing
    is mutated, so it may be used under torch.func and functional_call.
    Raises ValueError for an unknown ``gradient`` or ``metric`` and what vq_commit raises.
    """
    if gradient not in GRADIENT_ESTIMATORS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENT_ESTIMATORS)}, got {gradient!r}")
    options = {"row_weight": row_weight, "codebook_grad": codebook_grad, "gradient": gradient, "metric": metric}
    return vq_commit(x, codebook, **options)
