"""The levels of a residual quantizer in one loop over rows, with one gradient for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metarec_fast.ops.portable_lookup import leaves_python
from metarec_fast.ops.register import define
from metarec_fast.ops.vq_backward import vq_backward
from metarec_fast.ops.vq_commit import Gradient, vq_commit_with_health
from metarec_fast.vq.parts.codebook import COSINE_EPS, Codebook

# A compiler moves what only backward needs into backward, where the codes have moved on. It leaves alone what the
# lookup needs and an operator unknown to it gave.
_snapshot = define(
    "vq_snapshot(Tensor codes) -> Tensor",
    cpu=torch.clone,
    cuda=torch.clone,
    fake=lambda codes: codes.new_empty(codes.shape),
)


class Chain(NamedTuple):
    """quantized: [1, N, D], the sum over levels. indices: int64 [L, N]. commitments: [L], before their weight.

    inputs: each level's input, [1, N, D] each, as it is compared with the codes; empty unless keep_inputs.
    """

    quantized: Tensor
    indices: Tensor
    commitments: Tensor
    inputs: list[Tensor]


def residual_chain(
    codebooks: Sequence[Codebook],
    rows: Tensor,
    keep: Tensor | None,
    *,
    gradient: Gradient | None,
    update: bool,
    keep_inputs: bool = False,
) -> Chain:
    """Quantize rows [1, N, D] by the first codebook, what it leaves by the next, and so on.

    keep: bool [N], rows that count; the others must be finite. gradient: how that of ``quantized`` goes to the rows,
    None: not at all. update: move the codebooks. keep_inputs: return the levels' inputs.
    Only the current residual is kept: backward recomputes the others from rows, indices and codes, so that memory does
    not grow by N x D with each level.
    """
    needs_grad = torch.is_grad_enabled() and rows.requires_grad and not leaves_python()
    cosine = codebooks[0].use_cosine_sim
    residual, total, codes = rows.detach(), None, None
    indices, commitments, inputs = [], [], []
    tables, table_of_level = [], []  # the codes before each level moved them; levels may share a table
    for level, codebook in enumerate(codebooks):
        if codes is not None:
            # in place where the memory is ours alone
            residual = residual - codes if total is None or keep_inputs else residual.sub_(codes)
            total = codes if total is None else total.add_(codes)
        compared = codebook.transform_input(residual)
        codebook.ensure_init_(compared, keep)
        embed = codebook.embed.detach()
        if needs_grad:
            stays = level and codebook is codebooks[level - 1] and not codebook.has_dead_code_replacement
            if not stays:
                tables.append(_snapshot(embed))
            table_of_level.append(len(tables) - 1)
            embed = tables[-1]
        with torch.no_grad():
            (codes, chosen, commitment), health = vq_commit_with_health(
                compared, embed, row_weight=keep, metric=codebook.metric
            )
        if update:
            codebook.update(compared, chosen, keep=keep, lookup=health)
        indices.append(chosen[0])
        commitments.append(commitment)
        if keep_inputs:
            inputs.append(compared)
    indices, commitments = torch.stack(indices), torch.stack(commitments)
    if needs_grad:
        quantized, commitments = _ChainGradient.apply(
            rows, total, codes, commitments, indices, keep, gradient, cosine, tuple(table_of_level), *tables
        )
    else:
        quantized = codes if total is None else total + codes
    return Chain(quantized, indices, commitments, inputs)


class _ChainGradient(torch.autograd.Function):
    """The last addition of the chain in value; the gradient of all levels, twice differentiable."""

    @staticmethod
    def forward(
        rows: Tensor,
        total: Tensor | None,
        codes: Tensor,
        commitments: Tensor,
        indices: Tensor,
        keep: Tensor | None,
        gradient: Gradient | None,
        cosine: bool,
        table_of_level: tuple[int, ...],
        *tables: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return codes.clone() if total is None else total + codes, commitments.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        rows, _, _, _, indices, keep, ctx.gradient, ctx.cosine, ctx.table_of_level, *tables = inputs
        ctx.set_materialize_grads(False)
        if ctx.gradient is None:
            ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(rows, indices, keep, *tables)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_commitments: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, indices, keep, *tables = ctx.saved_tensors
        nothing = (None,) * (8 + len(tables))
        grad = None if ctx.gradient is None else grad
        if grad is None and grad_commitments is None:
            return None, *nothing
        share, out, residual = _share(rows, keep), None, rows
        for level, table in enumerate(ctx.table_of_level):
            compared = residual
            if ctx.cosine:
                length = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
                compared = residual / length.clamp_min(COSINE_EPS)
            codes = F.embedding(indices[level : level + 1], tables[table][0]).to(rows.dtype)
            grad_error = None if grad_commitments is None else share * grad_commitments[level].to(rows.dtype)
            step = vq_backward(grad, grad_error, compared, codes, rotation=ctx.gradient == "rotation")
            if ctx.cosine:
                along = torch.where(length > COSINE_EPS, (step * compared).sum(-1, keepdim=True), 0)
                step = torch.addcmul(step, compared, along, value=-1) / length.clamp_min(COSINE_EPS)
            if level < 2 or torch.is_grad_enabled():  # not ours yet, or to be differentiated again
                out, residual = step if out is None else out + step, residual - codes
            else:
                out, residual = out.add_(step), residual.sub_(codes)
        return out, *nothing


def _share(rows: Tensor, keep: Tensor | None) -> Tensor:
    """What the squared error of each row counts in a commitment, [1, N]."""
    _, N, D = rows.shape
    if keep is None:
        return rows.new_full((1, N), 1 / max(1, N * D))
    return (keep / (keep.sum() * D).clamp_min(1)).to(rows.dtype).unsqueeze(0)
