"""The meta step on a model small enough to differentiate by hand, against plain nested differentiation."""

from dataclasses import replace

import pytest
import torch

from metarec_fast import reference
from metarec_fast.config import MetaConfig
from metarec_fast.meta import GradientAverages, Source, outer_step, source_weights

CONFIG = MetaConfig(similarity_decay=0.0)


def loss(shared, private, batch):
    x, y = batch
    hidden = torch.tanh(private["table"][x] @ shared["matrix"] + shared["shift"])
    return (hidden * y).sum() + 0.5 * (hidden * hidden).mean() + private["table"][x].square().mean()


def world(sources, steps, dtype=torch.float64):
    def private(items):
        return {"table": torch.randn(items, 4, dtype=dtype)}

    def batch(items):
        return torch.randint(items, (6,)), torch.randn(6, 3, dtype=dtype)

    shared = {"matrix": torch.randn(4, 3, dtype=dtype), "shift": torch.randn(3, dtype=dtype)}
    named = [Source(f"s{i}", private(5 + i), [batch(5 + i) for _ in range(steps)]) for i in range(sources)]
    return shared, named, private(7), batch(7)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("sources", [1, 2, 4])
def test_equals_nested_differentiation(order, steps, sources):
    config = replace(CONFIG, order=order, inner_steps=steps)
    shared, named, target, batch = world(sources, steps)
    got = outer_step(loss, shared, named, target, batch, config=config)
    expected = reference.meta_step(
        loss,
        shared,
        [(s.private, s.batches) for s in named],
        target,
        batch,
        order=order,
        inner_steps=steps,
        inner_lr=config.inner_lr,
        temperature=config.temperature,
        source_loss_weight=config.source_loss_weight,
    )
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # noqa: E731
    close(got.shared_grad, expected["shared_grad"])
    close(got.target_grad, expected["target_grad"])
    close(list(got.source_grads.values()), expected["source_grads"])
    close(got.similarities, expected["similarities"])
    close(got.weights, expected["weights"])
    close(got.source_losses, expected["source_losses"])
    close(got.target_losses, expected["target_losses"])


def test_no_inner_step_and_no_source_loss_is_target_only():
    shared, named, target, batch = world(3, 1)
    got = outer_step(loss, shared, named, target, batch, config=replace(CONFIG, inner_lr=0.0, source_loss_weight=0.0))
    expected = torch.func.grad(loss, argnums=(0, 1))(shared, target, batch)
    torch.testing.assert_close((got.shared_grad, got.target_grad), expected)


def test_a_copy_of_the_target_scores_high_and_its_opposite_low():
    shared, _, target, (x, y) = world(0, 0)
    same = Source("same", target, [(x, y)])
    opposite = Source("opposite", target, [(x, -y)])
    config = replace(CONFIG, inner_lr=0.01)
    got = outer_step(loss, shared, [opposite, same], target, (x, y), config=config)
    assert got.similarities[1] > 0.9 > 0 > got.similarities[0]
    assert got.weights[1] > 0.99
    literal = outer_step(
        loss, shared, [opposite, same], target, (x, y), config=replace(config, similarity_sign="ascent")
    )
    torch.testing.assert_close(literal.similarities, -got.similarities)


def test_identical_sources_weigh_the_same_and_order_does_not_matter():
    shared, named, target, batch = world(3, 1)
    twin = Source("twin", named[0].private, named[0].batches)
    got = outer_step(loss, shared, [named[0], twin], target, batch, config=CONFIG)
    torch.testing.assert_close(got.weights, torch.full((2,), 0.5, dtype=torch.float64))
    forward = outer_step(loss, shared, named, target, batch, config=CONFIG)
    backward = outer_step(loss, shared, named[::-1], target, batch, config=CONFIG)
    torch.testing.assert_close(forward.weights, backward.weights.flip(0))
    torch.testing.assert_close(forward.shared_grad, backward.shared_grad)


def test_inputs_are_left_alone():
    shared, named, target, batch = world(2, 1)
    before = {k: v.clone() for k, v in shared.items()}
    outer_step(loss, shared, named, target, batch, config=CONFIG)
    torch.testing.assert_close(shared, before)
    assert all(not v.requires_grad and v.grad is None for v in shared.values())


def test_averages_smooth_both_sides():
    averages = GradientAverages(decay=0.5)
    averages.update("a", torch.tensor([1.0]), torch.tensor([2.0]))
    step, target_gradient = averages.update("a", torch.tensor([3.0]), torch.tensor([4.0]))
    assert (step.item(), target_gradient.item()) == (2.0, 3.0)


def test_tensor_mean_scope():
    shared, named, target, batch = world(1, 1)
    got = outer_step(loss, shared, named, target, batch, config=replace(CONFIG, similarity_scope="tensor_mean"))
    g = torch.func.grad(loss)
    phi = {k: shared[k] - CONFIG.inner_lr * v for k, v in g(shared, named[0].private, named[0].batches[0]).items()}
    target_gradient = g(phi, target, batch)
    cosines = [
        torch.cosine_similarity((shared[k] - phi[k]).flatten(), target_gradient[k].flatten(), dim=0) for k in shared
    ]
    torch.testing.assert_close(got.similarities[0], torch.stack(cosines).mean())


def test_uniform_weights():
    weights = source_weights(torch.tensor([0.9, -0.9]), config=replace(CONFIG, weighting="uniform"))
    assert weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("how", ["loop", "vmap"])
def test_given_weights_take_the_place_of_similarities(how):
    shared, named, target, batch = world(3, 1)
    config = replace(CONFIG, target_pass=how)
    found = outer_step(loss, shared, named, target, batch, config=config)
    same = outer_step(loss, shared, named, target, batch, config=config, weights=found.weights)
    torch.testing.assert_close(vars(same), vars(found), rtol=1e-10, atol=1e-12)
    alone = outer_step(loss, shared, named[1:2], target, batch, config=config)
    chosen = outer_step(
        loss, shared, named, target, batch, config=config, weights=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    )
    torch.testing.assert_close(chosen.shared_grad, alone.shared_grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(chosen.target_grad, alone.target_grad, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"weights must be \[3\], one for each source, got \(2,\)"):
        outer_step(loss, shared, named, target, batch, config=config, weights=torch.ones(2))


def test_bad_arguments():
    shared, named, target, batch = world(1, 1)
    with pytest.raises(ValueError, match="needs at least one source, got none"):
        outer_step(loss, shared, [], target, batch, config=CONFIG)
    with pytest.raises(ValueError, match="source 's0' needs 3 batches for 3 inner steps, got 1"):
        outer_step(loss, shared, named, target, batch, config=replace(CONFIG, inner_steps=3))


@pytest.mark.parametrize("order", [1, 2])
def test_vmapped_target_pass_equals_the_loop(order):
    shared, named, target, batch = world(3, 1)
    results = [
        outer_step(loss, shared, named, target, batch, config=replace(CONFIG, order=order, target_pass=how))
        for how in ("loop", "vmap")
    ]
    torch.testing.assert_close(vars(results[1]), vars(results[0]), rtol=1e-10, atol=1e-12)


def test_a_loss_that_cannot_be_vmapped_is_named():
    def branching(shared, private, batch):
        value = loss(shared, private, batch)
        return value if value > 0 else 2 * value

    shared, named, target, batch = world(2, 1)
    with pytest.raises(RuntimeError, match=r"target_pass='vmap' needs a loss that torch\.func can vmap; use 'loop'"):
        outer_step(branching, shared, named, target, batch, config=replace(CONFIG, target_pass="vmap"))


def test_a_loss_with_one_derivative_is_named_at_order_2():
    class Cosine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.cos()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("has one derivative")

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return grad * Cosine.apply(ctx.saved_tensors[0])

    def once(shared, private, batch):
        hidden = Sine.apply(private["table"][batch[0]] @ shared["matrix"] + shared["shift"])
        return (hidden * batch[1]).square().mean()

    shared, named, target, batch = world(2, 1)
    with pytest.raises(RuntimeError, match="order=2 needs a loss that can be differentiated twice, order=1 one"):
        outer_step(once, shared, named, target, batch, config=replace(CONFIG, order=2))
    at_order_1 = outer_step(once, shared, named, target, batch, config=CONFIG)

    def twice(shared, private, batch):
        hidden = (private["table"][batch[0]] @ shared["matrix"] + shared["shift"]).sin()
        return (hidden * batch[1]).square().mean()

    expected = outer_step(twice, shared, named, target, batch, config=CONFIG)
    torch.testing.assert_close(at_order_1.shared_grad, expected.shared_grad)


def test_target_gradient_is_the_weighted_sum():
    shared, named, target, batch = world(4, 1)
    got = outer_step(loss, shared, named, target, batch, config=replace(CONFIG, temperature=1e-3))
    alone = [outer_step(loss, shared, [s], target, batch, config=CONFIG).target_grad["table"] for s in named]
    torch.testing.assert_close(got.target_grad["table"], torch.tensordot(got.weights, torch.stack(alone), 1))


def test_without_the_targets_loss_and_similarity_it_is_reptile():
    shared, named, target, batch = world(3, 2)
    config = replace(CONFIG, inner_steps=2, weighting="uniform", source_loss_weight=1.0, target_loss_weight=0.0)
    got = outer_step(loss, shared, named, target, batch, config=config)
    for name, parameter in shared.items():
        ends = []
        for source in named:
            phi = {n: p.clone().requires_grad_() for n, p in shared.items()}
            for one in source.batches:
                grads = torch.autograd.grad(loss(phi, source.private, one), list(phi.values()))
                moved = zip(phi.items(), grads, strict=True)
                phi = {n: (p - config.inner_lr * g).detach().requires_grad_() for (n, p), g in moved}
            ends.append(phi[name])
        towards = parameter - torch.stack(ends).mean(0)  # theta moves to where the sources end, on average
        torch.testing.assert_close(got.shared_grad[name] * 2 * config.inner_lr, towards, rtol=1e-10, atol=1e-12)
