"""Under gradient checkpointing backward repeats a forward pass after the codes have moved."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ
from metarec_fast.vq.parts import recomputation

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
RVQ = {"dim": 8, "codebook_size": 16, "num_quantizers": 3}
MODULES = {
    "plain": lambda: FastVQ(8, 16, decay=0.3),
    "projected_heads": lambda: FastVQ(8, 16, decay=0.3, heads=2, codebook_dim=3, separate_codebook_per_head=True),
    "cosine": lambda: FastVQ(8, 16, decay=0.3, use_cosine_sim=True, rotation_trick=False),
    "kmeans": lambda: FastVQ(8, 16, decay=0.3, kmeans_init=True),
    "dead_codes": lambda: FastVQ(8, 40, decay=0.3, threshold_ema_dead_code=2),
    "stochastic": lambda: FastVQ(8, 16, decay=0.3, stochastic_sample_codes=True),
    "affine": lambda: FastVQ(8, 16, decay=0.3, affine_param=True),
    "bridge": lambda: FastVQ(8, 16, vq_bridge=nn.Linear(8, 8)),
    "learnable": lambda: FastVQ(8, 16, **LEARNABLE),
    "orthogonal": lambda: FastVQ(8, 16, orthogonal_reg_weight=1.0, **LEARNABLE),
    "directional": lambda: FastVQ(8, 16, directional_reparam=True, threshold_ema_dead_code=2),
    "diversity": lambda: FastVQ(8, 16, decay=0.3, codebook_diversity_loss_weight=1.0),
    "residual": lambda: FastResidualVQ(**RVQ, decay=0.3),
    "residual_kmeans_dead": lambda: FastResidualVQ(**RVQ, decay=0.3, kmeans_init=True, threshold_ema_dead_code=3),
    "residual_shared": lambda: FastResidualVQ(**RVQ, decay=0.3, shared_codebook=True, threshold_ema_dead_code=3),
    "residual_dropout": lambda: FastResidualVQ(**RVQ, decay=0.3, quantize_dropout=True),
    "residual_beams": lambda: FastResidualVQ(**RVQ, decay=0.3, beam_size=2),
    "residual_by_level": lambda: FastResidualVQ(**RVQ, decay=0.3, quant_grad_frac=0.5),
    "groups": lambda: FastGroupedResidualVQ(**RVQ, groups=2, decay=0.3, quantize_dropout=True),
}


class Model(nn.Module):
    """An encoder, a quantizer, and what draws random numbers after it."""

    def __init__(self, vq):
        super().__init__()
        self.encoder, self.vq = nn.Linear(8, 8), vq

    def forward(self, x):
        quantized, _, loss = self.vq(self.encoder(x).tanh())[:3]
        return (F.dropout(quantized, 0.3).sin() * torch.arange(8.0)).sum() + loss.sum()


def in_a_checkpoint(model, x, **options):
    return checkpoint(model, x, use_reentrant=False, **options)


def trained(model, call, steps):
    """Two forward passes before each backward, in the order they were made."""
    torch.manual_seed(1)
    gradients = []
    for _ in range(steps):
        xs = [torch.randn(2, 32, 8, requires_grad=True) for _ in range(2)]
        losses = [call(model, x) for x in xs]
        for loss in losses:
            loss.backward()
        gradients.append([x.grad for x in xs] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    return gradients, dict(model.state_dict()), [m.counts for m in model.modules() if hasattr(m, "counts")]


@pytest.mark.filterwarnings("ignore:k-means")
@pytest.mark.parametrize("name", MODULES)
def test_gradients_and_codes_are_those_without_a_checkpoint(name):
    torch.manual_seed(0)
    model = Model(MODULES[name]())
    plain = trained(copy.deepcopy(model), Model.forward, steps=2)
    again = trained(copy.deepcopy(model), in_a_checkpoint, steps=2)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def test_one_region_with_two_calls_and_two_backward_passes():
    def run(vq, x):
        first, _, loss = vq(x)
        second, _, other = vq(first * 1.5)
        return (second * torch.arange(8.0)).sum() + loss + other

    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        vq, x = FastVQ(8, 16, decay=0.3), torch.randn(2, 32, 8, requires_grad=True)
        out = checkpoint(run, vq, x, use_reentrant=False) if checkpointed else run(vq, x)
        vq(torch.randn(2, 32, 8))
        out.backward(retain_graph=True)
        out.backward()
        results.append((x.grad, dict(vq.state_dict())))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_draws_are_repeated_though_generators_are_not_brought_back():
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        vq = FastVQ(8, 16, decay=0.3, stochastic_sample_codes=True, sample_codebook_temp=5.0)
        x = torch.randn(2, 32, 8, requires_grad=True)

        def run(x, vq=vq):
            quantized, _, loss = vq(x)
            return (quantized.sin() * torch.arange(8.0)).sum() + loss

        out = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if checkpointed else run(x)
        before = torch.get_rng_state()
        out.backward()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(x.grad)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_what_is_kept_goes_with_the_graph():
    vq, x = FastVQ(8, 16), torch.randn(2, 32, 8, requires_grad=True)
    out = checkpoint(lambda x: vq(x)[0].sum(), x, use_reentrant=False)
    kept = [weakref.ref(frame) for frame in recomputation._frames.values()]
    assert len(kept) >= 1
    out.backward()
    del out
    gc.collect()
    assert not any(frame() for frame in kept)


NOT_REPEATABLE = {
    "reentrant": lambda vq, x: checkpoint(lambda x: vq(x)[0], x, use_reentrant=True),
    "nested": lambda vq, x: checkpoint(
        lambda x: checkpoint(lambda x: vq(x)[0].sin(), x, use_reentrant=False).sin(), x, use_reentrant=False
    ),
    "compiled": lambda vq, x: checkpoint(
        torch.compile(lambda x: vq(x)[0].sin(), backend="aot_eager"), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("name", NOT_REPEATABLE)
@pytest.mark.parametrize("residual", [False, True])
def test_what_cannot_be_repeated_with_the_first_codes_says_what_to_do(name, residual):
    torch._dynamo.reset()
    vq = FastResidualVQ(**RVQ) if residual else FastVQ(8, 16)
    x = torch.randn(2, 32, 8, requires_grad=True)
    out = NOT_REPEATABLE[name](vq, x)
    with pytest.raises(RuntimeError, match=r"codebook has moved since the forward pass .* use_reentrant=False"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["reentrant", "nested"])
@pytest.mark.parametrize("options", [{"freeze_codebook": True}, LEARNABLE])
def test_codes_that_no_call_moves_can_always_be_repeated(name, options):
    vq, x = FastVQ(8, 16, **options), torch.randn(2, 32, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(vq(x)[0].square().sum(), x)
    out = NOT_REPEATABLE[name](vq, x) if name == "reentrant" else None
    if name == "nested":
        inner = lambda x: checkpoint(lambda x: vq(x)[0].square(), x, use_reentrant=False)  # noqa: E731
        checkpoint(inner, x, use_reentrant=False).sum().backward()
    else:
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("name", "then"),
    [
        ("plain", "another_call"),
        ("plain", "a_call_of_the_region"),
        ("plain", "known_indices"),
        ("residual", "another_call"),
        ("groups", "a_call_of_the_region"),
    ],
)
def test_a_frozen_call_is_repeated_with_its_codes_though_others_have_moved_them(name, then):
    vq, x = MODULES[name](), torch.randn(2, 32, 8, requires_grad=True)

    def region(vq, x):
        quantized, indices = vq(x, freeze_codebook=True)[:2]
        if then == "a_call_of_the_region":
            quantized = quantized + vq(x.flip(0))[0]
        elif then == "known_indices":
            vq.update_indices(3 * x.detach(), indices)
        return quantized

    gradients = []
    for call in (in_a_checkpoint, lambda model, *args: model(*args)):
        module = copy.deepcopy(vq)
        torch.manual_seed(3)
        out = call(lambda x, module=module: region(module, x), x)
        if then == "another_call":
            module(3 * x.detach())
        gradients += torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(*gradients)


def test_an_optimizer_within_the_call_cannot_be_in_a_checkpoint():
    vq = FastVQ(8, 16, in_place_codebook_optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **LEARNABLE)
    with pytest.raises(RuntimeError, match="in_place_codebook_optimizer runs a backward pass of its own"):
        checkpoint(lambda x: vq(x)[0], torch.randn(2, 32, 8, requires_grad=True), use_reentrant=False)


@pytest.mark.parametrize("residual", [False, True])
def test_a_checkpoint_that_is_compiled_needs_codes_that_stay(residual):
    torch._dynamo.reset()
    vq, x = FastResidualVQ(**RVQ) if residual else FastVQ(8, 16), torch.randn(2, 32, 8, requires_grad=True)
    compiled = torch.compile(lambda x: checkpoint(lambda x: vq(x)[0], x, use_reentrant=False), backend="aot_eager")
    with pytest.raises(RuntimeError, match="codebook has moved since the forward pass that a compiled backward would"):
        compiled(x)
    vq.eval()
    torch.testing.assert_close(compiled(x), vq(x)[0])
