"""Definition of the meta step in plain nested differentiation: nothing shared, nothing flattened, nothing reused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import grad

Parameters = dict[str, Tensor]


def meta_step(
    loss: Callable,
    shared: Parameters,
    sources: Sequence[tuple[Parameters, Sequence]],
    target_private: Parameters,
    target_batch: object,
    *,
    order: int,
    inner_steps: int,
    inner_lr: float,
    temperature: float,
    source_loss_weight: float,
) -> dict[str, object]:
    """sources: for each, its private parameters and a batch for each inner step.

    Returns shared_grad, target_grad, source_grads (a list), similarities, weights, source_losses before adaptation and
    target_losses after it.
    """

    def adapt(theta: Parameters, private: Parameters, batches: Sequence) -> Parameters:
        phi = theta
        for k in range(inner_steps):
            g = grad(loss)(phi, private, batches[k])
            phi = {name: phi[name] - inner_lr * g[name] for name in phi}
        return phi

    meta_grads, target_grads, source_grads, steps, similarities = [], [], [], [], []
    source_losses, target_losses = [], []
    for private, batches in sources:
        phi = {name: p.detach() for name, p in adapt(shared, private, batches).items()}
        if order == 2:
            gradient = grad(lambda theta, p=private, b=batches: loss(adapt(theta, p, b), target_private, target_batch))(
                shared
            )
        else:
            gradient = grad(loss)(phi, target_private, target_batch)
        step = {name: shared[name] - phi[name] for name in shared}
        product = sum((step[name] * gradient[name]).sum() for name in shared)
        lengths = [torch.sqrt(sum(v.square().sum() for v in vector.values())) for vector in (step, gradient)]
        similarities.append(product / (lengths[0] * lengths[1]))
        meta_grads.append(gradient)
        steps.append(step)
        target_grads.append(grad(loss, argnums=1)(phi, target_private, target_batch))
        source_grads.append(grad(loss, argnums=1)(shared, private, batches[0]))
        source_losses.append(loss(shared, private, batches[0]).detach())
        target_losses.append(loss(phi, target_private, target_batch).detach())
    weights = torch.softmax(torch.stack(similarities) / temperature, 0)
    own = source_loss_weight / (inner_steps * inner_lr)
    return {
        "shared_grad": {
            name: sum(w * (m[name] + own * d[name]) for w, m, d in zip(weights, meta_grads, steps, strict=True))
            for name in shared
        },
        "target_grad": {
            name: sum(w * g[name] for w, g in zip(weights, target_grads, strict=True)) for name in target_private
        },
        "source_grads": source_grads,
        "similarities": torch.stack(similarities),
        "weights": weights,
        "source_losses": torch.stack(source_losses),
        "target_losses": torch.stack(target_losses),
    }
