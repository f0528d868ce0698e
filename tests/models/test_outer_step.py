"""The outer step of the recommender against plain nested differentiation, and the ways to run it against each other."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from bench.peers import padded_meta_step
from metarec_fast.models import recommender
from tests.examples import representative
from tests.models.problems import META, SMALL, World, as_expected, assert_same


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only cost time at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_nested_differentiation(encoder, order, steps):
    model = dataclasses.replace(SMALL, encoder=encoder)
    config = dataclasses.replace(META, order=order, inner_steps=steps)
    double, single = World(model), World(model, torch.float32)
    for count in range(1, 6) if steps == 1 else (2, 5):
        names = "abcde"[:count]
        expected = double.expected(config, names)
        assert_same(double.step(config, names), expected, tolerance=1e-10)
        assert_same(single.step(config, names), expected, tolerance=1e-5)


@pytest.mark.parametrize("valid_only", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_packed_equals_padded(order, valid_only):
    world, config = World(), dataclasses.replace(META, order=order)
    padded = {n: padded_meta_step.pad_left(b.items, b.targets, b.offsets, 8) for n, (b, *_) in world.batches.items()}
    shared, table, sources, weights = padded_meta_step.outer_step(
        {k: v.requires_grad_() for k, v in world.shared.items()},
        [({k: v.requires_grad_() for k, v in world.private[n].items()}, padded[n]) for n in "abc"],
        {k: v.requires_grad_() for k, v in world.private["t"].items()},
        padded["t"],
        layers=SMALL.layers,
        beta=SMALL.commitment_weight,
        inner_lr=config.inner_lr,
        temperature=config.temperature,
        source_loss_weight=config.source_loss_weight,
        order=order,
        valid_only=valid_only,
    )
    got = world.step(config, "abc")
    expected = as_expected(got) | {"shared_grad": shared, "target_grad": table, "source_grads": sources}
    assert_same(got, expected | {"weights": weights}, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("encoder", ["lru", "sasrec"])
@pytest.mark.parametrize("order", [1, 2])
def test_vmap_equals_loop(encoder, order, dtype):
    world = World(dataclasses.replace(SMALL, encoder=encoder), dtype)
    config = dataclasses.replace(META, order=order)
    loop = world.step(config)
    vmapped = world.step(dataclasses.replace(config, target_pass="vmap"))
    assert_same(vmapped, as_expected(loop), tolerance=1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("encoder", representative(["lru", "sasrec"], ["lru"]))
def test_compiled_equals_eager(encoder):
    config = dataclasses.replace(META, inner_steps=2)
    torch._dynamo.reset()
    counters.clear()
    world = World(dataclasses.replace(SMALL, encoder=encoder), torch.float32)
    eager = world.step(config)
    world.model.compile_encoder(backend="aot_eager", fullgraph=True)
    assert_same(world.step(config), as_expected(eager), tolerance=1e-5)
    # once for every length
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"]
    assert len({len(b.items) for batches in world.batches.values() for b in batches}) > 3


def test_second_order_of_a_compiled_encoder_is_an_error_that_names_order_1():
    world = World(dtype=torch.float32)
    world.model.compile_encoder(backend="aot_eager")
    with pytest.raises(RuntimeError, match="order=1"):
        world.step(dataclasses.replace(META, order=2))


@pytest.mark.parametrize("vq_gradient", ["straight_through", "rotation"])
def test_unique_items_once_equals_every_position(vq_gradient):
    found = []
    for once in ("never", "always"):
        config = dataclasses.replace(SMALL, unique_items=once, vq_gradient=vq_gradient)
        world = World(config)
        batch = world.batches["a"][0]
        batch.items[::3] = batch.items[0]
        found.append(world.step(dataclasses.replace(META, order=2)))
    assert len(batch.items.unique()) < len(batch.items)
    assert_same(found[1], as_expected(found[0]), tolerance=1e-10)


def test_every_item_once_equals_every_position_without_a_look(monkeypatch):
    found = []
    without = lambda *args, compact, run=recommender._unique_items: run(*args, compact=False)  # noqa: E731  (as on a GPU)
    monkeypatch.setattr(recommender, "_unique_items", without)
    for once in ("never", "always"):
        world = World(dataclasses.replace(SMALL, unique_items=once))
        found.append(world.step(dataclasses.replace(META, order=2)))
    assert_same(found[1], as_expected(found[0]), tolerance=1e-10)


def test_unique_items_automatically_where_a_batch_outnumbers_the_catalogue(monkeypatch):
    world = World()
    rows = []
    quantize = world.model.shared.quantize
    monkeypatch.setattr(world.model.shared, "quantize", lambda z, *a, **k: rows.append(len(z)) or quantize(z, *a, **k))
    batch = world.batches["a"][0]
    world.model.loss(world.shared, world.private["a"], batch)
    weight = torch.randn(3, 8, dtype=torch.float64)
    few = dataclasses.replace(batch, items=batch.items % 3, targets=batch.targets % 3)
    world.model.loss(world.shared, {**world.private["a"], "weight": weight, "bias": weight[:, 0]}, few)
    assert rows == [len(batch.items), 3]
