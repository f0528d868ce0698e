"""FastVQ beside vector_quantize_pytorch.VectorQuantize: the same numbers through training, step by step."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import FastVQ
from metarec_fast.vq.parts.sampling import draw_rows

VectorQuantize = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
# float32 sums in another order, compounded over the steps; the codebook moves by O(0.1) a step
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def pair(**options):
    """Both modules from the same seed: the initial weights are drawn in the same order.

    FastVQ as strict as it gets: in 50 steps codes fall out of use, and by default those stay where they are.
    """
    options = {"dim": 16, "codebook_size": 20, **options}
    modules = []
    for cls, extra in ((VectorQuantize, {}), (FastVQ, {"strict_upstream": True})):
        torch.manual_seed(0)
        modules.append(cls(**copy.deepcopy(options), **extra))
    use_our_draws(modules[0]._codebook)
    keep_old_codes(modules[0]._codebook)
    return modules


def use_our_draws(codebook):
    """Let the peer draw rows for dead codes and for k-means as FastVQ does, given the same seed."""

    def replace(rows, batch_mask, seq_mask=None):
        rows = codebook.transform_input(rows)
        valid = torch.ones(rows.shape[:2], dtype=torch.bool) if seq_mask is None else seq_mask
        drawn, replaced = draw_rows(rows, valid, batch_mask)
        codebook.embed.data[replaced] = drawn[replaced]
        codebook.cluster_size.data[replaced] = codebook.reset_cluster_size
        codebook.embed_avg.data[replaced] = drawn[replaced] * codebook.reset_cluster_size

    def sample(rows, number):
        valid = torch.ones(rows.shape[:2], dtype=torch.bool)
        return draw_rows(rows, valid, torch.ones(rows.shape[0], number, dtype=torch.bool))[0]

    codebook.replace, codebook.sample_fn = replace, sample


def keep_old_codes(codebook):
    """Let the peer's averages write a new tensor: it writes over codes that the gradient of distances still needs."""
    update_ema = codebook.update_ema

    def update():
        if not isinstance(codebook.embed, nn.Parameter):
            codebook.embed = codebook.embed.clone()
        update_ema()

    codebook.update_ema = update


def draw(fast, shape, transform=None):
    """Rows without near ties: the peer rounds distances and may take the second nearest there."""
    for _ in range(50):
        x = torch.randn(shape)
        if transform is not None or not fast._codebook.initted:
            return x
        with torch.no_grad():
            rows = fast._rows(fast._layout.tokens(x))
            codes = copy.deepcopy(fast._codebook).codes_for(rows, None)
            if nearest_codeword(rows, codes, metric=fast._codebook.metric).margin.min() > 1e-4:
                return x
    raise AssertionError("no batch without near ties")


def step(module, x, call, x_grad, seed):
    """One step of training by gradient descent, and what it computed."""
    x = x.clone().requires_grad_(x_grad)
    torch.manual_seed(seed)
    quantized, *indices, loss = module(x, **call)
    total = (quantized * torch.randn(quantized.shape)).sum() + loss.sum()
    if total.requires_grad:
        total.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.01 * p.grad
                p.grad = None
    return {"quantized": quantized, "loss": loss, "grad_x": x.grad, **grads}, indices


def per_token(codes):
    """A codebook_transform_fn: codes that differ from token to token of a batch of 4 x 9."""
    scale = torch.rand(1, 4, 9, 1, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    return codes[:, None, None] * scale


MASK = torch.rand(4, 9, generator=torch.Generator().manual_seed(1)) > 0.3
TARGETS = torch.randint(-1, 20, (4, 9), generator=torch.Generator().manual_seed(3))


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
    "learnable": LEARNABLE,
    "learnable_frozen": {"freeze_codebook": True, **LEARNABLE},
    "learnable_x_constant": {"x_grad": False, **LEARNABLE},
    "projection_x_constant": {"codebook_dim": 8, "x_grad": False},
    "frozen": {"freeze_codebook": True},
    "manual_ema": {"manual_ema_update": True},
    "orthogonal": {"orthogonal_reg_weight": 0.5},
    "orthogonal_cosine": {"orthogonal_reg_weight": 1000.0, "use_cosine_sim": True},
    "orthogonal_in_place_optimizer": {"orthogonal_reg_weight": 0.5, "in_place_codebook_optimizer": SGD},
    "orthogonal_heads": {"orthogonal_reg_weight": 0.5, "heads": 2, "separate_codebook_per_head": True},
    "orthogonal_active": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
    "mask": {"call": {"mask": MASK}},
    "lens": {"call": {"lens": torch.tensor([9, 1, 0, 5])}},
    "mask_cosine": {"use_cosine_sim": True, "call": {"mask": MASK}},
    "mask_keeps_input": {"return_zeros_for_masked_padding": False, "call": {"mask": MASK}},
    "mask_channel_first": {"channel_last": False, "shape": (4, 16, 9), "call": {"mask": MASK}},
    "dead_codes": {"threshold_ema_dead_code": 1.0},
    "dead_codes_cosine_heads": {
        "threshold_ema_dead_code": 0.9,
        "use_cosine_sim": True,
        "heads": 2,
        "separate_codebook_per_head": True,
    },
    "dead_codes_mask": {"threshold_ema_dead_code": 1.0, "call": {"mask": MASK}},
    "dead_codes_learnable": {"threshold_ema_dead_code": 1.0, **LEARNABLE},
    "kmeans": {"kmeans_init": True},
    "kmeans_cosine": {"kmeans_init": True, "use_cosine_sim": True, "kmeans_iters": 3},
    "kmeans_mask": {"kmeans_init": True, "call": {"mask": MASK}},
    "kmeans_separate_heads": {"kmeans_init": True, "heads": 2, "separate_codebook_per_head": True},
    "channel_first": {"channel_last": False, "shape": (4, 16, 9)},
    "image": {"accept_image_fmap": True, "shape": (2, 16, 4, 5)},
    "image_heads": {"accept_image_fmap": True, "shape": (2, 16, 4, 5), "heads": 2, "codebook_dim": 8},
    "volume": {"accept_3d_fmap": True, "shape": (2, 16, 2, 3, 4)},
    "single_token": {"shape": (30, 16)},
    "single_token_heads": {"shape": (30, 16), "heads": 2, "separate_codebook_per_head": True},
    "width_one": {"dim": 1, "codebook_size": 7, "shape": (4, 9, 1)},
    # -- torch extras
    "stochastic": {"stochastic_sample_codes": True},
    "stochastic_temperature": {"stochastic_sample_codes": True, "call": {"sample_codebook_temp": 0.3}},
    "stochastic_cold": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.0},
    "stochastic_cosine": {"stochastic_sample_codes": True, "use_cosine_sim": True, "sample_codebook_temp": 0.5},
    # a single token: with more the peer draws the heads' noise in another order
    "stochastic_heads": {"stochastic_sample_codes": True, "heads": 2, "shape": (30, 16)},
    "stochastic_separate_heads": {
        "stochastic_sample_codes": True,
        "heads": 2,
        "separate_codebook_per_head": True,
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
    },
    "gumbel_straight_through": {
        "stochastic_sample_codes": True,
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
        "sample_codebook_temp": 0.7,
    },
    "gumbel_straight_through_to_the_projection": {
        "straight_through": True,
        "rotation_trick": False,
        "codebook_dim": 8,
        "x_grad": False,
    },
    "topk": {"call": {"topk": 3}},
    "topk_all_cosine": {"use_cosine_sim": True, "call": {"topk": 50}},
    "topk_learnable_projection": {"codebook_dim": 8, "call": {"topk": 2}, **LEARNABLE},
    "topk_mask": {"call": {"topk": 3, "mask": MASK}},
    "topk_stochastic": {"stochastic_sample_codes": True, "call": {"topk": 3}},
    "topk_image": {"accept_image_fmap": True, "shape": (2, 16, 4, 5), "call": {"topk": 2}},
    "topk_volume": {"accept_3d_fmap": True, "shape": (2, 16, 2, 3, 4), "call": {"topk": 2}},
    "topk_channel_first": {"channel_last": False, "shape": (4, 16, 9), "call": {"topk": 2}},
    "topk_single_token": {"shape": (30, 16), "call": {"topk": 2}},
    "topk_no_commitment": {"commitment_weight": 0.0, "call": {"topk": 2}},
    "topk_orthogonal_active": {
        "orthogonal_reg_weight": 0.5,
        "orthogonal_reg_active_codes_only": True,
        "call": {"topk": 2},
    },
    "to_indices": {"call": {"indices": TARGETS}},
    "to_indices_learnable": {"call": {"indices": TARGETS}, **LEARNABLE},
    "to_indices_cosine_projection": {"use_cosine_sim": True, "codebook_dim": 8, "call": {"indices": TARGETS}},
    "to_indices_heads": {"heads": 2, "call": {"indices": torch.stack((TARGETS, TARGETS.flip(0)), -1)}},
    "to_indices_separate_heads": {
        "heads": 2,
        "separate_codebook_per_head": True,
        "call": {"indices": torch.stack((TARGETS, TARGETS.flip(0)), -1)},
    },
    "to_indices_channel_first": {"channel_last": False, "shape": (4, 16, 9), "call": {"indices": TARGETS}},
    "cross_entropy_commitment": {"commitment_use_cross_entropy_loss": True},
    "cross_entropy_commitment_learnable": {"commitment_use_cross_entropy_loss": True, **LEARNABLE},
    "cross_entropy_commitment_mask_cosine": {
        "commitment_use_cross_entropy_loss": True,
        "use_cosine_sim": True,
        "call": {"mask": MASK},
    },
    "cross_entropy_commitment_heads": {"commitment_use_cross_entropy_loss": True, "heads": 2},
    "cross_entropy_commitment_mask_heads": {
        "commitment_use_cross_entropy_loss": True,
        "heads": 2,
        "separate_codebook_per_head": True,
        "call": {"mask": MASK},
    },
    "diversity": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0},
    "diversity_heads": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 3.0, "heads": 2},
    "diversity_separate_heads_cosine": {
        "codebook_diversity_loss_weight": 0.5,
        "use_cosine_sim": True,
        "codebook_diversity_temperature": 3.0,
        "heads": 2,
        "separate_codebook_per_head": True,
    },
    "diversity_image": {
        "codebook_diversity_loss_weight": 0.5,
        "codebook_diversity_temperature": 3.0,
        "accept_image_fmap": True,
        "shape": (2, 16, 4, 5),
    },
    "diversity_single_token_learnable": {
        "codebook_diversity_loss_weight": 0.5,
        "codebook_diversity_temperature": 3.0,
        "shape": (30, 16),
        **LEARNABLE,
    },
    # -- rare options
    "affine": {"affine_param": True},
    "affine_decays_mask": {
        "affine_param": True,
        "affine_param_batch_decay": 0.7,
        "affine_param_codebook_decay": 0.5,
        "call": {"mask": MASK},
    },
    "affine_separate_heads": {"affine_param": True, "heads": 2, "separate_codebook_per_head": True},
    "affine_learnable_dead_codes": {"affine_param": True, "threshold_ema_dead_code": 0.8, **LEARNABLE},
    "affine_kmeans": {"affine_param": True, "kmeans_init": True},
    "in_place_optimizer": {"in_place_codebook_optimizer": SGD, **LEARNABLE},
    "in_place_optimizer_manual": {
        "in_place_codebook_optimizer": SGD,
        "manual_in_place_optimizer_update": True,
        **LEARNABLE,
    },
    "in_place_optimizer_mask_heads": {
        "in_place_codebook_optimizer": SGD,
        "heads": 2,
        "return_zeros_for_masked_padding": False,
        "commitment_use_cross_entropy_loss": True,
        "call": {"mask": MASK},
        **LEARNABLE,
    },
    "in_place_optimizer_dead_codes": {
        "in_place_codebook_optimizer": SGD,
        "threshold_ema_dead_code": 0.8,
        "commitment_weight": 0.0,
        **LEARNABLE,
    },
    "in_place_optimizer_affine": {"in_place_codebook_optimizer": SGD, "affine_param": True, **LEARNABLE},
    "in_place_optimizer_frozen": {"in_place_codebook_optimizer": SGD, "freeze_codebook": True, **LEARNABLE},
    "bridge": {"vq_bridge": nn.Linear(16, 16)},
    "bridge_mask_straight_through": {
        "vq_bridge": nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)),
        "rotation_trick": False,
        "call": {"mask": MASK},
    },
    "bridge_in_place_optimizer": {"vq_bridge": nn.Linear(16, 16), "in_place_codebook_optimizer": SGD},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1.0},
    "directional_variance_x_constant": {
        "directional_reparam": True,
        "directional_reparam_variance": 0.1,
        "threshold_ema_dead_code": 0.5,
        "x_grad": False,
    },
    "directional_separate_heads": {
        "directional_reparam": True,
        "threshold_ema_dead_code": 1.0,
        "heads": 2,
        "separate_codebook_per_head": True,
    },
    "sync_update": {"sync_update_v": 0.3, **LEARNABLE},
    "sync_update_straight_through_x_constant": {
        "sync_update_v": 1.0,
        "rotation_trick": False,
        "x_grad": False,
        **LEARNABLE,
    },
    "transform": {"call": {"codebook_transform_fn": per_token}},
    "transform_cosine": {"use_cosine_sim": True, "call": {"codebook_transform_fn": per_token}},
    "transform_learnable_mask": {"call": {"codebook_transform_fn": per_token, "mask": MASK}, **LEARNABLE},
    "transform_to_indices": {"call": {"codebook_transform_fn": per_token, "indices": TARGETS}},
    "transform_topk": {"call": {"codebook_transform_fn": per_token, "topk": 3}},
    "transform_stochastic_diversity": {
        "stochastic_sample_codes": True,
        "codebook_diversity_loss_weight": 0.5,
        "codebook_diversity_temperature": 3.0,
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
        "call": {"codebook_transform_fn": per_token},
    },
}


# of each way by which codes or averages move, the one with most parts: differences that grow slowly show here
LONG = (
    "heads_projection",
    "learnable",
    "mask_cosine",
    "dead_codes_cosine_heads",
    "kmeans_separate_heads",
    "stochastic_separate_heads",
    "affine_learnable_dead_codes",
    "in_place_optimizer_dead_codes",
    "directional_separate_heads",
)


@pytest.mark.parametrize("name", CASES)
def test_same_training_steps(name, parity_steps):
    options = dict(CASES[name])
    shape, x_grad, call = options.pop("shape", (4, 9, 16)), options.pop("x_grad", True), options.pop("call", {})
    transform = call.get("codebook_transform_fn")
    peer, fast = pair(**options)
    fast.load_state_dict(peer.state_dict())
    for seed in range(parity_steps):
        torch.manual_seed(1000 + seed)
        x = draw(fast, shape, transform)
        expected, expected_indices = step(peer, x, call, x_grad, seed)
        actual, indices = step(fast, x, call, x_grad, seed)
        torch.testing.assert_close(indices, expected_indices, rtol=0, atol=0)
        torch.testing.assert_close(actual, expected, **CLOSE)
        torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)
        if options.get("manual_in_place_optimizer_update"):
            step(peer, x, call, x_grad, seed), step(fast, x, call, x_grad, seed)
            peer.update_in_place_optimizer(), fast.update_in_place_optimizer()
    peer.eval(), fast.eval()
    expected, actual = peer(x, **call), fast(x, **call)
    if len(actual) == 3:
        assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close((actual[0], actual[-1]), (expected[0], expected[-1]), **CLOSE)


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
        {"affine_param": True},
        {"affine_param": True, "learnable_codebook": True, "ema_update": False},
        {"vq_bridge": nn.Linear(16, 16)},
        {"in_place_codebook_optimizer": SGD, "orthogonal_reg_weight": 1.0},
        {"directional_reparam": True, "threshold_ema_dead_code": 1.0},
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
        assert parameters[0] == [p for p in parameters[1] if p[2] != inspect.Parameter.KEYWORD_ONLY]


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
    "beam_search": {"beam_size": 3},
    "implicit_codebook": {"implicit_neural_codebook": True, "mlp_kwargs": {"dim_hidden": 8, "depth": 1}},
    "stochastic": {"stochastic_sample_codes": True, "sample_codebook_temp": 0.1, "shared_codebook": True},
    "in_place_optimizer": {"in_place_codebook_optimizer": SGD, **LEARNABLE},
    "affine_dead_codes": {"affine_param": True, "threshold_ema_dead_code": 0.5},
    "groups": {"groups": 2, "threshold_ema_dead_code": 0.5},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_inside_residual_vq(name, monkeypatch):
    from vector_quantize_pytorch import residual_vq

    options = {"dim": 16, "num_quantizers": 3, "codebook_size": 20, **copy.deepcopy(RESIDUAL[name])}
    call = {} if "groups" in options else {"rand_quantize_dropout_fixed_seed": 0}
    built = []
    for cls in (VectorQuantize, FastVQ):
        monkeypatch.setattr(residual_vq, "VectorQuantize", cls)
        torch.manual_seed(0)
        built.append((residual_vq.GroupedResidualVQ if "groups" in options else residual_vq.ResidualVQ)(**options))
    peer, fast = built
    assert {type(m).__name__ for m in fast.modules()} & {"FastVQ", "VectorQuantize"} == {"FastVQ"}
    for module in peer.modules():
        if isinstance(module, VectorQuantize):
            use_our_draws(module._codebook)
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(2, 12, 16)
        inputs = [x.clone().requires_grad_() for _ in built]
        results = []
        for module, leaf in zip(built, inputs, strict=True):
            torch.manual_seed(seed)
            results.append(module(leaf, **dict.fromkeys(call, seed)))
        expected, actual = results
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


def test_inside_random_projection_and_hierarchical_quantizers(monkeypatch):
    from vector_quantize_pytorch import hierarchical_vq, random_projection_quantizer

    for module, cls, options, shape in (
        (
            random_projection_quantizer,
            "RandomProjectionQuantizer",
            {"dim": 16, "codebook_size": 20, "codebook_dim": 8, "num_codebooks": 2},
            (3, 9, 16),
        ),
        (
            hierarchical_vq,
            "HierarchicalVQ",
            # two rows at the first scale: k-means would leave clusters empty, which upstream sets to the origin
            {"dim": 16, "codebook_size": 20, "scales": (1, 2, 4), "accept_image_fmap": True, "kmeans_init": False},
            (2, 16, 4, 4),
        ),
    ):
        results = []
        for inner in (VectorQuantize, FastVQ):
            monkeypatch.setattr(module, "VectorQuantize", inner)
            torch.manual_seed(0)
            quantizer = getattr(module, cls)(**options)
            assert any(isinstance(m, inner) for m in quantizer.modules())
            for m in quantizer.modules():
                if isinstance(m, VectorQuantize):
                    use_our_draws(m._codebook)
            torch.manual_seed(1)
            results.append(quantizer(torch.randn(shape)))
        torch.testing.assert_close(results[1], results[0], **CLOSE)
