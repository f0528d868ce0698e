"""The meta step: inner adaptation to each source, the target's verdict, similarity, weights, one gradient.

It is written against a loss function ``loss(shared, private, batch) -> scalar`` and knows nothing of the model.
Not in MetaRec's abstract, hence ours and optional: smoothing of the gradients before their cosine, and the source's own
loss. The rescaling follows MetaAdapt (Yue et al., ACL 2023) with the sign that rewards helpful sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metarec_fast.config import MetaConfig
from metarec_fast.data.batch import PackedBatch

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Parameters, PackedBatch], Tensor]


@dataclass(frozen=True)
class Source:
    """A source domain in one step: its private parameters and a batch for each inner step (or one for all)."""

    name: str
    private: Parameters
    batches: Sequence[PackedBatch]


@dataclass
class GradientAverages:
    """Exponential averages of each source's step and of the target's answer to it: single batches are mostly noise."""

    decay: float
    steps: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, step: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        for averages, new in ((self.steps, step), (self.answers, answer)):
            averages[name] = torch.lerp(new, averages[name], self.decay) if name in averages else new.clone()
        return self.steps[name], self.answers[name]


@dataclass(frozen=True)
class OuterStep:
    """Everything one meta step found out.

    shared_grad, target_grad, source_grads: what the optimizer applies.
    similarities, weights: [S], in the order of the sources.
    source_losses: [S] before adaptation; target_losses: [S] after adaptation to each source.
    """

    shared_grad: Parameters
    target_grad: Parameters
    source_grads: dict[str, Parameters]
    similarities: Tensor
    weights: Tensor
    source_losses: Tensor
    target_losses: Tensor


def flatten(parameters: Parameters) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def unflatten(flat: Tensor, like: Parameters) -> Parameters:
    pieces = flat.split([p.numel() for p in like.values()])
    return {name: piece.view_as(p) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def inner_adapt(
    loss: Loss, shared: Parameters, source: Source, *, config: MetaConfig
) -> tuple[Parameters, Tensor, Parameters, Tensor]:
    """``inner_steps`` of SGD on a source, from ``shared``.

    Returns the adapted parameters phi, the step theta - phi as a flat vector, the gradient of the first loss with
    respect to the source's private parameters, and that loss.
    """
    adapted, names, private_names = shared, list(shared), list(source.private)
    step = torch.zeros_like(flatten(shared).detach())
    private_grad: Parameters = {}
    first_loss: Tensor | None = None
    for k in range(config.inner_steps):
        value = loss(adapted, source.private, source.batches[0 if config.same_batch else k])
        wanted = list(adapted.values()) + (list(source.private.values()) if k == 0 else [])
        # the private gradient rides on the first backward pass: the source's own loss trains its table
        grads = torch.autograd.grad(value, wanted, create_graph=config.order == 2, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
        if k == 0:
            first_loss = value.detach()
            private_grad = {n: g.detach() for n, g in zip(private_names, grads[len(names) :], strict=True)}
        moves = {n: config.inner_lr * g for n, g in zip(names, grads, strict=False)}
        adapted = {n: adapted[n] - moves[n] for n in names}
        # summed from the moves: the difference of nearly equal parameters would keep few of its digits
        step += flatten(moves).detach()
        if config.order == 1:
            adapted = {n: p.detach().requires_grad_() for n, p in adapted.items()}
    assert first_loss is not None
    return adapted, step.detach(), private_grad, first_loss


def similarity(step: Tensor, answer: Tensor, *, like: Parameters, config: MetaConfig) -> Tensor:
    """Cosine between a source's step (theta - phi, a descent direction) and the target's gradient.

    Positive: following the source also descends the target's loss.
    """
    if config.similarity_scope == "tensor_mean":
        pairs = zip(unflatten(step, like).values(), unflatten(answer, like).values(), strict=True)
        cosine = torch.stack([torch.cosine_similarity(s.flatten(), a.flatten(), dim=0) for s, a in pairs]).mean()
    else:
        cosine = torch.cosine_similarity(step, answer, dim=0)
    return cosine if config.similarity_sign == "descent" else -cosine


def source_weights(similarities: Tensor, *, config: MetaConfig) -> Tensor:
    """Weights that sum to 1: softmax of similarity / temperature, or uniform."""
    if config.weighting == "uniform":
        return torch.full_like(similarities, 1 / len(similarities))
    return torch.softmax(similarities / config.temperature, 0)


def outer_step(
    loss: Loss,
    shared: Parameters,
    sources: Sequence[Source],
    target_private: Parameters,
    target_batch: PackedBatch,
    *,
    config: MetaConfig,
    averages: GradientAverages | None = None,
) -> OuterStep:
    """One step of learning to transfer.

    For each source s: phi_s is theta after ``inner_steps`` of SGD on the source; m_s is the gradient of the target's
    loss at phi_s, with respect to phi_s (order 1) or theta (order 2). With Delta_s = theta - phi_s, the similarity is
    cos(Delta_s, m_s), smoothed over steps if ``averages`` are given, and the shared gradient is

        sum_s w_s (target_loss_weight * m_s + source_loss_weight * Delta_s / (inner_steps * inner_lr)).

    The target's table gets the weighted sum of its gradients, each source's table its own loss's gradient.
    Raises ValueError without sources, or if a source lacks a batch for each inner step.
    """
    if not sources:
        raise ValueError("outer_step needs at least one source, got none")
    needed = 1 if config.same_batch else config.inner_steps
    for source in sources:
        if len(source.batches) < needed:
            raise ValueError(
                f"source {source.name!r} needs {needed} batches for {config.inner_steps} inner steps, "
                f"got {len(source.batches)}"
            )
    theta = {n: p.detach().requires_grad_() for n, p in shared.items()}
    target_private = {n: p.detach().requires_grad_() for n, p in target_private.items()}
    steps, answers, target_grads, similarities, source_losses, target_losses = [], [], [], [], [], []
    source_grads: dict[str, Parameters] = {}
    for source in sources:
        private = {n: p.detach().requires_grad_() for n, p in source.private.items()}
        adapted, step, source_grads[source.name], source_loss = inner_adapt(
            loss, theta, Source(source.name, private, source.batches), config=config
        )
        target_loss = loss(adapted, target_private, target_batch)
        wanted = list((theta if config.order == 2 else adapted).values()) + list(target_private.values())
        grads = torch.autograd.grad(target_loss, wanted, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
        answer = flatten(dict(zip(theta, grads, strict=False)))
        steps.append(step)
        answers.append(answer)
        target_grads.append(grads[len(theta) :])
        compared = averages.update(source.name, step, answer) if averages is not None else (step, answer)
        similarities.append(similarity(*compared, like=theta, config=config))
        source_losses.append(source_loss)
        target_losses.append(target_loss.detach())
    weights = source_weights(torch.stack(similarities), config=config)
    own = config.source_loss_weight / (config.inner_steps * config.inner_lr) if config.inner_lr else 0.0
    flat = sum(w * (config.target_loss_weight * m + own * d) for w, m, d in zip(weights, answers, steps, strict=True))
    combined = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*target_grads, strict=True)]
    return OuterStep(
        shared_grad=unflatten(flat, theta),
        target_grad=dict(zip(target_private, combined, strict=True)),
        source_grads=source_grads,
        similarities=torch.stack(similarities),
        weights=weights,
        source_losses=torch.stack(source_losses),
        target_losses=torch.stack(target_losses),
    )
