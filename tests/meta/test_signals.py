"""The noise floor has the size of chance, and what leaving a source out costs is what the formula says."""

import pytest
import torch

from metarec_fast.config import MetaConfig
from metarec_fast.meta import GradientAverages, NoiseFloor, OuterStep, leaving_out
from metarec_fast.meta.step import similarity

P = 600
LIKE = {"a": torch.zeros(P)}


def rms(values):
    return torch.tensor(values).square().mean().sqrt().item()


def walk(rank, mean, *, decay=0.95, steps=400):
    """Draws of the floor, and smoothed similarities of the same noise around 0, at every 20th step once it is smooth.

    Gradients vary independently within ``rank`` dimensions around ``mean``, the same for source and target.
    """
    config, generator = MetaConfig(), torch.Generator().manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(P, rank, generator=generator)).Q
    floor, averages, noise = NoiseFloor(), GradientAverages(decay), GradientAverages(decay)
    draws, smoothed = [], []
    for t in range(steps):
        step, target_gradient = (basis @ torch.randn(rank, 2, generator=generator)).T
        before = averages.copy()
        draws.append(floor.draw("s", step + mean, target_gradient + mean, before=before, like=LIKE, config=config))
        averages.update("s", step + mean, target_gradient + mean)
        compared = noise.update("s", step, target_gradient)
        if t % 20 == 0 and t >= 60:
            smoothed.append(float(similarity(*compared, like=LIKE, config=config)))
    return draws, smoothed


@pytest.mark.parametrize("rank", [20, 100, P])
@pytest.mark.parametrize("agreement", [0.0, 3.0])
def test_independent_gradients_reach_the_noise_floor_and_what_they_agree_in_does_not_raise_it(rank, agreement):
    draws, _ = walk(rank, agreement * torch.ones(P))
    assert draws[:2] == [None, None] and None not in draws[2:]
    # the cosine of independent directions in r dimensions has the variance 1 / r; 398 draws tell it to 4 % (1 sigma)
    assert rms(draws[2:]) == pytest.approx(rank**-0.5, rel=0.16)


def test_smoothed_gradients_without_anything_in_common_are_as_similar_as_the_draws():
    draws, smoothed = walk(20, torch.zeros(P), steps=4000)
    assert rms(smoothed) == pytest.approx(rms(draws[2:]), rel=0.2)  # 197 nearly independent values: 5 % (1 sigma)


def test_without_smoothing_the_noise_floor_is_that_of_single_batches():
    draws, _ = walk(100, torch.ones(P), decay=0.0)
    assert rms(draws[2:]) == pytest.approx(0.1, rel=0.16)


def made(weights, target_gradients, descents, names=("a", "b")):
    nothing = torch.zeros(len(names))
    return OuterStep(
        shared_grad={},
        target_grad={},
        source_grads={name: {} for name in names},
        similarities=torch.log(torch.tensor(weights)),
        weights=torch.tensor(weights),
        source_losses=nothing,
        target_losses=nothing,
        steps=descents,
        descents=descents,
        target_gradients=target_gradients,
    )


def before(*names, target_gradient):
    return GradientAverages(0.9, dict.fromkeys(names, target_gradient), dict.fromkeys(names, target_gradient))


def test_leaving_out_the_source_that_agrees_costs_most():
    target = torch.tensor([1.0, 0.0, 0.0])
    target_gradients = torch.zeros(2, 3)  # this batch's own target_gradient is nothing: the sources alone make the step
    descents = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    config = MetaConfig(temperature=1.0)
    result = made([0.6, 0.4], target_gradients, descents)
    everything, without_a, without_b = leaving_out(
        result, before=before("a", "b", target_gradient=target), config=config
    )
    assert everything == pytest.approx(0.6 / (0.6**2 + 0.4**2) ** 0.5)
    assert without_a == pytest.approx(0.0) and without_b == pytest.approx(1.0)


def test_the_weights_of_the_others_are_those_they_would_have_alone():
    target = torch.tensor([1.0, 1.0, 1.0])
    descents = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    target_gradients = torch.tensor([[0.0, 1.0, 0.0]]).expand(3, 3)
    config = MetaConfig(temperature=1.0, inner_steps=2, source_loss_weight=0.5, target_loss_weight=2.0)
    result = made([0.2, 0.3, 0.5], target_gradients, descents, names=("a", "b", "c"))
    found = leaving_out(result, before=before("a", "b", "c", target_gradient=target), config=config)
    for s, weights in enumerate([(0.2, 0.3, 0.5), (0, 0.375, 0.625), (2 / 7, 0, 5 / 7), (0.4, 0.6, 0)]):
        step = torch.tensor(weights) @ (2 * target_gradients + 0.25 * descents)
        assert found[s] == pytest.approx(torch.cosine_similarity(step, target, dim=0).item())


def test_without_the_source_that_has_all_weight_the_others_share_it():
    target, descents = torch.ones(3), torch.eye(3)
    result = made([1.0, 0.0, 0.0], torch.zeros(3, 3), descents, names=("a", "b", "c"))
    found = leaving_out(
        result, before=before("a", "b", "c", target_gradient=target), config=MetaConfig(temperature=0.01)
    )
    assert found == pytest.approx([3**-0.5, (2 / 3) ** 0.5, 3**-0.5, 3**-0.5])


def test_without_the_only_source_the_target_steps_alone():
    target_gradient = torch.tensor([[2.0, 1.0]])
    result = made([1.0], target_gradient, torch.tensor([[0.0, 1.0]]), names=("a",))
    config = MetaConfig(source_loss_weight=1.0)
    with_it, without = leaving_out(result, before=before("a", target_gradient=torch.tensor([1.0, 0.0])), config=config)
    assert without == pytest.approx(2 / 5**0.5) and with_it == pytest.approx(2 / 8**0.5)


def test_a_first_step_has_nothing_to_be_compared_with():
    result = made([0.5, 0.5], torch.ones(2, 3), torch.ones(2, 3))
    assert leaving_out(result, before=GradientAverages(0.9), config=MetaConfig()) is None
