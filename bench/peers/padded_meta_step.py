"""The outer step as public code writes it: left-padded windows, dense logits at every position, a loop over sources.

The mathematics is that of ``metarec_fast.meta.outer_step`` with one inner step, on the parameters of
``metarec_fast.models.Recommender`` with the LRU encoder, so that gradients can be compared. With ``valid_only`` the
logits of padding are left out: the strongest form that is still simple.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]


def pad_left(items: Tensor, targets: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed windows as [B, length] items and targets (0 and -100 where there is nothing) and a mask."""
    B = len(offsets) - 1
    x, y, valid = torch.zeros(B, length).long(), torch.full((B, length), -100), torch.zeros(B, length).bool()
    for b in range(B):
        n = int(offsets[b + 1] - offsets[b])
        x[b, length - n :], y[b, length - n :] = (
            items[offsets[b] : offsets[b + 1]],
            targets[offsets[b] : offsets[b + 1]],
        )
        valid[b, length - n :] = True
    return x, y, valid


def scan(eigenvalues: Tensor, u: Tensor, valid: Tensor) -> Tensor:
    """h_t = lambda * h_(t-1) + u_t for valid t-1, by doubling blocks; u [B, L, h] complex, L a power of two."""
    B, L, width = u.shape
    powers = eigenvalues.expand(L, width).cumprod(0)
    h, block = u, 2
    while block <= L:
        halves = h.view(B * L // block, 2, block // 2, width)
        last_valid = valid.view(B * L // block, 2, block // 2)[:, 0, -1].to(u.dtype)
        carry = halves[:, 0, -1:] * powers[: block // 2] * last_valid[:, None, None]
        h = torch.stack((halves[:, 0], halves[:, 1] + carry), 1).view(B, L, width)
        block *= 2
    return h


def encode(p: Parameters, x: Tensor, valid: Tensor, layers: int) -> Tensor:
    D = x.shape[-1]
    for i in range(layers):
        name = f"encoder.layers.{i}."
        modulus, phase = torch.exp(-torch.exp(p[name + "0.log_decay"])), torch.exp(p[name + "0.log_phase"])
        u = F.linear(x, p[name + "0.into.weight"], p[name + "0.into.bias"])
        width = u.shape[-1] // 2
        u = torch.complex(u[..., :width], u[..., width:]) * torch.exp(p[name + "0.log_gamma"])
        h = scan(torch.polar(modulus, phase), u, valid)
        y = F.linear(torch.cat((h.real, h.imag), -1), p[name + "0.out.weight"], p[name + "0.out.bias"])
        x = F.layer_norm(y + x, (D,), p[name + "0.norm.weight"], p[name + "0.norm.bias"])
        y = F.gelu(F.linear(x, p[name + "1.into.weight"], p[name + "1.into.bias"]))
        y = F.linear(y, p[name + "1.out.weight"], p[name + "1.out.bias"])
        x = F.layer_norm(y + x, (D,), p[name + "1.norm.weight"], p[name + "1.norm.bias"])
    return x


def loss(
    shared: Parameters,
    private: Parameters,
    batch: tuple[Tensor, Tensor, Tensor],
    *,
    layers: int,
    beta: float,
    valid_only: bool = False,
) -> Tensor:
    """Cross-entropy over dense logits, at every position with padding ignored or at valid ones, plus the VQ loss."""
    items, targets, valid = batch
    D = private["weight"].shape[1]
    z = F.layer_norm(private["weight"][items], (D,), private["norm.weight"], private["norm.bias"])
    codebook = shared["codebook"]
    H, _, d = codebook.shape
    heads = z.view(*items.shape, H, d)
    # by differences: the default's matrix product rounds so much that it flips codes, and gradients with them
    distances = [
        torch.cdist(heads[:, :, h].reshape(-1, d), codebook[h], compute_mode="donot_use_mm_for_euclid_dist")
        for h in range(H)
    ]
    indices = torch.stack([distance.argmin(1) for distance in distances], 1)
    q = torch.stack([codebook[h][indices[:, h]] for h in range(H)], 1).view(*items.shape, D)
    weight = valid[..., None].to(z.dtype) / (valid.sum() * D)
    vq = ((q - z.detach()).square() * weight).sum() + beta * ((z - q.detach()).square() * weight).sum()
    x = F.layer_norm(z + q + (z - z.detach()), (D,), shared["norm.weight"], shared["norm.bias"])
    states = encode(shared, x, valid, layers)
    if valid_only:
        states, targets = states[valid], targets[valid]
    logits = states @ private["weight"].T + private["bias"]
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-100) + vq


def outer_step(
    shared: Parameters,
    sources: list[tuple[Parameters, tuple]],
    target_private: Parameters,
    target_batch: tuple,
    *,
    layers: int,
    beta: float,
    inner_lr: float,
    temperature: float,
    source_loss_weight: float,
    order: int = 1,
    valid_only: bool = False,
) -> tuple[Parameters, Parameters, list[Parameters], Tensor]:
    """One inner step: shared gradient, target table's gradient, source tables' gradients, weights.

    order 2 differentiates through the inner step by double backward.
    """
    options = {"layers": layers, "beta": beta, "valid_only": valid_only}
    meta, target_grads, source_grads, deltas, similarities = [], [], [], [], []
    for private, batch in sources:
        value = loss(shared, private, batch, **options)
        grads = torch.autograd.grad(value, [*shared.values(), *private.values()], create_graph=order == 2)
        inner = dict(zip(shared, grads, strict=False))
        source_grads.append({k: g.detach() for k, g in zip(private, grads[len(shared) :], strict=True)})
        phi = {k: v - inner_lr * inner[k] for k, v in shared.items()}
        if order == 1:
            phi = {k: v.detach().requires_grad_() for k, v in phi.items()}
        value = loss(phi, target_private, target_batch, **options)
        at = shared if order == 2 else phi
        grads = torch.autograd.grad(value, [*at.values(), *target_private.values()])
        target_gradient = dict(zip(phi, grads, strict=False))
        delta = {k: inner_lr * inner[k].detach() for k in shared}
        dot = sum((delta[k] * target_gradient[k]).sum() for k in shared)
        norms = [torch.sqrt(sum(v.square().sum() for v in part.values())) for part in (delta, target_gradient)]
        similarities.append(dot / (norms[0] * norms[1]))
        meta.append(target_gradient)
        deltas.append(delta)
        target_grads.append(dict(zip(target_private, grads[len(phi) :], strict=True)))
    weights = torch.softmax(torch.stack(similarities) / temperature, 0)
    own = source_loss_weight / inner_lr
    total = {k: sum(w * (m[k] + own * d[k]) for w, m, d in zip(weights, meta, deltas, strict=True)) for k in shared}
    table = {k: sum(w * g[k] for w, g in zip(weights, target_grads, strict=True)) for k in target_private}
    return total, table, source_grads, weights
