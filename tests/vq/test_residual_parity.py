"""Residual quantizers of vector_quantize_pytorch, the same with FastVQ inside, and FastResidualVQ, step by step."""

import copy

import pytest
import torch

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import FastResidualVQ, FastVQ, replace_vector_quantize

peers = pytest.importorskip("vector_quantize_pytorch")
# float32 sums in another order, compounded over the steps; the codebooks move by O(0.1) a step
CLOSE = {"rtol": 1e-4, "atol": 3e-5}
DIM = 8

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
# what both sides are built with; "call" goes to forward
CASES = {
    "plain": {},
    "straight_through": {"rotation_trick": False},
    "no_input_gradient": {"route_gradients_to_input": False},
    "decay_weight": {"decay": 0.95, "commitment_weight": 0.25},
    "no_commitment": {"commitment_weight": 0.0},
    "cosine": {"use_cosine_sim": True},
    "cosine_straight_through": {"use_cosine_sim": True, "rotation_trick": False},
    "shared": {"shared_codebook": True},
    "shared_cosine": {"shared_codebook": True, "use_cosine_sim": True},
    "projection": {"codebook_dim": 4},
    "projection_shared_dropout": {"codebook_dim": 4, "shared_codebook": True, "quantize_dropout": True},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout_multiple": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "num_quantizers": 4},
    "mask": {"mask": True},
    "mask_keeps_input": {"mask": True, "return_zeros_for_masked_padding": False, "codebook_dim": 4},
    "mask_cosine": {"mask": True, "use_cosine_sim": True},
    "mask_shared_dropout": {"mask": True, "shared_codebook": True, "quantize_dropout": True},
    "sizes": {"codebook_size": (10, 7, 5), "num_quantizers": None},
    "one_level": {"num_quantizers": 1, "quantize_dropout": True},
    "single_vectors": {"shape": (60, DIM)},
    "frozen": {"call": {"freeze_codebook": True}},
    "gradient_share": {"quant_grad_frac": 0.5},
    "gradient_whole": {"quant_grad_frac": 1.0, "rotation_trick": False},
    "learnable": LEARNABLE,
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 2, "dim_hidden": 6}},
    "beams": {"beam_size": 3, "eval_beam_size": 2, **LEARNABLE},
    "beams_weights_mask": {
        "beam_size": 2,
        "beam_score_quantizer_weights": [1.0, 0.5, 0.25],
        "mask": True,
        "ema_update": False,
    },
    "beams_dropout": {"beam_size": 2, "quantize_dropout": True, **LEARNABLE},
}
LONG = ("plain", "projection_shared_dropout", "mask_cosine", "beams_dropout")


def build(cls, options):
    torch.manual_seed(0)
    return cls(**{"dim": DIM, "num_quantizers": 3, "codebook_size": 10, **options})


def counterpart(kind, peer, options):
    if kind == "replaced":
        return replace_vector_quantize(copy.deepcopy(peer), strict_upstream=True)
    fast = build(FastResidualVQ, {**options, "strict_upstream": True})
    fast.load_state_dict(peer.state_dict())
    return fast


@torch.no_grad()
def ill_conditioned(module, x, mask):
    """Whether at some level a vector is nearly as near to another code, or far shorter than its code, or opposite.

    There the peer, which rounds distances, may take the other code, and the rotation to the code blows roundings up.
    """
    residual = module.project_in(x).reshape(1, -1, module.codebook_dim)
    for layer in module.layers:
        rows, embed = layer._codebook.transform_input(residual), layer._codebook.embed
        indices, margin = nearest_codeword(rows, embed)
        codes = embed[0][indices]
        bad = (margin < 1e-4) | (torch.cosine_similarity(rows, codes, dim=-1) < -0.9)
        bad |= residual.norm(dim=-1) < 0.1 * codes.norm(dim=-1)
        if (bad[0] if mask is None else bad[0] & mask.flatten()).any():
            return True
        residual = residual - codes
    return False


def draw(module, shape, mask):
    for _ in range(500):
        x = torch.randn(shape)
        if not ill_conditioned(module, x, mask):
            return x
    raise AssertionError("no batch that is well conditioned")


def assert_steps_close(actual, expected):
    """Sums over rows cancel: an error counts against the largest element of its tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1 if value is None or not value.numel() else max(1, value.abs().max().item())
        torch.testing.assert_close(
            actual[name], value, rtol=CLOSE["rtol"], atol=CLOSE["atol"] * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def train_step(module, x, g, **call):
    x = x.clone().requires_grad_()
    quantized, indices, losses = module(x, **call)[:3]
    total = (quantized * g).sum() + (losses * torch.linspace(1, 2, losses.numel()).view(losses.shape)).sum()
    total.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.001 * p.grad  # longer steps drive the projections apart: the loss is linear in the output
                p.grad = None
    return {"quantized": quantized, "losses": losses, "x": x.grad, **grads}, indices


@pytest.mark.parametrize("kind", ["replaced", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_same_training_steps(name, kind, parity_steps):
    options = dict(CASES[name])
    call, shape = options.pop("call", {}), options.pop("shape", (4, 15, DIM))
    mask = torch.rand(4, 15, generator=torch.Generator().manual_seed(1)) > 0.2 if options.pop("mask", False) else None
    if mask is not None:
        call = {**call, "mask": mask}
    peer = build(peers.ResidualVQ, options)
    fast = counterpart(kind, peer, options)
    assert isinstance(fast, FastResidualVQ) and all(isinstance(layer, FastVQ) for layer in fast.layers)
    # codes of later levels depend on the token there: the stored codes say nothing about ties
    nearest = not options.get("implicit_neural_codebook")
    for seed in range(parity_steps if nearest else min(parity_steps, 10)):
        x = draw(fast, shape, mask) if nearest else torch.randn(shape)
        g = torch.randn(shape)
        expected, expected_indices = train_step(peer, x, g, rand_quantize_dropout_fixed_seed=seed, **call)
        actual, indices = train_step(fast, x, g, rand_quantize_dropout_fixed_seed=seed, **call)
        assert torch.equal(indices, expected_indices)
        assert_steps_close(actual, expected)
        torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
    peer.eval(), fast.eval()
    call.pop("freeze_codebook", None)
    expected, actual = peer(x, return_all_codes=True, **call), fast(x, return_all_codes=True, **call)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual, expected, **CLOSE)
    for method in ("get_codes_from_indices", "get_output_from_indices"):
        torch.testing.assert_close(getattr(fast, method)(indices), getattr(peer, method)(indices), **CLOSE)
