"""FastVQ under torch.compile, torch.export, FakeTensor and torch.func: no graph breaks, no reading of the device."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad

from metarec_fast.vq import FastResidualVQ, FastVQ
from tests.examples import representative

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
MASK = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) > 0.3
CASES = {
    "separate_heads_projection": {"codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True},
    "cosine_straight_through": {"use_cosine_sim": True, "rotation_trick": False},
    "orthogonal_mask": {
        "orthogonal_reg_weight": 1.0,
        "orthogonal_reg_active_codes_only": True,
        "call": {"mask": MASK},
    },
    "learnable": LEARNABLE,
    "ema_weight": {"call": {"ema_update_weight": torch.rand(20)}},
    "accumulation": {"call": {"accum_ema_update": True}},
    "stochastic": {"stochastic_sample_codes": True},
    "topk": {"call": {"topk": 3}},
    "to_indices": {"call": {"indices": torch.randint(20, (3, 9))}},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True, "call": {"mask": MASK}},
    "diversity": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 2.0},
    "gumbel_straight_through": {
        "straight_through": True,
        "rotation_trick": False,
        "route_gradients_to_input": False,
    },
    # no noise: before it a compiled step draws for dead codes, and an eager one on a CPU only if there are any
    "directional": {
        "directional_reparam": True,
        "directional_reparam_variance": 0.0,
        "threshold_ema_dead_code": 1e-6,
    },
    "sync_update": {"sync_update_v": 0.5, **LEARNABLE},
    "bridge": {"vq_bridge": nn.Linear(8, 8)},
    "affine": {"affine_param": True},
    "dead_codes": {"threshold_ema_dead_code": 1e-6},
    "transform": {"call": {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(-1, 3, 9, -1, -1)}},
}


@pytest.fixture(autouse=True)
def _empty_cache():
    """Compiled code belongs to FastVQ.forward, not to a module: without this the cases count as recompilations."""
    torch._dynamo.reset()


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


# a case takes a second and more to compile
COMPILED = ("separate_heads_projection", "orthogonal_mask", "learnable", "accumulation", "topk", "cross_entropy",
            "gumbel_straight_through", "directional", "bridge", "transform")  # fmt: skip


@pytest.mark.parametrize("training", representative([True, False], [True]))
@pytest.mark.parametrize("name", representative(CASES, COMPILED))
def test_compiles_whole(name, training):
    options = dict(CASES[name])
    call = options.pop("call", {})
    eager = FastVQ(8, 20, **copy.deepcopy(options)).train(training)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(3, 9, 8)
        results = []
        for run in (eager, compiled):
            torch.manual_seed(seed)
            leaf = x.clone().requires_grad_()
            quantized, *indices, loss = run(leaf, **call)
            total = quantized.sin().sum() + loss.sum()
            if total.requires_grad:
                total.backward()
            results.append((quantized, indices, loss, leaf.grad))
        torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(state(module), state(eager))
    assert module.stats() == pytest.approx(eager.stats(), nan_ok=True)
    kept = [m._codebook.embed_avg.grad for m in (module, eager)]  # of accumulation
    torch.testing.assert_close(kept[0], kept[1])


def test_dead_code_replacement_compiles_whole():
    module = FastVQ(8, 20, threshold_ema_dead_code=2.5, decay=0.0)
    x = torch.randn(3, 30, 8)
    torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    is_row = (module.codebook[:, None] == x.flatten(0, 1)).all(-1).any(-1)
    replaced = module._codebook.cluster_size[0] == 2.5  # with decay 0 the others hold whole counts
    assert replaced.any() and (module._codebook.cluster_size >= 2.5).all()
    assert torch.equal(is_row, replaced)


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True, "codebook_dim": 4, "orthogonal_reg_weight": 1.0}])
def test_kmeans_start_compiles_whole(options):
    eager = FastVQ(8, 20, kmeans_init=True, **options)
    module = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for seed in range(3):
        x = torch.randn(3, 30, 8)
        results = []
        for run in (eager, compiled):
            torch.manual_seed(seed)
            results.append(run(x))
        torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(state(module), state(eager))
    assert module._codebook.initted and counter.frame_count == 2  # the first step, and all others
    with pytest.raises(RuntimeError, match="the first batch must have a finite row that is kept, got none"):
        torch.compile(FastVQ(8, 20, kmeans_init=True), fullgraph=True, backend="aot_eager")(x * torch.nan)


# what people train, and the extras that compile; a mask is as long as its batch and would be one more input
DYNAMIC = ("separate_heads_projection", "cosine_straight_through", "learnable", "stochastic", "topk", "cross_entropy",
           "diversity", "gumbel_straight_through")  # fmt: skip


@pytest.mark.parametrize("training", representative([True, False], [True]))
@pytest.mark.parametrize("name", representative(DYNAMIC, ["separate_heads_projection", "learnable", "topk"]))
def test_another_number_of_rows_compiles_nothing_anew(name, training):
    options = dict(CASES[name])
    call = options.pop("call", {})
    module = FastVQ(8, 20, **options).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    reference = copy.deepcopy(module)
    for batch, length in ((3, 9), (4, 13), (2, 700), (7, 30)):
        x = torch.randn(batch, length, 8)
        if "mask" in call:
            call = {"mask": torch.rand(batch, length) > 0.3}
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
            if "mask" in call:
                torch._dynamo.mark_dynamic(call["mask"], dim)
        torch.manual_seed(0)
        actual = compiled(x, **call)
        torch.manual_seed(0)
        torch.testing.assert_close(actual, reference(x, **call))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [n for n in CASES if n != "transform"])
def test_no_host_sync(name, training, monkeypatch):
    """A fake tensor has no values: whoever reads one (item, bool, nonzero, a copy to the host) raises."""
    options = dict(CASES[name])
    if "threshold_ema_dead_code" in options:
        # on a CPU, where nothing waits, an eager step asks whether codes are dead; everywhere else it does as compiled
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    call = options.pop("call", {})
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        with mode:
            module = FastVQ(8, 20, **_fake_modules(options)).train(training)
            x = torch.randn(3, 9, 8, requires_grad=True)
            quantized, *_, loss = module(x, **fake)
            total = quantized.sum() + loss.sum()
            if total.requires_grad:
                total.backward()
    assert quantized.shape[:2] == x.shape[:2]


def _fake_modules(options):
    return {k: nn.Linear(8, 8) if isinstance(v, nn.Module) else v for k, v in options.items()}


def test_statistics_are_read_on_demand_only():
    with FakeTensorMode(), pytest.raises(Exception, match=r"item|local_scalar|data-dependent|tolist"):
        FastVQ(8, 20).stats()


@pytest.mark.parametrize("name", ["separate_heads_projection", "cosine_straight_through", "orthogonal_mask", "bridge"])
def test_exports_in_eval(name):
    options = dict(CASES[name])
    call = options.pop("call", {})
    vq, x = FastVQ(8, 20, **options).eval(), torch.randn(3, 9, 8)
    exported = torch.export.export(vq, (x,), call).module()
    torch.testing.assert_close(exported(x, **call), vq(x, **call))


def test_exports_with_a_dynamic_number_of_rows():
    vq, x = FastVQ(8, 20, codebook_dim=4).eval(), torch.randn(3, 9, 8)
    dynamic = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}}
    exported = torch.export.export(vq, (x,), dynamic_shapes=dynamic).module()
    for shape in ((3, 9, 8), (1, 1, 8), (5, 40, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), vq(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"manual_ema_update": True},
        {"commitment_use_cross_entropy_loss": True},
        {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 2.0},
        {"stochastic_sample_codes": True},
        {"sync_update_v": 0.5, **LEARNABLE},
    ],
)
def test_func_grad_over_parameters_moves_the_codebook_too(options):
    vq = FastVQ(8, 20, codebook_dim=4, **options)
    reference, x = copy.deepcopy(vq), torch.randn(3, 9, 8)

    def loss(parameters):
        quantized, _, commitment = functional_call(vq, parameters, (x,))
        return quantized.square().sum() + commitment

    torch.manual_seed(1)
    grads = grad(loss)(dict(vq.named_parameters()))
    torch.manual_seed(1)
    quantized, _, commitment = reference(x)
    (quantized.square().sum() + commitment).backward()
    torch.testing.assert_close(grads, {k: p.grad for k, p in reference.named_parameters()})
    torch.testing.assert_close(state(vq), state(reference))
    assert vq.stats() == pytest.approx(reference.stats(), nan_ok=True)


FROZEN = {
    "nearest": {},
    "cross_entropy": {"commitment_use_cross_entropy_loss": True},
    "diversity": {"codebook_diversity_loss_weight": 0.5, "codebook_diversity_temperature": 2.0},
}


@pytest.mark.parametrize("name", FROZEN)
def test_vmap_over_a_frozen_module(name):
    vq, x = FastVQ(8, 20, freeze_codebook=True, **FROZEN[name]), torch.randn(5, 3, 9, 8)

    def loss(x):
        quantized, _, commitment = vq(x)
        return quantized.sin().sum() + commitment

    torch.testing.assert_close(torch.vmap(grad(loss))(x), torch.stack([grad(loss)(b) for b in x]))


@pytest.mark.parametrize("name", FROZEN)
def test_double_backward(name):
    """The loss's second derivative, against finite differences of the first."""
    vq = FastVQ(4, 6, freeze_codebook=True, rotation_trick=False, **FROZEN[name]).double()
    x = (torch.randn(1, 5, 4, dtype=torch.float64) * 2).requires_grad_()

    def gradient(x):
        return torch.autograd.grad(vq(x)[2], x, create_graph=True)[0]

    direction = torch.randn_like(x)
    (actual,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    step = 1e-6 * direction
    expected = (gradient(x + step) - gradient(x - step)).detach() / 2e-6
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


def test_what_torch_cannot_transform_says_so():
    vq, x = FastVQ(8, 20), torch.randn(2, 3, 9, 8)
    with pytest.raises(RuntimeError, match=r"under torch.vmap .* freeze_codebook=True"):
        torch.vmap(lambda x: vq(x)[2])(x)
    with pytest.raises(RuntimeError, match=r"under torch.vmap .* freeze_codebook=True"):
        torch.vmap(grad(lambda x: vq(x)[2]))(x)
    drawing = FastVQ(8, 20, stochastic_sample_codes=True, freeze_codebook=True)
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(lambda x: drawing(x)[2])(x)
    in_place = FastVQ(8, 20, in_place_codebook_optimizer=torch.optim.SGD, **LEARNABLE)
    with pytest.raises(RuntimeError, match="backward"):
        grad(lambda x: in_place(x)[2])(x[0])


FORWARD_MODE = {
    "nearest": lambda: FastVQ(8, 20, codebook_dim=4),
    "cosine_straight_through": lambda: FastVQ(8, 20, use_cosine_sim=True, rotation_trick=False),
    "learnable": lambda: FastVQ(8, 20, **LEARNABLE),
    "stochastic": lambda: FastVQ(8, 20, stochastic_sample_codes=True),
    "cross_entropy": lambda: FastVQ(8, 20, commitment_use_cross_entropy_loss=True),
    "diversity": lambda: FastVQ(8, 20, codebook_diversity_loss_weight=0.5, codebook_diversity_temperature=2.0),
    "kmeans": lambda: FastVQ(8, 20, kmeans_init=True),
    "residual": lambda: FastResidualVQ(dim=8, codebook_size=20, num_quantizers=3),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_tangents_in_training_are_the_transpose_of_gradients(name):
    vq = FORWARD_MODE[name]()
    reference, x, tangent = copy.deepcopy(vq), torch.randn(3, 9, 8), torch.randn(3, 9, 8)

    def run(module):
        return lambda x: (lambda out: (out[0], out[2]))(module(x))

    torch.manual_seed(1)
    outputs, tangents = torch.func.jvp(run(vq), (x,), (tangent,))
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    expected = run(reference)(leaf)
    torch.testing.assert_close(outputs, expected)
    cotangents = [torch.randn_like(out) for out in outputs]
    (gradient,) = torch.autograd.grad(expected, leaf, cotangents)
    pushed = sum((t * c).sum() for t, c in zip(tangents, cotangents, strict=True))
    torch.testing.assert_close(pushed.float(), (gradient * tangent).sum(), rtol=1e-3, atol=1e-4)
    assert pushed.abs() > 0
    torch.testing.assert_close(state(vq), state(reference))
