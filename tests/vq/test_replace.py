import copy

import pytest
import torch

from metarec_fast.vq import FastResidualVQ, FastVQ, replace_vector_quantize

peers = pytest.importorskip("vector_quantize_pytorch")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

OPTIONS = {
    "defaults": {},
    "common": {
        "codebook_dim": 4,
        "heads": 3,
        "separate_codebook_per_head": True,
        "decay": 0.9,
        "eps": 1e-3,
        "use_cosine_sim": True,
        "layernorm_after_project_in": True,
        "threshold_ema_dead_code": 2,
        "commitment_weight": 0.5,
        "rotation_trick": False,
        "freeze_codebook": True,
        "kmeans_init": True,
        "kmeans_iters": 4,
        "return_zeros_for_masked_padding": False,
        "route_gradients_to_input": False,
    },
    "image": {"accept_image_fmap": True},
    "volume": {"accept_3d_fmap": True},
    "channels_second": {"channel_last": False},
    "losses": {
        "commitment_use_cross_entropy_loss": True,
        "orthogonal_reg_weight": 0.1,
        "orthogonal_reg_active_codes_only": True,
        "orthogonal_reg_max_codes": 7,
        "codebook_diversity_loss_weight": 0.2,
        "codebook_diversity_temperature": 50.0,
    },
    "sampling": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.5},
    "straight_through": {"straight_through": True, "rotation_trick": False, "manual_ema_update": True},
    "directional": {
        "directional_reparam": True,
        "directional_reparam_variance": 0.1,
        "threshold_ema_dead_code": 1,
    },
    "learnable": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.3},
    "bridge": {"vq_bridge": torch.nn.Linear(8, 8)},
    "affine": {"affine_param": True, "affine_param_batch_decay": 0.8, "affine_param_codebook_decay": 0.7},
}


def settings(vq):
    """All plain attributes of the module and its codebook."""
    plain = (bool, int, float, str, type(None))
    found = {}
    for module in (vq, vq._codebook):
        kind = "codebook." if module is vq._codebook else ""
        found |= {kind + name: value for name, value in vars(module).items() if isinstance(value, plain)}
    return found | {"ema_update": vq.ema_update, "layout": vq._layout, "project_in": repr(vq.project_in)}


@pytest.mark.parametrize("name", OPTIONS)
def test_settings_are_read_off_the_layer(name):
    options = {"dim": 8, "codebook_size": 10, **OPTIONS[name]}
    peer = peers.VectorQuantize(**options)
    fast = replace_vector_quantize(copy.deepcopy(peer))
    assert isinstance(fast, FastVQ) and isinstance(fast, peers.VectorQuantize)
    expected = settings(FastVQ(**options))
    assert {name: value for name, value in settings(fast).items() if name in expected} == expected
    assert [(k, v.shape) for k, v in fast.state_dict().items()] == [(k, v.shape) for k, v in peer.state_dict().items()]
    torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), rtol=0, atol=0)


def test_parameters_stay_themselves_so_that_an_optimizer_goes_on():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        peers.VectorQuantize(8, 10, codebook_dim=4, learnable_codebook=True, ema_update=False),
    )
    before = list(model.parameters())
    optimizer = torch.optim.Adam(before, lr=0.01)
    state = torch.get_rng_state()
    assert replace_vector_quantize(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert {id(p) for p in model.parameters()} == {id(p) for p in before} and isinstance(model[1], FastVQ)
    codes = model[1].codebook.detach().clone()
    quantized, _, loss = model(torch.randn(2, 9, 8))
    (quantized.square().mean() + loss).backward()
    optimizer.step()
    assert not torch.equal(model[1].codebook, codes)


def test_optimizer_inside_goes_on():
    options = {"learnable_codebook": True, "ema_update": False}
    peer = peers.VectorQuantize(8, 10, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **options)
    fast, x = replace_vector_quantize(copy.deepcopy(peer), strict_upstream=True), torch.randn(2, 9, 8)
    for module in (peer, fast):
        module(x)
    torch.testing.assert_close(fast.codebook, peer.codebook, **CLOSE)


def test_mode_dtype_overrides_and_shared_modules():
    shared = peers.VectorQuantize(8, 10)
    model = torch.nn.ModuleDict({"a": shared, "b": torch.nn.ModuleList([shared])}).eval().bfloat16()
    replace_vector_quantize(model, decay=0.5, sync_codebook=False)
    assert model["a"] is model["b"][0] and not model["a"].training
    assert (model["a"]._codebook.decay, model["a"]._codebook.sync) == (0.5, False)
    assert model["a"].codebook.dtype == torch.float32  # averages of 8 bits stop moving
    assert model["a"](torch.randn(1, 3, 8, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert model["a"].get_codes_from_indices(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


def test_codebooks_shared_by_layers_stay_shared():
    model = peers.ResidualVQ(dim=8, num_quantizers=3, codebook_size=10, shared_codebook=True, kmeans_init=True)
    replace_vector_quantize(model)
    assert isinstance(model, FastResidualVQ) and all(isinstance(layer, FastVQ) for layer in model.layers)
    assert len({id(layer._codebook) for layer in model.layers}) == 1
    model(torch.randn(2, 9, 8))
    assert model.layers[2]._codebook.initted


def test_nothing_to_replace():
    for model in (torch.nn.Linear(2, 2), FastVQ(8, 10), peers.LFQ(dim=4)):
        with pytest.raises(ValueError, match=f"model holds no .*VectorQuantize, got {type(model).__name__}"):
            replace_vector_quantize(model)


def test_random_projection():
    peer = peers.RandomProjectionQuantizer(dim=16, num_codebooks=3, codebook_dim=4, codebook_size=20)
    fast, x = replace_vector_quantize(copy.deepcopy(peer)), torch.randn(2, 50, 16)
    indices = peer(x)
    assert torch.equal(fast(x), indices)
    torch.testing.assert_close(fast(x, indices=indices), peer(x, indices=indices), **CLOSE)


def test_a_sequential_that_tells_quantizers_by_class_goes_on():
    model, x = peers.Sequential(torch.nn.Linear(8, 8), peers.VectorQuantize(8, 10)).eval(), torch.randn(2, 5, 8)
    expected = model(x)
    torch.testing.assert_close(replace_vector_quantize(model)(x), expected, **CLOSE)


COMPOSITES = {
    "hierarchical": lambda **options: peers.HierarchicalVQ(
        dim=8, codebook_size=6, scales=(4, 8, 16), kmeans_init=False, threshold_ema_dead_code=0, **options
    ),
    "grouped": lambda **options: peers.GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=6, **options),
}


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}])
@pytest.mark.parametrize("name", COMPOSITES)
def test_training_steps_of_composites(name, options):
    torch.manual_seed(0)
    peer = COMPOSITES[name](**options)
    fast = replace_vector_quantize(copy.deepcopy(peer), strict_upstream=True)
    assert not any(type(m) is peers.VectorQuantize for m in fast.modules())
    shape = (4, 8, 16) if name == "hierarchical" else (4, 16, 8)
    for seed in range(50):
        x, g, results = torch.randn(shape), torch.randn(shape), []
        for module in (peer, fast):
            torch.manual_seed(seed)
            leaf = x.clone().requires_grad_()
            quantized, indices, loss = module(leaf)[:3]
            ((quantized * g).sum() + loss.sum()).backward()
            results.append((indices, (quantized, loss, leaf.grad), dict(module.state_dict())))
        same = all(torch.equal(a, b) for a, b in zip(*(r[0] for r in results), strict=True))
        assert same, f"step {seed}: the peer took the second nearest of a near tie"
        scale = max(1.0, results[0][1][2].abs().max().item())
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(results[1][2], results[0][2], **CLOSE)
