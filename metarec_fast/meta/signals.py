"""What the gradients of a meta step tell beside the step: what similarity is noise, and what a source gives.

Neither is in MetaRec's abstract nor in MetaAdapt: both are ours, and found from what the step has at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metarec_fast.config import MetaConfig
from metarec_fast.meta.step import GradientAverages, OuterStep, Parameters, similarity

TRACE_EVERY = 10  # meta steps

StepMetrics = dict[str, Any]


@dataclass
class NoiseFloor:
    """Draws of the similarity that gradients with nothing in common reach, from a run's own gradients.

    A source's step and the target's gradient deviate from their averages so far by the noise of their batches. A draw
    is the similarity of a step's deviation and that of the gradient one step earlier, which stems from other batches:
    what agrees, agrees by chance, with the spread over parameters and the correlations that these gradients have.
    Averages of independent deviations have the covariance of one, up to a factor, which a cosine ignores: the draws are
    as large as the similarities of smoothed gradients without anything in common.

    target_gradients: the deviation [P] of the target's last gradient after each source.
    """

    target_gradients: dict[str, Tensor] = field(default_factory=dict)

    def draw(
        self,
        name: str,
        step: Tensor,
        target_gradient: Tensor,
        *,
        before: GradientAverages,
        like: Parameters,
        config: MetaConfig,
    ) -> float | None:
        """One draw for a source's step and the target's gradient after it, both [P]; None at the first two steps.

        before: the averages without this step.
        """
        if name not in before.steps:
            return None
        earlier, self.target_gradients[name] = (
            self.target_gradients.get(name),
            target_gradient - before.target_gradients[name],
        )
        if earlier is None:
            return None
        return float(similarity(step - before.steps[name], earlier, like=like, config=config))

    def copy(self) -> NoiseFloor:
        return NoiseFloor(dict(self.target_gradients))


def leaving_out(result: OuterStep, *, before: GradientAverages, config: MetaConfig) -> list[float] | None:
    """How well a meta step descends the target's loss: [1 + S], with all sources, then without each.

    The cosine between the shared gradient and the target's: to first order, the descent by a step of given length. The
    target's gradient is the average over the steps before: in the present batch's own, its noise would agree with
    itself. Without a source the others keep their weights, which then sum to 1; without the only one the step is the
    target's own gradient. None at the first step.
    """
    names = list(result.source_grads)
    if any(name not in before.target_gradients for name in names):
        return None
    target = result.weights @ torch.stack([before.target_gradients[name] for name in names])
    own = config.target_loss_weight * result.target_gradients
    parts = own + config.source_loss_weight / config.inner_steps * result.descents
    shared = [result.weights @ parts]
    for s in range(len(names)):
        others = [i for i in range(len(names)) if i != s]
        weights = result.weights[others]
        if not weights.sum():  # one source has it all
            weights = torch.ones_like(weights)
        weights = weights / weights.sum()
        shared.append(weights @ parts[others] if others else own[s])
    return torch.cosine_similarity(torch.stack(shared), target, dim=1).tolist()


def signals(result: OuterStep, noise: NoiseFloor, *, before: GradientAverages, config: MetaConfig) -> StepMetrics:
    """All that a meta step tells of its sources; ``before``: the averages without this step."""
    names, like = list(result.source_grads), result.shared_grad
    draws = {
        name: noise.draw(name, step, target_gradient, before=before, like=like, config=config)
        for name, step, target_gradient in zip(names, result.steps, result.target_gradients, strict=True)
    }
    return {
        "similarities": dict(zip(names, result.similarities.tolist(), strict=True)),
        "weights": dict(zip(names, result.weights.tolist(), strict=True)),
        "noise": draws,
        "descents": leaving_out(result, before=before, config=config),
    }


def keep_trace(step: int, metrics: StepMetrics, *, trace: list[StepMetrics], untraced: list[StepMetrics]) -> None:
    """Keep results of ``signals``: similarities and weights every TRACE_EVERY steps, noise and descents of all.

    step: how many meta steps there were. trace: gets an entry now and then. untraced: what waits for the next one.
    """
    if None not in metrics["noise"].values():
        untraced.append({"noise": list(metrics["noise"].values()), "descents": metrics["descents"]})
    if step % TRACE_EVERY or not untraced:
        return
    draws = [draw for one in untraced for draw in one["noise"]]
    descents = zip(*(one["descents"] for one in untraced), strict=True)
    descent, *without = (sum(column) / len(untraced) for column in descents)
    trace.append(
        {
            "step": step,
            "similarity": metrics["similarities"],
            "weight": metrics["weights"],
            "noise": math.sqrt(sum(draw**2 for draw in draws) / len(draws)),
            "draws": len(draws),
            "descent": descent,
            "descent_without": dict(zip(metrics["weights"], without, strict=True)),
        }
    )
    untraced.clear()
