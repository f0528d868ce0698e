"""Vector quantization as a function of a codebook, for codebooks that are parameters of another module."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

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
    codebook_grad: whether the loss has a gradient to the codes as well; False when an average moves the codes.
    metric: what makes a code the nearest, "distance" or "product", the largest inner product: with rows of length 1,
        cosine similarity.

    Returns (quantized like x, indices int64 [N], loss: 0-dim, mean over rows and dimensions of the squared difference).
    Nothing is mutated, so it may be used under torch.func and functional_call.
    Raises ValueError for an unknown ``gradient`` or ``metric``, and TypeError or ValueError as `ops.vq_commit`.
    """
    _check_gradient(gradient)
    options = {"row_weight": row_weight, "codebook_grad": codebook_grad, "gradient": gradient, "metric": metric}
    return vq_commit(x, codebook, **options)


def quantize_learned(
    x: Tensor,
    codebook: Tensor,
    *,
    gradient: Gradient = "rotation",
    row_weight: Tensor | None = None,
    commitment_weight: float = 0.25,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` for a codebook that learns from the task, through ``quantized``, and from the loss, as in VQ-VAE.

    Arguments and results as for `quantize`, but for the loss: |sg(x) - c|^2 + commitment_weight * |x - sg(c)|^2, each
    the (weighted) mean over rows and dimensions, sg: stop-gradient. row_weight: floating point [N], not all 0; unlike
    in `quantize`, rows of weight 0 must be finite. Source: equation 3 of arXiv 1711.00937, whose codes have no gradient
    from the task.
    """
    _check_gradient(gradient)
    quantized, indices, commitment = vq_commit(x, codebook, row_weight=row_weight)
    loss = _mean_square_error(quantized, x.detach(), row_weight) + commitment_weight * commitment
    estimate = GRADIENT_ESTIMATORS[gradient](x, quantized.detach())
    return estimate + (quantized - quantized.detach()), indices, loss


def _mean_square_error(x: Tensor, y: Tensor, row_weight: Tensor | None) -> Tensor:
    if row_weight is None:
        return F.mse_loss(x, y)
    error = (x - y).square()
    return (error.mean((0, 2) if x.dim() == 3 else 1) * row_weight).sum() / row_weight.sum()


def _check_gradient(gradient: str) -> None:
    if gradient not in GRADIENT_ESTIMATORS:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENT_ESTIMATORS)}, got {gradient!r}")
