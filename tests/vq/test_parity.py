"""FastVQ beside vector_quantize_pytorch.VectorQuantize: the same numbers through 30 steps of training."""

import inspect

import pytest
import torch

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import FastVQ

VectorQuantize = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
STEPS = 30
# float32 sums in another order, compounded over the steps; the codebook moves by O(0.1) a step
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def pair(**options):
    """Both modules from the same seed: the initial weights are drawn in the same order."""
    modules = []
    for cls in (VectorQuantize, FastVQ):
        torch.manual_seed(0)
        modules.append(cls(**{"dim": 16, "codebook_size": 20, **options}))
    return modules


def draw(fast, shape):
    """Rows without near ties: the peer rounds distances and may take the second nearest there."""
    for _ in range(50):
        x = torch.randn(shape)
        tokens = x.movedim(1, -1) if fast._layout.channels_second and x.dim() > 2 else x
        with torch.no_grad():
            if nearest_codeword(fast._rows(tokens), fast._codebook.embed).margin.min() > 1e-4:
                return x
    raise AssertionError("no batch without near ties")


def step(module, x, g, mask, x_grad):
    x = x.clone().requires_grad_(x_grad)
    quantized, indices, loss = module(x, mask=mask)
    total = (quantized * g).sum() + loss
    if total.requires_grad:
        total.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
                p.grad = None
    return {"quantized": quantized, "loss": loss, "grad_x": x.grad, **grads}, indices


CASES = {
    "euclidean": {},
    "straight_through": {"rotation_trick": False},
    "straight_through_flag": {"rotation_trick": False, "straight_through": True},
    "no_input_gradient": {"route_gradients_to_input": False},
    "decay_eps_weight": {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    "cosine": {"use_cosine_sim": True},
    "cosine_straight_through": {"use_cosine_sim": True, "rotation_trick": False},
    "projection": {"codebook_dim": 8},
    "projection_layernorm_cosine": {"codebook_dim": 8, "layernorm_after_project_in": True, "use_cosine_sim": True},
    "heads": {"heads": 2},
    "heads_projection": {"heads": 2, "codebook_dim": 8, "use_cosine_sim": True},
    "separate_heads": {"heads": 4, "codebook_dim": 8, "separate_codebook_per_head": True},
    "separate_heads_no_projection": {"heads": 2, "codebook_dim": 8, "separate_codebook_per_head": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable_frozen": {"learnable_codebook": True, "ema_update": False, "freeze_codebook": True},
    "learnable_x_constant": {"learnable_codebook": True, "ema_update": False, "x_grad": False},
    "projection_x_constant": {"codebook_dim": 8, "x_grad": False},
    "frozen": {"freeze_codebook": True},
    "manual_ema": {"manual_ema_update": True},
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "orthogonal_heads": {"orthogonal_reg_weight": 0.5, "heads": 2, "separate_codebook_per_head": True},
    "orthogonal_active": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
    "mask": {"mask": True},
    "mask_keeps_input": {"mask": True, "return_zeros_for_masked_padding": False},
    "mask_channel_first": {"mask": True, "channel_last": False, "shape": (4, 16, 9)},
    "channel_first": {"channel_last": False, "shape": (4, 16, 9)},
    "image": {"accept_image_fmap": True, "shape": (2, 16, 4, 5)},
    "image_heads": {"accept_image_fmap": True, "shape": (2, 16, 4, 5), "heads": 2, "codebook_dim": 8},
    "volume": {"accept_3d_fmap": True, "shape": (2, 16, 2, 3, 4)},
    "single_token": {"shape": (30, 16)},
    "single_token_heads": {"shape": (30, 16), "heads": 2, "separate_codebook_per_head": True},
    "width_one": {"dim": 1, "codebook_size": 7, "shape": (4, 9, 1)},
}


@pytest.mark.parametrize("name", CASES)
def test_same_training_steps(name):
    options = dict(CASES[name])
    shape, x_grad = options.pop("shape", (4, 9, 16)), options.pop("x_grad", True)
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.3 if options.pop("mask", False) else None
    peer, fast = pair(**options)
    fast.load_state_dict(peer.state_dict())
    for _ in range(STEPS):
        x, g = draw(fast, shape), torch.randn(shape)
        expected, expected_indices = step(peer, x, g, mask, x_grad)
        actual, indices = step(fast, x, g, mask, x_grad)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(actual, expected, **CLOSE)
        torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
    peer.eval(), fast.eval()
    expected, actual = peer(x, mask=mask), fast(x, mask=mask)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close((actual[0], actual[2]), (expected[0], expected[2]), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"codebook_dim": 4},
        {"codebook_dim": 4, "layernorm_after_project_in": True},
        {"orthogonal_reg_weight": 1.0},
        {"learnable_codebook": True, "ema_update": False},
        {"heads": 2, "separate_codebook_per_head": True},
        {"kmeans_init": True},
    ],
)
def test_state_dict_has_the_same_layout_and_loads_both_ways(options):
    peer, fast = pair(**options)
    theirs, ours = peer.state_dict(), fast.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    assert [k for k, _ in fast.named_parameters()] == [k for k, _ in peer.named_parameters()]
    for source, target in ((peer, fast), (fast, peer)):
        source(torch.randn(2, 30, 16))
        target.load_state_dict(source.state_dict())
        x = torch.randn(3, 5, 16)
        source.eval(), target.eval()
        torch.testing.assert_close(target(x), source(x), **CLOSE)
        source.train()


def test_same_seed_same_initial_weights():
    peer, fast = pair(codebook_dim=8, heads=3)
    torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), rtol=0, atol=0)


def test_constructor_and_forward_have_the_same_arguments_in_the_same_order():
    for theirs, ours in ((VectorQuantize.__init__, FastVQ.__init__), (VectorQuantize.forward, FastVQ.forward)):
        parameters = [
            [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in (theirs, ours)
        ]
        assert parameters[0] == [p for p in parameters[1] if p[0] != "strict_upstream"]


@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_codebook_per_head": True}, {"heads": 2}])
def test_loss_breakdown_codes_and_ema_weight(options):
    peer, fast = pair(orthogonal_reg_weight=0.5, **options)
    x, weight = draw(fast, (3, 9, 16)), torch.rand(fast._codebook.cluster_size.shape)
    expected = peer(x, return_loss_breakdown=True, ema_update_weight=weight)
    actual = fast(x, return_loss_breakdown=True, ema_update_weight=weight)
    assert actual[3]._fields == expected[3]._fields
    torch.testing.assert_close(tuple(actual[3]), tuple(expected[3]), **CLOSE)
    torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
    torch.testing.assert_close(fast.get_codes_from_indices(actual[1]), peer.get_codes_from_indices(actual[1]), **CLOSE)
    torch.testing.assert_close(fast.codebook, peer.codebook, **CLOSE)


def test_ema_weight_by_function_accumulated_statistics_and_known_indices():
    peer, fast = pair()
    for module in (peer, fast):
        torch.manual_seed(1)
        x, y, z = torch.randn(3, 2, 40, 16).unbind(0)
        module(x, accum_ema_update=True)
        module(y, ema_update_weight=lambda sums, counts: (counts > 2).float())
        module.update_ema_indices(z, torch.randint(20, (2, 40)), mask=torch.rand(2, 40) > 0.5)
        module(x, freeze_codebook=True), module(x, ema_update=False)
    torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
    assert fast._codebook.embed_avg.grad is None


RESIDUAL = {
    "plain": {},
    "shared": {"shared_codebook": True},
    "cosine_dropout": {"use_cosine_sim": True, "quantize_dropout": True},
    "projection": {"codebook_dim": 8},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_inside_residual_vq(name, monkeypatch):
    from vector_quantize_pytorch import residual_vq

    built = []
    for cls in (VectorQuantize, FastVQ):
        monkeypatch.setattr(residual_vq, "VectorQuantize", cls)
        torch.manual_seed(0)
        built.append(residual_vq.ResidualVQ(dim=16, num_quantizers=3, codebook_size=20, **RESIDUAL[name]))
    peer, fast = built
    assert all(isinstance(layer, FastVQ) for layer in fast.layers)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(2, 12, 16)
        inputs = [x.clone().requires_grad_() for _ in built]
        options = {"rand_quantize_dropout_fixed_seed": seed}
        expected, actual = peer(inputs[0], **options), fast(inputs[1], **options)
        assert torch.equal(actual[1], expected[1])
        torch.testing.assert_close((actual[0], actual[2]), (expected[0], expected[2]), **CLOSE)
        for out in (expected, actual):
            (out[0].square().sum() + out[2].sum()).backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **CLOSE)
        torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
    peer.load_state_dict(fast.state_dict())
    torch.testing.assert_close(
        fast.get_output_from_indices(actual[1]), peer.get_output_from_indices(actual[1]), **CLOSE
    )
