import copy
import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def build(**options):
    torch.manual_seed(0)
    return FastResidualVQ(**{"dim": 8, "num_quantizers": 3, "codebook_size": 10, **options})


def level_by_level(module, monkeypatch):
    """A copy of the module that runs through the layers' own calls."""
    other = copy.deepcopy(module)
    monkeypatch.setattr(other, "_runs_fused", lambda **_: False)
    return other


# -- arguments


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"heads": 2}, "heads must be 1, got 2; FastGroupedResidualVQ"),
        ({"num_quantizers": None}, "num_quantizers must be at least 1 for one codebook_size, got None"),
        ({"num_quantizers": 0}, "num_quantizers must be at least 1"),
        ({"codebook_size": (4, 5)}, r"codebook_size must be a number or 3 numbers, got \(4, 5\)"),
        ({"codebook_size": (4, 5, 6), "shared_codebook": True}, "shared_codebook=True needs one codebook_size"),
        ({"quantize_dropout_cutoff_index": -1}, r"quantize_dropout_cutoff_index must be in \[0, 3\), got -1"),
        ({"quantize_dropout": True, "quantize_dropout_cutoff_index": 3}, "quantize_dropout_cutoff_index must be in"),
        ({"quantize_dropout_multiple_of": 0}, "quantize_dropout_multiple_of must be at least 1, got 0"),
        ({"eval_beam_size": 2}, "eval_beam_size needs beam_size"),
        ({"beam_score_quantizer_weights": [1.0]}, "beam_score_quantizer_weights must be 3 numbers, got 1"),
        ({"decay": 2.0}, r"decay must be in \[0, 1\]"),
        ({"implicit_neural_codebook": True, "use_cosine_sim": True}, "learnable_codebook=True needs use_cosine_sim"),
    ],
)
def test_constructor_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(
    "call,message",
    [
        ({"x": torch.zeros(2, 3, 7)}, r"x must be \[B, ..., 8\], got \(2, 3, 7\)"),
        ({"mask": torch.ones(2, 3)}, r"mask must be bool \(2, 3\)"),
        ({"indices": torch.zeros(2, 3, 2, dtype=torch.int64)}, r"indices must be int64 \(2, 3, 3\), got"),
    ],
)
def test_forward_errors(call, message):
    with pytest.raises(ValueError, match=message):
        build()(**{"x": torch.zeros(2, 3, 8), **call})


def test_fewer_levels_need_dropout():
    fewer = torch.zeros(2, 3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"indices must have 3 levels last, got \(2, 3, 2\)"):
        build().get_codes_from_indices(fewer)
    codes = build(quantize_dropout=True).get_codes_from_indices(fewer)
    assert codes.shape == (3, 2, 3, 8) and codes[:2].any() and not codes[2].any()


# -- the fused loop beside the layers' own calls

FUSED = {
    "plain": {},
    "straight_through": {"rotation_trick": False},
    "no_route": {"route_gradients_to_input": False},
    "cosine_projection": {"use_cosine_sim": True, "codebook_dim": 4},
    "shared_dead_codes": {"shared_codebook": True, "threshold_ema_dead_code": 2},
    "kmeans": {"kmeans_init": True, "kmeans_iters": 3, "codebook_size": (10, 6, 3), "num_quantizers": None},
    "frozen": {"freeze_codebook": True},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_one_loop_is_the_layers_in_turn(name, masked, monkeypatch):
    fused = build(**FUSED[name])
    composed = level_by_level(fused, monkeypatch)
    mask = torch.rand(4, 20) > 0.3 if masked else None
    for seed in range(4):
        x, g, results = torch.randn(4, 20, 8), torch.randn(4, 20, 8), []
        for module in (fused, composed):
            torch.manual_seed(seed)
            leaf = x.clone().requires_grad_()
            quantized, indices, losses = module(leaf, mask=mask)
            ((quantized * g).sum() + losses.sum()).backward()
            results.append((quantized, indices, losses, leaf.grad, dict(module.state_dict())))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        # margin and recheck rate are of the rows looked up, masked ones among them, which differ
        torch.testing.assert_close(*(module.layers[-1].stats()[:3] for module in (fused, composed)))


@pytest.mark.parametrize("options", [{}, {"rotation_trick": False}, {"use_cosine_sim": True}])
def test_gradients_of_gradients_and_torch_func(options, monkeypatch):
    fused = build(freeze_codebook=True, **options)
    composed = level_by_level(fused, monkeypatch)
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def loss(module, x):
        quantized, _, losses = functional_call(module, dict(module.state_dict()), (x,))
        return (quantized.square() * weight).sum() + losses.square().sum()

    seconds = []
    for module in (fused, composed):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(module, leaf), leaf, create_graph=True)
        seconds.append(torch.autograd.grad((first * weight).sum(), leaf)[0])
        torch.testing.assert_close(grad(lambda x, m=module: loss(m, x))(x), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-3)


def test_memory_for_the_gradient_does_not_grow_by_rows_with_each_level():
    saved = {}
    for levels in (1, 8):
        module, kept = build(num_quantizers=levels), {}
        pack = lambda t, kept=kept: (kept.__setitem__(t.untyped_storage().data_ptr(), t), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(torch.randn(1, 1000, 8, requires_grad=True))
        saved[levels] = sum(t.untyped_storage().nbytes() for t in kept.values())
    indices_and_codes = 7 * (1000 * 8 + 10 * 8 * 4)
    assert saved[8] - saved[1] <= indices_and_codes


# -- forms of input


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"beam_size": 2}, {"implicit_neural_codebook": True}])
@pytest.mark.parametrize("form", ["image", "volume", "channels_second"])
def test_channels_second_is_the_same_as_last(form, options):
    flags = {
        "image": {"accept_image_fmap": True},
        "volume": {"accept_3d_fmap": True},
        "channels_second": {"channel_last": False},
    }
    spatial = {"image": (4, 5), "volume": (2, 3, 4), "channels_second": (7,)}[form]
    module, plain = build(**flags[form], **options).eval(), build(**options).eval()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 8, *spatial)
    quantized, indices, _, codes = module(x, return_all_codes=True)
    expected = plain(x.flatten(2).mT)
    assert indices.shape == (2, *spatial, 3) and codes.shape == (3, 2, *spatial, module.codebook_dim)
    assert torch.equal(indices.flatten(1, -2), expected[1])
    torch.testing.assert_close(quantized.flatten(2).mT, expected[0], **CLOSE)
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4, "shared_codebook": True}, {"rotation_trick": False}])
@pytest.mark.parametrize("shape", [(1, 0, 8), (0, 3, 8), (1, 1, 8), (5, 8), (2, 3, 4, 8)])
def test_odd_sizes(shape, options, training):
    module = build(threshold_ema_dead_code=2, **options).train(training)
    x = torch.randn(shape, requires_grad=True)
    quantized, indices, losses = module(x)
    assert quantized.shape == x.shape and indices.shape == (*shape[:-1], 3) and losses.shape == (3,)
    assert quantized.requires_grad == (training or "codebook_dim" in options)
    if quantized.requires_grad:
        (quantized.sum() + losses.sum()).backward()
    assert losses.isfinite().all() and all(v.isfinite().all() for v in module.state_dict().values())


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"quant_grad_frac": 0.5}, {"beam_size": 2}])
def test_padding_may_hold_anything(options):
    mask = torch.tensor([[True] * 6 + [False] * 3, [True] * 9])
    x, results = torch.randn(2, 9, 8), []
    for filler in (0.0, torch.nan, 1e30):
        module = build(threshold_ema_dead_code=1, **options)
        leaf = torch.where(mask.unsqueeze(-1), x, filler).requires_grad_()
        torch.manual_seed(1)
        quantized, indices, losses = module(leaf, mask=mask)
        (quantized.square().sum() + losses.sum()).backward()
        gradients = [leaf.grad, *(p.grad for p in module.parameters())]
        results.append((quantized, indices, losses, gradients, dict(module.state_dict())))
    assert not results[0][0][~mask].any() and (results[0][1][~mask] == -1).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}, {"quant_grad_frac": 0.5}])
def test_other_dtypes(dtype, options):
    module, x = build(**options).to(dtype), torch.randn(2, 9, 8, dtype=dtype, requires_grad=True)
    quantized, _, losses = module(x)
    assert quantized.dtype == dtype
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert module.layers[0]._codebook.embed.dtype == torch.float32
    (quantized.sum() + losses.sum()).backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_autocast_does_not_change_codes():
    plain, cast, x = build(codebook_dim=4), build(codebook_dim=4), torch.randn(2, 50, 8)
    expected = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = cast(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# -- what moves the codebooks


@pytest.mark.parametrize("options", [{}, {"quant_grad_frac": 0.5}, {"beam_size": 2}, {"shared_codebook": True}])
def test_freezing_by_constructor_and_by_call(options):
    for constructor, call in (({"freeze_codebook": True}, {}), ({}, {"freeze_codebook": True})):
        module = build(threshold_ema_dead_code=2, **options, **constructor)
        before = copy.deepcopy(module.state_dict())
        module(torch.randn(2, 9, 8), **call)
        torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)


def test_shared_codebook_moves_once_after_the_last_level():
    module = build(shared_codebook=True)
    codes = module.codebooks[0].clone()
    quantized, indices, _ = module(torch.randn(2, 50, 8))
    torch.testing.assert_close(quantized, codes[indices].sum(-2), **CLOSE)
    assert not torch.equal(module.codebooks[0], codes)
    assert all(layer._codebook is module.layers[0]._codebook for layer in module.layers)


def test_dead_shared_codes_are_replaced_by_inputs_of_any_level_that_are_kept():
    module = build(shared_codebook=True, codebook_size=200, threshold_ema_dead_code=1.0, decay=0.0)
    x, mask = torch.randn(1, 40, 8), torch.arange(40).unsqueeze(0) < 30
    codes = module.codebooks[0].clone()
    indices = module.eval()(x)[1]
    inputs = [x, x - codes[indices[..., 0]]]  # the third level sees codes that the first two have replaced
    module.train()(x, mask=mask)
    embed = module.codebooks[0]
    levels = [(embed[:, None] == rows[0, :30]).all(-1).any(1).sum() for rows in inputs]
    assert min(levels) > 0
    assert not any((embed[:, None] == rows[0, 30:]).all(-1).any() for rows in inputs)


def test_beams_move_the_codebooks_of_all_levels():
    """ResidualVQ 1.32 keeps only the input of the first level, and moves only its codes."""
    module, x = build(beam_size=3, decay=0.0), torch.randn(2, 40, 8)
    indices = module(x)[1]
    for level, layer in enumerate(module.layers):
        counts = torch.bincount(indices[..., level].flatten(), minlength=10)
        assert torch.equal(layer._codebook.cluster_size[0], counts.float())


def test_beams_find_what_is_at_least_as_near():
    x = torch.randn(1, 500, 8)
    greedy, wide = build().eval(), build(beam_size=8).eval()
    error, wide_error = ((module(x)[0] - x).square().sum(-1) for module in (greedy, wide))
    assert wide_error.mean() < error.mean()
    torch.testing.assert_close(wide(x, beam_size=1), greedy(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"beam_size": 2}])
def test_implicit_codebooks_are_decoded_as_encoded(options):
    module = build(implicit_neural_codebook=True, **options).eval()
    quantized, indices, _ = module(torch.randn(2, 9, 8))
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized, rtol=1e-4, atol=1e-5)


def test_cross_entropy_to_known_codes():
    """Of each level's residual, as releases before 1.32 had it; 1.32 itself fails here."""
    module, x = build(freeze_codebook=True), torch.randn(2, 9, 8, requires_grad=True)
    targets = torch.randint(10, (2, 9, 3))
    targets[0, 0, 1] = -1
    quantized, loss = module(x, indices=targets)
    residual, expected = x, 0
    for level, layer in enumerate(module.layers):
        scores = -torch.cdist(residual, layer.codebook)
        expected = expected + torch.nn.functional.cross_entropy(scores.mT, targets[..., level], ignore_index=-1)
        residual = residual - layer.codebook[scores.argmax(-1)]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantized, module(x)[0], **CLOSE)
    torch.testing.assert_close(module(x, indices=list(targets.unbind(-1)))[1], loss, **CLOSE)
    loss.backward()
    assert x.grad.abs().sum() > 0


# -- dropout


def test_dropout_follows_from_the_seed():
    module = build(num_quantizers=8, quantize_dropout=True, quantize_dropout_cutoff_index=2, freeze_codebook=True)
    x, ends = torch.randn(1, 5, 8), set()
    for seed in range(40):
        quantized, indices, losses = module(x, rand_quantize_dropout_fixed_seed=seed)
        torch.testing.assert_close(module(x, rand_quantize_dropout_fixed_seed=seed), (quantized, indices, losses))
        levels = int((indices[0, 0] >= 0).sum())
        assert (indices[..., :levels] >= 0).all() and (indices[..., levels:] == -1).all()
        assert losses[:levels].all() and not losses[levels:].any()
        torch.testing.assert_close(quantized, module.get_output_from_indices(indices), **CLOSE)
        ends.add(levels)
    assert ends == {3, 4, 5, 6, 7, 8}
    assert (module.eval()(x)[1] >= 0).all()


def test_dropout_without_seed_follows_torch_and_reaches_multiples():
    module = build(num_quantizers=7, quantize_dropout=True, quantize_dropout_multiple_of=3)
    x, runs = torch.randn(1, 5, 8), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append([int((module(x)[1][0, 0] >= 0).sum()) for _ in range(30)])
    assert runs[0] == runs[1] and set(runs[0]) == {3, 6, 7}


# -- groups


def test_groups_are_residual_quantizers_side_by_side():
    torch.manual_seed(0)
    module = FastGroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=10, quantize_dropout=True)
    alone, x = copy.deepcopy(module), torch.randn(2, 9, 8)
    mask = torch.rand(2, 9) > 0.2
    torch.manual_seed(5)
    quantized, indices, losses, codes = module(x, mask=mask, return_all_codes=True)
    seed = int(torch.manual_seed(5) and torch.randint(0, 10_000, ()))
    for group, part in enumerate(x.chunk(2, -1)):
        expected = alone.rvqs[group](part, mask=mask, rand_quantize_dropout_fixed_seed=seed)
        torch.testing.assert_close((quantized.chunk(2, -1)[group], indices[group], losses[group]), expected)
        torch.testing.assert_close(codes[group], module.rvqs[group].get_codes_from_indices(indices[group]))
    module.eval()
    quantized, indices, _ = module(x)
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized, **CLOSE)
    assert module.get_codes_from_indices(indices).shape == (2, 3, 2, 9, 4) and module.codebooks.shape == (2, 3, 10, 4)
    again, loss = module(x, indices=indices)
    torch.testing.assert_close(again, quantized)
    assert loss > 0


def test_groups_of_images_and_errors():
    module = FastGroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=10, accept_image_fmap=True).eval()
    quantized, indices, _ = module(torch.randn(2, 8, 4, 5))
    assert quantized.shape == (2, 8, 4, 5) and indices.shape == (2, 2, 4, 5, 3)
    torch.testing.assert_close(module.get_output_from_indices(indices), quantized, **CLOSE)
    with pytest.raises(ValueError, match="groups must divide dim=8, got 3"):
        FastGroupedResidualVQ(dim=8, groups=3, num_quantizers=3, codebook_size=10)
    with pytest.raises(ValueError, match="x must have 8 channels in dimension 1"):
        module(torch.randn(2, 7, 4, 5))
    with pytest.raises(ValueError, match="indices must have 2 groups first, got 1"):
        module(torch.randn(2, 8, 4, 5), indices=indices[:1])


# -- compiled


@pytest.mark.parametrize(
    "options",
    [
        {"use_cosine_sim": True, "codebook_dim": 4, "threshold_ema_dead_code": 1},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"shared_codebook": True}, marks=pytest.mark.slow),
    ],
)
def test_whole_graph_in_training_and_eval(options):
    torch._dynamo.reset()
    module = build(quantize_dropout=True, **options)
    eager = copy.deepcopy(module)
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")  # which recomputes in backward
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for training in (True, False):
        module.train(training), eager.train(training)
        frames = []
        for rows in (20, 31, 47):
            x, g, results = torch.randn(2, rows, 8), torch.randn(2, rows, 8), []
            for run in (eager, compiled):
                leaf = x.clone().requires_grad_()
                torch.manual_seed(rows)
                quantized, indices, losses = run(leaf, rand_quantize_dropout_fixed_seed=2)
                if training:
                    ((quantized * g).sum() + losses.sum()).backward()
                results.append((quantized, indices, losses, leaf.grad, dict(module.state_dict())))
            torch.testing.assert_close(results[1][:4], results[0][:4], rtol=1e-4, atol=1e-4)
            if not options.get("threshold_ema_dead_code"):  # a compiled draw takes its numbers elsewhere
                torch.testing.assert_close(dict(module.state_dict()), dict(eager.state_dict()), rtol=1e-4, atol=1e-5)
            eager.load_state_dict(module.state_dict())
            frames.append(counter.frame_count)
        assert len(set(frames)) == 1, "compiled again for another number of rows"


def test_exported():
    module = build(codebook_dim=4).eval()
    x = torch.randn(2, 9, 8)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


# -- beside vector_quantize_pytorch


def test_constructor_and_forward_have_the_arguments_of_the_peer():
    peers = pytest.importorskip("vector_quantize_pytorch")
    for theirs, ours in ((peers.ResidualVQ, FastResidualVQ), (peers.GroupedResidualVQ, FastGroupedResidualVQ)):
        for method in ("__init__", "forward"):
            parameters = [
                [(p.name, p.default, p.kind) for p in inspect.signature(getattr(cls, method)).parameters.values()]
                for cls in (theirs, ours)
            ]
            # a dict that all modules would share is not a default of ours
            expected = [
                (name, None if name == "mlp_kwargs" else default, kind) for name, default, kind in parameters[0]
            ]
            assert parameters[1] == expected


LAYOUTS = {
    "plain": {},
    "shared_projection": {"shared_codebook": True, "codebook_dim": 4},
    "sizes": {"codebook_size": (10, 5, 3)},
    "implicit": {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 2, "dim_hidden": 5}},
    "diveq": {"diveq": True},
    "kmeans": {"kmeans_init": True},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_state_dict_has_the_same_layout_and_loads_both_ways(name):
    peers = pytest.importorskip("vector_quantize_pytorch")
    fast = build(**LAYOUTS[name])
    torch.manual_seed(0)
    peer = peers.ResidualVQ(**{"dim": 8, "num_quantizers": 3, "codebook_size": 10, **LAYOUTS[name]})
    theirs, ours = peer.state_dict(), fast.state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]
    assert [k for k, _ in fast.named_parameters()] == [k for k, _ in peer.named_parameters()]
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)  # the same seed draws the same weights
    for source, target in ((peer, fast), (fast, peer)):
        source(torch.randn(2, 30, 8))
        target.load_state_dict(source.state_dict())
        x = torch.randn(2, 5, 8)
        source.eval(), target.eval()
        torch.manual_seed(1)
        expected = source(x)
        torch.manual_seed(1)
        torch.testing.assert_close(target(x), expected, rtol=1e-4, atol=1e-5)
        source.train()


def test_the_same_levels_are_dropped_from_the_same_seed():
    peers = pytest.importorskip("vector_quantize_pytorch")
    options = {"num_quantizers": 6, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1}
    fast, peer = build(**options), peers.ResidualVQ(**{"dim": 8, "codebook_size": 10, **options})
    dropped = []
    for module in (fast, peer):
        torch.manual_seed(4)
        dropped.append([int((module(torch.zeros(1, 2, 8))[1] < 0).sum()) for _ in range(20)])
    assert dropped[0] == dropped[1] and len(set(dropped[0])) > 2


def test_layers_are_fast_vq():
    assert all(type(layer) is FastVQ for layer in build().layers)


def test_opcheck_of_the_snapshot():
    torch.library.opcheck(torch.ops.metarec_fast.vq_snapshot.default, (torch.randn(2, 5, 3),))


def test_beams_of_a_module_that_was_made_without_storage():
    options = {"beam_size": 3, "beam_score_quantizer_weights": [1.0, 0.5, 0.25]}
    trained = build(**options)
    with torch.device("meta"):
        module = build(**options)
    module.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(module.eval()(x), trained.eval()(x), rtol=0, atol=0)
    assert module.beam_score_weights.tolist() == [1.0, 0.5, 0.25] and module.beam_score_weights.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"codebook_dim": 4, "beam_size": 2}, {"implicit_neural_codebook": True}, {"diveq": True}]
)
def test_made_under_another_default_dtype_or_assigned(dtype, options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = build(**options)
    finally:
        torch.set_default_dtype(before)
    assigned = build(**options)
    assigned.load_state_dict(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in assigned.state_dict().items()}, assign=True
    )
    for module in (made, assigned):
        for x in (torch.randn(2, 9, 8), torch.randn(2, 9, 8, dtype=dtype)):
            quantized, indices, losses = module(x.requires_grad_())
            (quantized.sum() + losses.sum()).backward()
            assert quantized.dtype == x.dtype and module.get_output_from_indices(indices).isfinite().all()
        assert all(layer._codebook.embed.dtype == torch.float32 for layer in module.layers)
