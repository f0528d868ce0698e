"""Lookup, losses, statistics and gradient of FastVQ for the options that its fused step does not serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarec_fast.ops import nearest_codeword
from metarec_fast.ops.gradient_estimators import rotate_to, step_towards, straight_through
from metarec_fast.ops.row_errors import mean_row_error, row_difference
from metarec_fast.vq.parts.code_scores import CodeScores
from metarec_fast.vq.parts.token_codes import TokenCodes, transformed_codes


@dataclass(frozen=True, kw_only=True)
class Call:
    """The options of one call of FastVQ.

    update: keywords of ``Codebook.update``, None to leave the codebook alone. codebook_grad: the loss has a gradient
    to the codes. routed: the gradient of the output goes to the rows. positions, by_position: of the layout.
    committed: rows of the commitment loss. targets: int64 [H, N], indices to compute a cross-entropy to.
    """

    update: dict[str, Any] | None
    codebook_grad: bool
    routed: bool
    temperature: float
    positions: int
    by_position: Callable[[Tensor], Tensor]
    committed: Tensor
    topk: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    targets: Tensor | None = None


class Step(NamedTuple):
    """codes [H, N, D] and indices [H, N], or [H, N, k, D] and [H, N, k]; losses: one number, commitment [H, N, k] for
    a top-k. to_codes: the commitment's counterpart that pulls the codes alone. None: not computed."""

    codes: Tensor
    indices: Tensor
    commitment: Tensor
    diversity: Tensor | None = None
    in_place: Tensor | None = None
    target: Tensor | None = None
    to_codes: Tensor | None = None


def composed_step(vq: nn.Module, rows: Tensor, keep: Tensor | None, call: Call) -> Step:
    """One step of ``vq``, a FastVQ, over rows [H, N, D]. keep: bool [N], rows that count, None for all."""
    in_place = None
    if vq.in_place_codebook_optimizer is not None and call.update is not None:
        in_place = _optimize_in_place(vq, rows.detach(), keep, call)
        call = replace(call, update=None)
    scores = _scores(vq, rows, keep, call)
    indices, codes = _choose(vq, rows, scores, call)
    if call.update is not None and call.topk is None:
        vq._codebook.update(rows.detach(), indices, keep=keep, **call.update)

    if vq.training and vq.commitment_use_cross_entropy_loss:
        commitment = _mean_cross_entropy(scores, indices, keep)
    else:
        codebook_grad = (call.codebook_grad and vq.codebook_weight is None) or not vq.training
        commitment = mean_square(call.committed, codes, keep, codebook_grad=codebook_grad)
    to_codes = None
    if call.codebook_grad and vq.training and vq.codebook_weight is not None:
        to_codes = mean_square(call.committed.detach(), codes, keep, codebook_grad=True)
    diversity = _diversity(vq, scores, keep, call) if vq.training and vq.has_codebook_diversity_loss else None
    target = None if call.targets is None else _mean_cross_entropy(scores, call.targets, keep)
    if call.routed:
        moving = rows if call.topk is None else rows.unsqueeze(-2).expand_as(codes)
        if vq.directional_reparam:
            codes = step_towards(moving, codes, variance=vq.directional_reparam_variance)
        else:
            codes = rotate_to(moving, codes) if vq.rotation_trick else straight_through(moving, codes)
    return Step(codes, indices, commitment, diversity, in_place, target, to_codes)


def _scores(vq: nn.Module, rows: Tensor, keep: Tensor | None, call: Call) -> CodeScores | TokenCodes:
    codes = vq._codebook.codes_for(rows, keep)
    if call.transform is None:
        # a copy: the scores are needed again for the gradient, after the codes have moved in place
        return CodeScores(rows, codes.clone(), cosine=vq.use_cosine_sim)
    made = transformed_codes(
        call.transform,
        codes,
        rows=rows.shape[1],
        positions=call.positions,
        heads_in_batch=1 if vq.separate_codebook_per_head else vq.heads,
    )
    return TokenCodes(rows, made, cosine=vq.use_cosine_sim)


def _choose(vq: nn.Module, rows: Tensor, scores: CodeScores | TokenCodes, call: Call) -> tuple[Tensor, Tensor]:
    """Indices and codes."""
    warm = vq.training and call.temperature > 0
    drawn = warm and vq.stochastic_sample_codes
    if call.topk is not None:
        indices = scores.topk(call.topk, call.temperature if drawn else None)
    elif drawn:
        indices = scores.sample(call.temperature)
    elif call.transform is None:
        indices = nearest_codeword(rows, scores.codes, metric=vq._codebook.metric, with_margin=False).indices
    else:
        indices = scores.nearest()
    if warm and vq.straight_through and call.topk is None and not call.routed:
        return indices, scores.straight_through(indices, call.temperature)
    return indices, scores.gather(indices)


def _optimize_in_place(vq: nn.Module, rows: Tensor, keep: Tensor | None, call: Call) -> Tensor:
    """One step of the codebook's own optimizer towards the rows; returns its loss."""
    call = replace(call, routed=False)
    with torch.enable_grad():
        scores = _scores(vq, rows, keep, call)
        indices, codes = _choose(vq, rows, scores, call)
        loss = mean_square(rows, codes, keep, codebook_grad=True)
        vq._codebook.update(rows, indices, keep=keep, **call.update)
        loss.backward()
    if not vq.manual_in_place_optimizer_update:
        vq.update_in_place_optimizer()
    return loss.detach()


def mean_square(rows: Tensor, codes: Tensor, keep: Tensor | None, *, codebook_grad: bool) -> Tensor:
    """Mean over elements; for codes [H, N, k, D] the mean over D, [H, N, k], 0 in rows that do not count."""
    codes = codes if codebook_grad else codes.detach()
    unweighted = None if keep is None else ~keep
    if codes.dim() == 3:
        error = row_difference(rows, codes, unweighted).square().sum(-1)
        return mean_row_error(error, keep, rows.shape[-1])
    error = (rows.unsqueeze(-2) - codes).square().mean(-1)
    return error if keep is None else torch.where(keep.unsqueeze(-1), error, 0)


def _mean_cross_entropy(scores: CodeScores | TokenCodes, targets: Tensor, keep: Tensor | None) -> Tensor:
    """Mean over rows that count and have a target; 0 if there is none."""
    if keep is not None:
        targets = targets.masked_fill(~keep, -1)
    return scores.cross_entropy(targets).sum() / (targets >= 0).sum().clamp_min(1)


def _diversity(vq: nn.Module, scores: CodeScores | TokenCodes, keep: Tensor | None, call: Call) -> Tensor:
    """Minus the mean entropy, over positions, of how soft assignments spread over the codes."""
    weight = None if keep is None else call.by_position(keep.unsqueeze(0)).squeeze(0)
    entropy = scores.entropy(vq.codebook_diversity_temperature, call.by_position, weight)
    if weight is None:
        return -entropy.sum() / max(1, entropy.numel())
    return -entropy.sum() / weight.any(-1).sum().clamp_min(1)
