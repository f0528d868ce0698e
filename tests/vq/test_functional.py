"""Quantization by codebooks that are somebody else's parameters."""

import pytest
import torch
from torch.nn import functional as F

from metarec_fast.vq import quantize_learned, rotate_to, straight_through


def plain(x, codebook, estimator, row_weight, commitment_weight):
    """The definition, in plain torch."""
    indices = torch.cdist(x, codebook).argmin(-1)
    code = codebook.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
    weight = torch.ones(x.shape[1], dtype=x.dtype) if row_weight is None else row_weight

    def mean(error):
        return (error.square().mean((0, 2)) * weight).sum() / weight.sum()

    loss = mean(code - x.detach()) + commitment_weight * mean(x - code.detach())
    return estimator(x, code.detach()) + (code - code.detach()), indices, loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("gradient", "estimator"), [("rotation", rotate_to), ("straight_through", straight_through)])
def test_codes_learn_from_task_and_loss(gradient, estimator, weighted):
    x, codebook = torch.randn(2, 30, 4, dtype=torch.float64), torch.randn(2, 8, 4, dtype=torch.float64)
    row_weight = torch.arange(30.0, dtype=torch.float64) % 4 if weighted else None
    task = torch.randn(4, dtype=torch.float64)
    results = []
    for run in (quantize_learned, plain):
        given, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        if run is plain:
            quantized, indices, loss = plain(given, codes, estimator, row_weight, 0.5)
        else:
            options = {"gradient": gradient, "row_weight": row_weight, "commitment_weight": 0.5}
            quantized, indices, loss = quantize_learned(given, codes, **options)
        ((quantized @ task).square().sum() + 3 * loss).backward()
        results.append((quantized.detach(), indices, loss.detach(), given.grad, codes.grad))
    torch.testing.assert_close(*results)
    assert results[0][4].abs().sum() > 0


def test_one_codebook_is_a_stack_of_one():
    x, codebook = torch.randn(20, 4), torch.randn(8, 4)
    weight = torch.rand(20)
    many, one = (quantize_learned(*given, row_weight=weight) for given in ((x[None], codebook[None]), (x, codebook)))
    assert torch.equal(many[0][0], one[0]) and torch.equal(many[1][0], one[1])
    torch.testing.assert_close(many[2], one[2])
    torch.testing.assert_close(quantize_learned(x, codebook)[2], 1.25 * F.mse_loss(one[0], x))


def test_unknown_gradients_are_refused():
    with pytest.raises(ValueError, match="gradient must be one of rotation, straight_through, got 'none'"):
        quantize_learned(torch.randn(2, 4), torch.randn(3, 4), gradient="none")
