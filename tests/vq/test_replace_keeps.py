"""What replacing quantizers does not change: requires_grad, modes, hooks, identity, classes, shared parts."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from torch import nn

from metarec_fast.vq import FastGroupedResidualVQ, FastResidualVQ, FastVQ, replace_vector_quantize

peers = pytest.importorskip("vector_quantize_pytorch")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LEARNABLE = {"learnable_codebook": True, "ema_update": False}
KINDS = {
    "layer": lambda: peers.VectorQuantize(8, 10, codebook_dim=4, **LEARNABLE),
    "residual": lambda: peers.ResidualVQ(dim=8, num_quantizers=3, codebook_size=10, codebook_dim=4, **LEARNABLE),
    "grouped": lambda: peers.GroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=10, **LEARNABLE),
    "implicit": lambda: peers.ResidualVQ(
        dim=8, num_quantizers=3, codebook_size=10, implicit_neural_codebook=True, mlp_kwargs={"depth": 2}
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def parts(module):
    """Name, identity, shape and requires_grad of each parameter, and the names of the state."""
    return [(n, id(p), p.shape, p.requires_grad) for n, p in module.named_parameters()], list(module.state_dict())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["all", "none", "every other"])
def test_parameters_stay_the_same_objects_and_as_frozen_as_they_were(kind, frozen):
    model = nn.Sequential(nn.Linear(8, 8), KINDS[kind]())
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "none" or (frozen == "every other" and number % 2 == 0))
    before = parts(model)
    replace_vector_quantize(model)
    assert parts(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_each_stays_the_same_object_and_an_instance_of_both_classes(kind):
    peer = KINDS[kind]()
    cls, held, buffers = type(peer), [peer, *peer.modules()], dict(peer.named_buffers())
    quantize = lambda x: peer(x)  # noqa: E731
    expected, x = peer.eval()(torch.ones(2, 5, 8)), torch.ones(2, 5, 8)
    assert replace_vector_quantize(peer) is peer and held[1] is peer
    fast = {"layer": FastVQ, "grouped": FastGroupedResidualVQ}.get(kind, FastResidualVQ)
    assert isinstance(peer, fast) and isinstance(peer, cls)
    layers = [m for m in held if isinstance(m, peers.VectorQuantize)]
    assert layers and all(isinstance(layer, FastVQ) for layer in layers)
    torch.testing.assert_close(quantize(x)[:2], expected[:2], **CLOSE)
    now = dict(peer.named_buffers())
    state = [name for name in peer.state_dict() if name in buffers and not name.endswith("initted")]
    assert all(now[name] is buffers[name] for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_copies_are_of_the_same_classes_and_go_on_alone(kind):
    fast, x = replace_vector_quantize(KINDS[kind]()), torch.randn(2, 5, 8)
    for twin in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert type(twin) is type(fast) and repr(twin) == repr(fast)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in fast.parameters()}
        torch.testing.assert_close(twin.eval()(x), fast.eval()(x), rtol=0, atol=0)


def test_a_pickle_loads_without_the_replaced_class(monkeypatch):
    fast, x = replace_vector_quantize(peers.VectorQuantize(8, 10)).eval(), torch.randn(2, 5, 8)
    pickled = pickle.dumps(fast)
    module = __import__(peers.VectorQuantize.__module__, fromlist=["VectorQuantize"])
    monkeypatch.delattr(module, "VectorQuantize")
    alone = pickle.loads(pickled)
    assert type(alone) is FastVQ
    torch.testing.assert_close(alone(x), fast(x), rtol=0, atol=0)


def test_the_class_of_a_replaced_module_builds_new_ones():
    fast = replace_vector_quantize(peers.VectorQuantize(8, 10))
    assert type(fast)(dim=4, codebook_size=6)(torch.randn(1, 3, 4))[0].shape == (1, 3, 4)


def test_training_mode_stays_part_by_part():
    model = peers.ResidualVQ(dim=8, num_quantizers=2, codebook_size=10, codebook_dim=4).train()
    model.layers[1].eval()
    model.project_in.eval()
    before = {name: m.training for name, m in model.named_modules()}
    replace_vector_quantize(model)
    assert {name: model.get_submodule(name).training for name in before} == before


def test_hooks_go_on_and_their_handles_remove_them():
    peer, seen = peers.VectorQuantize(8, 10, codebook_dim=4), []
    handles = [
        peer.register_forward_hook(lambda *_: seen.append("forward")),
        peer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        peer.project_in.register_forward_hook(lambda *_: seen.append("project_in")),
        peer.register_state_dict_post_hook(lambda *_: seen.append("state_dict")),
    ]
    replace_vector_quantize(peer)
    peer(torch.randn(1, 3, 8)), peer.state_dict()
    assert seen == ["pre", "project_in", "forward", "state_dict"]
    for handle in handles:
        handle.remove()
    peer(torch.randn(1, 3, 8)), peer.state_dict()
    assert len(seen) == 4


def test_tied_quantizers_codebooks_and_foreign_attributes_stay():
    shared = peers.VectorQuantize(8, 10)
    other = peers.VectorQuantize(8, 10)
    other._codebook = shared._codebook
    shared.note, other.extra = "mine", nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": other})
    model.cache = {"plain": [shared]}
    replace_vector_quantize(model)
    assert model["a"] is model["b"] is model.cache["plain"][0] is shared and isinstance(shared, FastVQ)
    assert model["c"]._codebook is model["a"]._codebook
    assert shared.note == "mine" and "c.extra.weight" in model.state_dict()


def test_projections_stay_the_modules_they_are():
    peer = peers.VectorQuantize(8, 10, codebook_dim=4)
    nn.utils.parametrizations.weight_norm(peer.project_in)
    projection, keys = peer.project_in, list(peer.state_dict())
    replace_vector_quantize(peer)
    assert peer.project_in is projection and list(peer.state_dict()) == keys
    peer(torch.randn(1, 3, 8))[0].sum().backward()


def test_half_precision_parameters_stay_the_same_objects():
    peer = peers.VectorQuantize(8, 10, **LEARNABLE).bfloat16()
    codes = peer._codebook.embed
    codes.grad = torch.ones_like(codes)
    replace_vector_quantize(peer)
    assert peer._codebook.embed is codes and codes.dtype == codes.grad.dtype == torch.float32
    assert peer(torch.randn(1, 3, 8, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_public_members_of_the_replaced_classes_are_there():
    for kind, build in KINDS.items():
        peer = build()
        names = [name for name in dir(peer) if not name.startswith("_")]
        fast = replace_vector_quantize(peer)
        assert [name for name in names if not hasattr(fast, name)] == [], kind
    assert not FastResidualVQ(dim=4, num_quantizers=2, codebook_size=3, **LEARNABLE).vq_is_ema_updating


def test_compiles_whole():
    fast, x = replace_vector_quantize(peers.ResidualVQ(dim=8, num_quantizers=2, codebook_size=10)), torch.randn(2, 5, 8)
    expected = copy.deepcopy(fast)(x)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, **CLOSE)


def test_bound_methods_that_are_held_are_reported():
    model = nn.Sequential(peers.VectorQuantize(8, 10))
    model.decode = model[0].get_codes_from_indices
    with pytest.warns(UserWarning, match=r"'decode' of the model itself holds the old get_codes_from_indices of '0'"):
        replace_vector_quantize(model)


class Adds(peers.VectorQuantize):
    def perplexity(self, x):
        return self(x)[1].unique().numel()


class Overrides(peers.VectorQuantize):
    def forward(self, x):
        return super().forward(x)[0]


def test_derived_classes_that_add_are_replaced():
    fast = replace_vector_quantize(Adds(8, 10))
    assert isinstance(fast, Adds) and isinstance(fast, FastVQ) and fast.perplexity(torch.randn(1, 9, 8)) > 0


def test_derived_classes_that_override_are_named():
    model, x = nn.ModuleDict({"a": Overrides(8, 10), "b": peers.VectorQuantize(8, 10)}).eval(), torch.randn(2, 3, 8)
    with pytest.warns(UserWarning, match=r"'a' \(Overrides\) stays as it is: Overrides overrides forward"):
        replace_vector_quantize(model)
    assert type(model["a"]) is Overrides and isinstance(model["b"], FastVQ) and model["a"](x).shape == x.shape
    with pytest.raises(ValueError, match="Overrides overrides forward"):
        replace_vector_quantize(Overrides(8, 10))


def test_replacing_again_finds_nothing():
    fast = replace_vector_quantize(peers.ResidualVQ(dim=8, num_quantizers=2, codebook_size=10))
    with pytest.raises(ValueError, match="model holds no"):
        replace_vector_quantize(fast)


def test_nothing_changes_if_an_argument_is_wrong():
    peer = peers.VectorQuantize(8, 10)
    with pytest.raises(TypeError, match="no_such_option"):
        replace_vector_quantize(peer, no_such_option=1)
    assert type(peer) is peers.VectorQuantize


def test_an_optimizer_and_its_steps_go_on():
    torch.manual_seed(0)
    peer = KINDS["residual"]()
    fast = copy.deepcopy(peer)
    steps = [(m, torch.optim.Adam(m.parameters(), lr=0.01)) for m in (peer, fast)]
    replace_vector_quantize(fast, strict_upstream=True)
    for _ in range(3):
        x = torch.randn(2, 6, 8)
        for module, optimizer in steps:
            out = module(x)
            (out[0].square().mean() + out[2].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(fast.state_dict()), dict(peer.state_dict()), **CLOSE)


def test_functools_partial_of_the_module_goes_on():
    peer, x = peers.VectorQuantize(8, 10), torch.randn(1, 4, 8)
    call = functools.partial(peer, freeze_codebook=True)
    replace_vector_quantize(peer)
    torch.testing.assert_close(call(x), peer(x, freeze_codebook=True))
