"""The meta step: inner adaptation to each source, the target's verdict, similarity, weights, one gradient.

It is written against a loss function ``loss(shared, private, batch) -> scalar`` and knows nothing of the model. The
shared parameters are views of one vector throughout, so that an inner step, a similarity and the weighted sum are one
pass each. Not in MetaRec's abstract, hence ours and optional: smoothing of the gradients before their cosine, and the
source's own loss. The rescaling follows MetaAdapt (Yue et al., ACL 2023) with the sign that rewards helpful sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from metarec_fast.config import MetaConfig
from metarec_fast.sampling.batch import PackedBatch

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Parameters, PackedBatch], Tensor]
StreamContext = Callable[[int], AbstractContextManager]


@dataclass(frozen=True)
class Source:
    """A source domain in one step: its private parameters and a batch for each inner step (or one for all)."""

    name: str
    private: Parameters
    batches: Sequence[PackedBatch]


@dataclass
class GradientAverages:
    """Exponential averages of each source's step and the target's gradient after it: single batches are noisy."""

    decay: float
    steps: dict[str, Tensor] = field(default_factory=dict)
    target_gradients: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, step: Tensor, target_gradient: Tensor) -> tuple[Tensor, Tensor]:
        for averages, new in ((self.steps, step), (self.target_gradients, target_gradient)):
            averages[name] = torch.lerp(new, averages[name], self.decay) if name in averages else new.clone()
        return self.steps[name], self.target_gradients[name]

    def copy(self) -> GradientAverages:
        """What the averages are now: updates replace tensors, they change none."""
        return GradientAverages(self.decay, dict(self.steps), dict(self.target_gradients))


@dataclass(frozen=True)
class Adaptation:
    """What ``inner_steps`` of SGD on a source did.

    phi: [P] adapted parameters, at order 2 a function of theta. step: [P], theta - phi.
    descent: [P], the sum of the inner steps' gradients.
    first_loss, private_grad: the source's loss before adaptation and its gradient in the private parameters.
    """

    phi: Tensor
    step: Tensor
    descent: Tensor
    first_loss: Tensor
    private_grad: Parameters


@dataclass(frozen=True)
class OuterStep:
    """Everything one meta step found out.

    shared_grad, target_grad, source_grads: what the optimizer applies.
    similarities, weights: [S], in the order of the sources.
    source_losses: [S] before adaptation; target_losses: [S] after adaptation to each source.
    steps: [S, P] theta - phi; descents: [S, P] sums of each source's inner gradients; target_gradients: [S, P]
    at the adapted parameters. P: all shared parameters in one vector.
    """

    shared_grad: Parameters
    target_grad: Parameters
    source_grads: dict[str, Parameters]
    similarities: Tensor
    weights: Tensor
    source_losses: Tensor
    target_losses: Tensor
    steps: Tensor
    descents: Tensor
    target_gradients: Tensor


def flatten(parameters: Parameters) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parameters.values()])


def unflatten(flat: Tensor, like: Parameters) -> Parameters:
    pieces = flat.split([p.numel() for p in like.values()])
    return {name: piece.view(p.shape) for (name, p), piece in zip(like.items(), pieces, strict=True)}


def _leaves(parameters: Parameters) -> Parameters:
    return {n: p.detach().requires_grad_() for n, p in parameters.items()}


def _gradients(value: Tensor, wanted: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients of a scalar, zero where it does not depend on something."""
    grads = torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


@contextmanager
def _twice_differentiable(order: int) -> Iterator[None]:
    """Order 2 where the loss lacks second derivatives, for example a compiled one, is an error that names a way out."""
    try:
        yield
    except RuntimeError as error:
        if order == 1:
            raise
        raise RuntimeError(
            f"order=2 needs a loss that can be differentiated twice, order=1 one that can be once: {error}"
        ) from error


def inner_adapt(loss: Loss, theta: Tensor, source: Source, *, like: Parameters, config: MetaConfig) -> Adaptation:
    """``inner_steps`` of SGD on a source, from ``theta`` [P], the shared parameters ``like`` in one vector."""
    fixed = {n: p.detach() for n, p in source.private.items()}
    phi, step, descent = theta, torch.zeros_like(theta.detach()), 0
    for k in range(config.inner_steps):
        # the private gradient rides on the first backward pass: the source's own loss trains its table
        private = _leaves(fixed) if k == 0 else fixed
        value = loss(unflatten(phi, like), private, source.batches[0 if config.same_batch else k])
        wanted = [phi, *(private.values() if k == 0 else ())]
        with _twice_differentiable(config.order):
            gradient, *own = _gradients(value, wanted, create_graph=config.order == 2)
        if k == 0:
            first_loss = value.detach()
            private_grad = {n: g.detach() for n, g in zip(private, own, strict=True)}
        move = config.inner_lr * gradient
        descent = descent + gradient.detach()
        # summed from the moves: the difference of nearly equal parameters would keep few of its digits
        step += move.detach()
        phi = phi - move
        if config.order == 1:
            phi = phi.detach().requires_grad_()
    return Adaptation(phi, step, descent, first_loss, private_grad)


def similarity(step: Tensor, target_gradient: Tensor, *, like: Parameters, config: MetaConfig) -> Tensor:
    """Cosine between a source's step (theta - phi, a descent direction) and the target's gradient.

    Positive: following the source also descends the target's loss.
    """
    if config.similarity_scope == "tensor_mean":
        pairs = zip(unflatten(step, like).values(), unflatten(target_gradient, like).values(), strict=True)
        cosine = torch.stack([torch.cosine_similarity(s.flatten(), a.flatten(), dim=0) for s, a in pairs]).mean()
    else:
        cosine = torch.cosine_similarity(step, target_gradient, dim=0)
    return cosine if config.similarity_sign == "descent" else -cosine


def source_weights(similarities: Tensor, *, config: MetaConfig) -> Tensor:
    """Weights that sum to 1: softmax of similarity / temperature, or uniform."""
    if config.weighting == "uniform":
        return torch.full_like(similarities, 1 / len(similarities))
    return torch.softmax(similarities / config.temperature, 0)


def _target_gradients(
    loss: Loss, phis: list[Tensor], private: Parameters, batch: PackedBatch, like: Parameters
) -> tuple[Tensor, Tensor, Parameters]:
    """The target's losses [S] at all adapted parameters, and their gradients in these [S, P] and in the private ones.

    One vmapped pass. Raises RuntimeError that names ``target_pass`` if the loss cannot be vmapped.
    """
    run = grad_and_value(lambda phi, private: loss(unflatten(phi, like), private, batch), argnums=(0, 1))
    try:
        (target_gradients, private_grads), losses = vmap(run, in_dims=(0, None), randomness="different")(
            torch.stack(phis), {n: p.detach() for n, p in private.items()}
        )
    except RuntimeError as error:
        raise RuntimeError(f"target_pass='vmap' needs a loss that torch.func can vmap; use 'loop': {error}") from error
    return losses, target_gradients, private_grads


def outer_step(
    loss: Loss,
    shared: Parameters,
    sources: Sequence[Source],
    target_private: Parameters,
    target_batch: PackedBatch,
    *,
    config: MetaConfig,
    averages: GradientAverages | None = None,
    weights: Tensor | None = None,
    stream: StreamContext = lambda s: nullcontext(),
) -> OuterStep:
    """One step of learning to transfer.

    For each source s: phi_s is theta after ``inner_steps`` of SGD on the source; m_s is the gradient of the target's
    loss at phi_s, with respect to phi_s (order 1) or theta (order 2). With Delta_s = theta - phi_s, the
    similarity is cos(Delta_s, m_s), smoothed over steps if ``averages`` are given, and the shared gradient is

        sum_s w_s (target_loss_weight * m_s
                   + source_loss_weight * mean over inner steps of the source's gradient).

    The target's table gets the weighted sum of its gradients, each source's table its own loss's gradient.

    weights: [S] of sum 1, in place of those that the similarities give.
    stream: the context in which source s is adapted and the target's loss found, for example a CUDA stream: work of
        one source does not wait for that of another.

    Raises ValueError without sources, if a source lacks a batch for each inner step, or for weights of another shape;
    RuntimeError if ``target_pass`` is "vmap" and the loss cannot be vmapped, or at order 2 if it cannot be
    differentiated twice.
    """
    _check(sources, config, weights)
    like = {n: p.detach() for n, p in shared.items()}
    theta = flatten(like).requires_grad_()
    target = _leaves(target_private)

    def adapt(source: Source) -> Adaptation:
        return inner_adapt(loss, theta, source, like=like, config=config)

    vmapped, adaptations = config.target_pass == "vmap", []
    if vmapped:
        for s, source in enumerate(sources):
            with stream(s):
                adaptations.append(adapt(source))
        phis = [a.phi.detach() for a in adaptations]
        target_losses, gradients_at_phi, private_grads = _target_gradients(loss, phis, target, target_batch, like)
    target_grad: list[Tensor] = []
    target_gradients, descents, steps, similarities, source_losses, losses = [], [], [], [], [], []
    source_grads: dict[str, Parameters] = {}
    for s, source in enumerate(sources):
        with stream(s):
            if vmapped:
                adaptation, target_gradient, value = adaptations[s], gradients_at_phi[s], target_losses[s]
            else:
                adaptation = adapt(source)
                phi = adaptation.phi.detach().requires_grad_()
                value = loss(unflatten(phi, like), target, target_batch)
                target_gradient, *table_grads = _gradients(value, [phi, *target.values()])
            losses.append(value.detach())
            if config.order == 2:  # through the inner steps, to theta
                with _twice_differentiable(config.order):
                    (target_gradient,) = torch.autograd.grad(adaptation.phi, [theta], grad_outputs=target_gradient)
        step = adaptation.step
        compared = (
            averages.update(source.name, step, target_gradient) if averages is not None else (step, target_gradient)
        )
        similarities.append(similarity(*compared, like=like, config=config))
        if not vmapped:
            # the mean under the weights so far: softmax over more sources only scales what came before, so the
            # gradients of a large table need not be kept for each source
            so_far = source_weights(torch.stack(similarities), config=config) if weights is None else weights[: s + 1]
            share = so_far[-1] / so_far.sum().clamp_min(torch.finfo(so_far.dtype).tiny)  # the first may weigh nothing
            pairs = zip(target_grad or table_grads, table_grads, strict=True)
            target_grad = [mean.lerp_(g, share) for mean, g in pairs]
            del table_grads, value
        target_gradients.append(target_gradient)
        descents.append(adaptation.descent)
        steps.append(step)
        source_losses.append(adaptation.first_loss)
        source_grads[source.name] = adaptation.private_grad
    if weights is None:
        weights = source_weights(torch.stack(similarities), config=config)
    target_gradients_SP, descents_SP = torch.stack(target_gradients), torch.stack(descents)
    flat = config.target_loss_weight * (weights @ target_gradients_SP)
    if config.source_loss_weight:
        flat = flat + config.source_loss_weight / config.inner_steps * (weights @ descents_SP)
    if vmapped:
        target_grad = [torch.tensordot(weights, g, 1) for g in private_grads.values()]
    return OuterStep(
        shared_grad=unflatten(flat, like),
        target_grad=dict(zip(target, target_grad, strict=True)),
        source_grads=source_grads,
        similarities=torch.stack(similarities),
        weights=weights,
        source_losses=torch.stack(source_losses),
        target_losses=torch.stack(losses),
        steps=torch.stack(steps),
        descents=descents_SP,
        target_gradients=target_gradients_SP,
    )


def _check(sources: Sequence[Source], config: MetaConfig, weights: Tensor | None) -> None:
    if not sources:
        raise ValueError("outer_step needs at least one source, got none")
    needed = 1 if config.same_batch else config.inner_steps
    for source in sources:
        if len(source.batches) < needed:
            raise ValueError(
                f"source {source.name!r} needs {needed} batches for {config.inner_steps} inner steps, "
                f"got {len(source.batches)}"
            )
    if weights is not None and tuple(weights.shape) != (len(sources),):
        raise ValueError(f"weights must be [{len(sources)}], one for each source, got {tuple(weights.shape)}")
