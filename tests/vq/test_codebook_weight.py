"""codebook_weight beside commitment_weight: the loss of the VQ-VAE paper, against plain torch."""

import pytest
import torch
from torch.nn import functional as F

from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def plain_loss(x, codebook, commitment_weight, codebook_weight, keep=None):
    """Loss and indices by a table of distances. x: [N, D]."""
    with torch.no_grad():
        indices = (x.double()[:, None] - codebook.double()).square().sum(-1).argmin(-1)
    codes = codebook[indices]
    kept = slice(None) if keep is None else keep
    commitment = F.mse_loss(x[kept], codes[kept].detach())
    to_codes = F.mse_loss(codes[kept], x[kept].detach())
    return commitment_weight * commitment + codebook_weight * to_codes, codes, indices


@pytest.mark.parametrize("weights", [(0.25, 1.0), (1.0, 0.25), (0.0, 0.7), (0.3, 0.0)])
@pytest.mark.parametrize(
    "options",
    [
        {},  # fused
        {"rotation_trick": False},
        {"route_gradients_to_input": False},
        {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},  # composed
        {"threshold_ema_dead_code": 1e-9},  # codes are touched in place between forward and backward
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_both_parts(options, weights, masked):
    torch.manual_seed(0)
    commitment_weight, codebook_weight = weights
    vq = FastVQ(6, 11, commitment_weight=commitment_weight, codebook_weight=codebook_weight, **LEARNABLE, **options)
    x = torch.randn(3, 20, 6, requires_grad=True)
    mask = torch.rand(3, 20) > 0.3 if masked else None
    loss = vq(x, mask=mask)[-1]
    rows, codebook = x.detach().flatten(0, 1).requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    keep = None if mask is None else mask.flatten()
    expected, _, _ = plain_loss(rows, codebook, commitment_weight, codebook_weight, keep)
    torch.testing.assert_close(loss, expected, **CLOSE)
    loss.backward(), expected.backward()
    torch.testing.assert_close(x.grad.flatten(0, 1), rows.grad, **CLOSE)
    torch.testing.assert_close(vq._codebook.embed.grad[0], codebook.grad, **CLOSE)


def test_gradient_of_the_output_is_not_scaled():
    torch.manual_seed(0)
    vq = FastVQ(6, 11, codebook_weight=5.0, commitment_weight=0.5, route_gradients_to_input=False, **LEARNABLE)
    x, g = torch.randn(2, 9, 6, requires_grad=True), torch.randn(2, 9, 6)
    quantized, indices, _ = vq(x)
    (quantized * g).sum().backward()
    expected = torch.zeros(11, 6).index_add(0, indices.flatten(), g.flatten(0, 1))
    torch.testing.assert_close(vq._codebook.embed.grad[0], expected)


def test_none_and_equal_weights_are_what_commitment_weight_alone_does():
    x, found = torch.randn(2, 30, 8), []
    for weight in (None, 0.4):
        torch.manual_seed(0)
        vq = FastVQ(8, 10, commitment_weight=0.4, codebook_weight=weight, **LEARNABLE)
        leaf = x.clone().requires_grad_()
        loss = vq(leaf)[-1]
        loss.backward()
        found.append((leaf.grad, vq._codebook.embed.grad, loss * (2 if weight is None else 1)))
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_frozen_and_eval_have_no_codebook_part():
    vq, x = FastVQ(8, 10, commitment_weight=0.5, codebook_weight=3.0, **LEARNABLE), torch.randn(2, 30, 8)
    loss, breakdown = vq(x, freeze_codebook=True, return_loss_breakdown=True)[2:]
    torch.testing.assert_close(loss, 0.5 * breakdown.commitment)
    assert vq.eval()(x)[-1] == 0


def test_top_k():
    vq, x = FastVQ(8, 10, commitment_weight=0.5, codebook_weight=3.0, **LEARNABLE), torch.randn(2, 30, 8)
    indices, loss = vq(x, topk=3)[1:]
    error = (x.unsqueeze(-2) - vq.codebook[indices]).square().mean(-1)
    torch.testing.assert_close(loss, 3.5 * error)


@pytest.mark.parametrize("kind", [FastResidualVQ, FastGroupedResidualVQ])
def test_residual_levels(kind):
    torch.manual_seed(0)
    groups = {"groups": 2} if kind is FastGroupedResidualVQ else {}
    options = {"num_quantizers": 3, "codebook_size": 9, "commitment_weight": 0.25, "codebook_weight": 2.0}
    rvq = kind(dim=8, rotation_trick=False, **groups, **options, **LEARNABLE)
    x = torch.randn(2, 15, 8, requires_grad=True)
    losses = rvq(x)[2]
    losses.sum().backward()
    leaf = x.detach().clone().requires_grad_()
    total, codebooks = 0, []
    for part, of_part in zip(leaf.chunk(2, -1) if groups else [leaf], rvq.rvqs if groups else [rvq], strict=True):
        residual = part.reshape(-1, part.shape[-1])
        for layer in of_part.layers:
            codebook = layer.codebook.detach().clone().requires_grad_()
            loss, codes, _ = plain_loss(residual, codebook, 0.25, 2.0)
            total, residual = total + loss, residual - codes.detach()
            codebooks.append((layer._codebook.embed, codebook))
    total.backward()
    torch.testing.assert_close(losses.sum(), total, **CLOSE)
    torch.testing.assert_close(x.grad, leaf.grad, **CLOSE)
    for ours, plain in codebooks:
        torch.testing.assert_close(ours.grad[0], plain.grad, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "codebook_weight needs learnable_codebook=True"),
        ({**LEARNABLE, "codebook_weight": -1.0}, "codebook_weight must not be negative, got -1.0"),
        ({**LEARNABLE, "commitment_use_cross_entropy_loss": True}, "commitment_use_cross_entropy_loss=False"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FastVQ(8, 10, **{"codebook_weight": 1.0, **options})
