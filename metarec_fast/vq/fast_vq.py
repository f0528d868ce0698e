"""FastVQ: vector_quantize_pytorch.VectorQuantize with exact codes and no N x K tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarec_fast.ops.portable_lookup import check_leaves_in_eval
from metarec_fast.ops.register import check_is_tensor, forward_mode
from metarec_fast.ops.vq_commit import Gradient, vq_commit_with_health
from metarec_fast.vq.parts.affine_codebook import AffineCodebook
from metarec_fast.vq.parts.arguments import check_arguments
from metarec_fast.vq.parts.codebook import Codebook, EmaWeight
from metarec_fast.vq.parts.composed_step import Call, Step, composed_step, mean_square
from metarec_fast.vq.parts.health import CodebookHealth
from metarec_fast.vq.parts.layout import Layout, as_indices
from metarec_fast.vq.parts.orthogonality import orthogonality_loss
from metarec_fast.vq.parts.projection import project
from metarec_fast.vq.parts.recomputation import repeatable


class LossBreakdown(NamedTuple):
    """The parts of the loss before their weights; a part that is off is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class FastVQ(nn.Module):
    """Replace vectors by the nearest codes of a learned codebook; a drop-in for ``VectorQuantize``.

    Constructor, call, results and state_dict are those of vector_quantize_pytorch.VectorQuantize 1.32; checkpoints
    load in both directions. Indices are exact (lowest index at the least real distance of the float32 values, for
    cosine similarity at the largest real product), also under autocast, and do not depend on the rest of the batch.
    Statistics stay float32 whatever the module is cast to.

    dim, codebook_size: width of the vectors and number of codes.
    codebook_dim, heads, separate_codebook_per_head: width of a code (default dim), codes per vector, and whether
        each head has its own codebook; linear projections are added if codebook_dim * heads differs from dim, with a
        norm if layernorm_after_project_in.
    decay, eps: of the moving averages that set the codes (arXiv 1711.00937, appendix A.1).
    kmeans_init, kmeans_iters, sync_kmeans: initialise the codes by k-means on the first batch (of all ranks).
    use_cosine_sim: normalise rows to length 1 and choose the code of largest inner product, codes as they are stored;
        a row of zeros has code 0.
    threshold_ema_dead_code: replace codes with a smaller ``cluster_size`` by rows of the batch.
    channel_last, accept_image_fmap, accept_3d_fmap: form of the input, see ``forward``.
    commitment_weight: of the mean squared distance between vector and code, or with
        commitment_use_cross_entropy_loss of the cross-entropy of the code under the softmax of minus the distances.
    codebook_weight: with a learnable codebook, the loss is commitment_weight * |x - sg(c)|^2 + codebook_weight *
        |sg(x) - c|^2, sg: stop-gradient. None: commitment_weight * |x - c|^2.
    orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: of the mean squared cosine
        between codes.
    codebook_diversity_loss_weight, codebook_diversity_temperature: of minus the entropy of the mean soft assignment.
    stochastic_sample_codes, sample_codebook_temp: in training, draw codes by softmax(-distance / temperature).
    straight_through, rotation_trick, directional_reparam: estimator of the gradient; rotation is the default for
        dim > 1. With straight_through and route_gradients_to_input=False the gradient is that of the softmax above;
        directional_reparam steps towards the code in a direction with noise of directional_reparam_variance.
    sync_codebook: sum statistics over ranks; None: whenever torch.distributed is running at the call.
    ema_update, manual_ema_update, learnable_codebook: the codes are set by moving averages; by these only on
        ``_codebook.update_ema()``; or they are a Parameter with a gradient from the commitment loss.
        learnable_codebook=True needs ema_update=False; both are so by default with directional_reparam or vq_bridge.
    vq_bridge: a module applied to the codes [H, K, D] before rows are compared with them.
    in_place_codebook_optimizer, manual_in_place_optimizer_update: a function from parameters to an optimizer that
        moves the codes within the call; or only on ``update_in_place_optimizer()``.
    affine_param, affine_param_batch_decay, affine_param_codebook_decay, sync_affine_param: shift and scale the codes to
        the running mean and variance of the input, updated at every call, in eval too; see ``AffineCodebook``.
    sync_update_v: between 0 and 1, lets the gradient of the output reach a learnable codebook (vqtorch's rule).
    freeze_codebook, return_zeros_for_masked_padding, route_gradients_to_input: as named.
    strict_upstream: reproduce defects of VectorQuantize 1.32 on which existing code may depend.
        False, and what True does instead:
        - a code that no row chooses stays where it is once its cluster_size is below 100 * eps;
          True: the smoothing by eps shrinks it to the origin.
        - with mask and use_cosine_sim the commitment loss compares directions, as it does without a mask;
          True: it compares the input's own length with the code, where neither heads nor projections are.
        - forward(indices=...) returns codes in the form of x, and a mask leaves tokens out of the cross-entropy;
          True: codes before project_out, [B, N, D] or with heads [heads, B, N, D] or [1, B * heads, N, D].
        - with vq_bridge or affine_param, get_codes_from_indices gives the codes that forward gives;
          True: the codes of the codebook as it is stored.
        Never reproduced: a loss that is a buffer, averages in half precision, NaN rows in the codebook, inexact
        indices, -1 counted as code 0, whether to sync decided at construction, gradients from codes already moved.

    mask_nonfinite: treat vectors with NaN or infinity as masked: quantized 0, index -1, no part in the loss.
        False: they get index 0 and its code, as in VectorQuantize (with top-k or beams any code), and make the loss
        NaN. They never move codes.

    Raises ValueError for arguments out of range or at odds with each other.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        *,
        codebook_weight: float | None = None,
        strict_upstream: bool = False,
        mask_nonfinite: bool = False,
    ) -> None:
        super().__init__()
        codes_get_gradients = directional_reparam or vq_bridge is not None
        ema_update = not codes_get_gradients if ema_update is None else ema_update
        learnable_codebook = codes_get_gradients if learnable_codebook is None else learnable_codebook
        rotation_trick = (dim > 1 and not directional_reparam) if rotation_trick is None else rotation_trick
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_arguments(locals())

        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.strict_upstream, self.mask_nonfinite = strict_upstream, mask_nonfinite
        self._layout = Layout(
            dim, heads, separate_codebook_per_head, channel_last, image=accept_image_fmap, volume=accept_3d_fmap
        )
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.eps, self.use_cosine_sim = eps, use_cosine_sim
        self.freeze_codebook, self.learnable_codebook = freeze_codebook, learnable_codebook
        self.rotation_trick, self.route_gradients_to_input = rotation_trick, route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.straight_through, self.directional_reparam = straight_through, directional_reparam
        self.directional_reparam_variance, self.sync_update_v = directional_reparam_variance, sync_update_v
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp
        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.codebook_weight = codebook_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes

        inner = codebook_dim * heads
        self.has_projections = inner != dim
        if self.has_projections:
            project_in = nn.Linear(dim, inner)
            self.project_in = (
                nn.Sequential(project_in, nn.LayerNorm(inner)) if layernorm_after_project_in else project_in
            )
            self.project_out = nn.Linear(inner, dim)
        else:
            self.project_in, self.project_out = nn.Identity(), nn.Identity()
        affine = (
            {
                "batch_decay": affine_param_batch_decay,
                "codebook_decay": affine_param_codebook_decay,
                "sync_affine_param": sync_affine_param,
            }
            if affine_param
            else {}
        )
        self._codebook = (AffineCodebook if affine_param else Codebook)(
            codebook_dim,
            codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            use_cosine_sim=use_cosine_sim,
            threshold_ema_dead_code=threshold_ema_dead_code,
            sync=sync_codebook,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            as_parameter=learnable_codebook or self.has_codebook_orthogonal_loss,
            freezes_unused=not strict_upstream,
            bridge=vq_bridge,
            **affine,
        )
        self.in_place_codebook_optimizer = (
            None if in_place_codebook_optimizer is None else in_place_codebook_optimizer(self._codebook.parameters())
        )
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        # codes are float32 always; what they are returned as follows casts of the module
        self.register_buffer("_module_dtype", torch.empty(0), persistent=False)

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The codes: [K, D], or [heads, K, D] with separate_codebook_per_head. May be assigned."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        check_is_tensor(codes, "codebook")
        with torch.no_grad():
            self.codebook.copy_(codes)

    @repeatable
    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: EmaWeight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, LossBreakdown]:
        """Quantize ``x``; in training also move the codebook, unless frozen.

        x: [B, ..., dim], or channels second: [B, dim, N] with channel_last=False, [B, dim, H, W] with
            accept_image_fmap, [B, dim, D, H, W] with accept_3d_fmap; [B, dim] always.
        indices: integers as ``forward`` returns them, -1 for none: codes to compute a cross-entropy to.
        mask: bool [B, N], True where x counts, or lens: [B]; for sequences only.
        topk: return the k best codes of each vector, and move no codes. Needs heads=1.
        sample_codebook_temp, freeze_codebook, ema_update: override the module's.
        codebook_transform_fn: from codes [H, K, D] to codes of each vector [H, B, N, K, D] (B * heads for B if heads
            share a codebook); such codes take N x K x D memory.
        ema_update_weight: [K] or [H, K], or a function of (sums, counts) that returns it: how far each code moves.
        accum_ema_update: keep this batch's statistics for the next update instead of moving the averages.

        Returns (quantized with shape and dtype of x, indices int64 [B, ...] with a last dimension of heads if several,
        loss: one number), and a LossBreakdown with return_loss_breakdown. With topk: quantized [B, N, k, dim] (channels
        second: [B, dim, ..., k]), indices and loss [B, ..., k]. With indices: (quantized, cross-entropy).
        Masked positions: quantized 0 (or x, without return_zeros_for_masked_padding), index -1, no part in loss and
        codebook. Under torch.vmap, and under torch.func.grad with dead-code replacement, freeze the codebook: torch
        cannot mutate buffers there.
        Raises ValueError for shapes that do not fit, TypeError for what is no tensor, and RuntimeError if traced or
        exported in training mode.
        """
        check_leaves_in_eval(self)
        tokens, mask = self._layout.tokens_and_mask(x, mask, lens, only_finite=self.mask_nonfinite)
        topk = None if topk is None else self._check_topk(int(topk))
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        codebook_grad = self.learnable_codebook and not frozen
        routed = self.training and self.route_gradients_to_input and (x.requires_grad or forward_mode())
        update = {"ema_update": ema_update, "weight": ema_update_weight, "accumulate": accum_ema_update}
        update = update if self.training and not frozen else None
        given = topk is not None or indices is not None or codebook_transform_fn is not None

        with torch.autocast(x.device.type, enabled=False):
            # padding may be anything, also NaN: use zeros there
            kept = tokens if mask is None else torch.where(mask.unsqueeze(-1), tokens, 0)
            rows = self._rows(kept)
            keep = None if mask is None else self._layout.row_mask(mask)
            self._codebook.ensure_init_(rows.detach(), keep)
            if given or not self._runs_fused(masked=mask is not None, routed=routed, moves=update is not None):
                call = Call(
                    update=update,
                    codebook_grad=codebook_grad,
                    routed=routed,
                    temperature=self.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp,
                    positions=self._layout.positions(tokens),
                    by_position=partial(self._layout.by_position, tokens=tokens),
                    committed=self._rows_as_given(kept) if self._compares_lengths(masked=mask is not None) else rows,
                    topk=topk,
                    transform=codebook_transform_fn,
                    targets=None if indices is None else self._targets(indices, tokens),
                )
                step = composed_step(self, rows, keep, call)
            else:
                step = self._fused_step(rows, keep, update, codebook_grad=codebook_grad, routed=routed)
            codes = step.codes
            if self.training and self.sync_update_v > 0:
                codes = codes + self.sync_update_v * (codes - codes.detach())
            if indices is not None and self.strict_upstream:
                return self._layout.upstream_rows(codes, tokens).to(x.dtype), step.target
            loss, breakdown = self._losses(x, tokens, step, keep)

        quantized = project(self.project_out, self._layout.from_rows(codes, tokens)).to(x.dtype)
        out_indices = self._layout.indices_from_rows(step.indices, tokens)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            if topk is not None:
                mask, padding = mask.unsqueeze(-1), padding.unsqueeze(-2)
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
            out_indices = out_indices.masked_fill(~(mask.unsqueeze(-1) if self.heads > 1 else mask), -1)
        quantized = self._layout.like_input(quantized, x)
        if indices is not None:
            return quantized, step.target
        if return_loss_breakdown:
            return quantized, out_indices, loss, breakdown
        return quantized, out_indices, loss

    def _runs_fused(self, *, masked: bool, routed: bool, moves: bool) -> bool:
        """Whether the fused step serves the module's options: nearest codes, mean squared loss, rotation or STE."""
        soft = self.stochastic_sample_codes or (self.straight_through and not routed)
        other_loss = self.commitment_use_cross_entropy_loss or self.has_codebook_diversity_loss
        return not (
            (self.training and (soft or other_loss))
            or (routed and self.directional_reparam)
            or (moves and self.in_place_codebook_optimizer is not None)
            or self._codebook.compares_other_codes
            or self._compares_lengths(masked=masked)
        )

    def _fused_step(
        self, rows: Tensor, keep: Tensor | None, update: dict[str, Any] | None, *, codebook_grad: bool, routed: bool
    ) -> Step:
        """Lookup, loss, statistics and the gradient of the output in one operator: the usual options."""
        embed, pulls_codes = self._codebook.embed, codebook_grad and self.codebook_weight is None
        (codes, indices, commitment), health = vq_commit_with_health(
            rows,
            embed.detach() if routed and not pulls_codes else embed,
            row_weight=keep,
            codebook_grad=pulls_codes,
            gradient=self._gradient if routed else None,
            metric=self._codebook.metric,
        )
        to_codes = None
        if codebook_grad and self.training and self.codebook_weight is not None:
            # of a copy: dead codes are replaced in place before backward
            chosen = embed.clone().gather(1, indices.unsqueeze(-1).expand_as(rows))
            to_codes = mean_square(rows.detach(), chosen, keep, codebook_grad=True)
        if update is not None:
            self._codebook.update(rows.detach(), indices, keep=keep, lookup=health, **update)
        return Step(codes, indices, commitment, to_codes=to_codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of ``indices``, of any integer dtype, as ``forward`` returns them; 0 at -1.

        [..., D], channels second where x is; [..., heads * D] with separate_codebook_per_head, [..., heads, D] with
        heads that share a codebook.
        """
        codes = self._codes(as_indices(indices))
        if self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        return codes.movedim(codes.dim() - 1, 1) if self._layout.channels_second else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns in eval mode as quantized for ``indices`` that it returned."""
        indices = as_indices(indices)
        codes = self._codes(indices).flatten(-2) if self.heads > 1 else self._codes(indices)
        known = (indices[..., 0] if self.heads > 1 else indices) >= 0
        output = torch.where(known.unsqueeze(-1), project(self.project_out, codes), 0)
        return self._layout.like_input(output, output)

    def update_indices(
        self,
        x: Tensor,
        indices: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: EmaWeight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Move the codebook as ``forward`` in training does, by ``x`` and ``indices`` that are known."""
        tokens, mask = self._layout.tokens_and_mask(x, mask)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self._codebook.update(
                self._rows(tokens),
                self._targets(indices, tokens),
                keep=None if mask is None else self._layout.row_mask(mask),
                ema_update=ema_update,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
            )

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """In training, replace dead codes by rows of ``x`` [..., codebook_dim * heads], already projected."""
        check_is_tensor(x, "x")
        self._codebook.expire_codes_(self._layout.rows(x))

    @torch.no_grad()
    def update_in_place_optimizer(self) -> None:
        """Let ``in_place_codebook_optimizer`` take its step, by gradients that are the mean over synced ranks."""
        if self.in_place_codebook_optimizer is None:
            return
        _follow_parameters(self.in_place_codebook_optimizer, list(self._codebook.parameters()))
        self._codebook.average_grads()
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def stats(self) -> CodebookHealth:
        """Usage, perplexity and dead codes in the last training pass; waits for the device."""
        return self._codebook.health.stats()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, heads={self.heads}"

    @property
    def _gradient(self) -> Gradient:
        return "rotation" if self.rotation_trick else "straight_through"

    def _check_topk(self, topk: int) -> int:
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        if self.heads > 1:
            raise ValueError(f"topk needs heads=1, got {self.heads}")
        if self.training and self.commitment_use_cross_entropy_loss:
            raise ValueError("topk in training needs commitment_use_cross_entropy_loss=False")
        if self.training and self.in_place_codebook_optimizer is not None:
            raise ValueError("topk in training needs in_place_codebook_optimizer=None")
        return min(topk, self.codebook_size)

    def _rows(self, tokens: Tensor) -> Tensor:
        """Tokens [..., dim] to rows [H, N, D] as they are compared with the codes, float32 or float64."""
        if self.has_projections:
            tokens = project(self.project_in, tokens)
        return self._codebook.transform_input(self._rows_as_given(tokens))

    def _rows_as_given(self, tokens: Tensor) -> Tensor:
        rows = self._layout.rows(tokens)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _compares_lengths(self, *, masked: bool) -> bool:
        """Whether the commitment loss takes rows of their own length though the codes have length 1."""
        return self.strict_upstream and masked and self.use_cosine_sim and self.heads == 1 and not self.has_projections

    def _targets(self, indices: Tensor, tokens: Tensor) -> Tensor:
        expected = (*tokens.shape[:-1], self.heads) if self.heads > 1 else tokens.shape[:-1]
        indices = as_indices(indices)
        if indices.numel() != math.prod(expected):
            raise ValueError(f"indices must be int64 {tuple(expected)}, got {indices.dtype} {tuple(indices.shape)}")
        return self._layout.indices_to_rows(indices)

    def _codes(self, indices: Tensor) -> Tensor:
        """Codes [..., D], with several heads [..., heads, D]; 0 at -1."""
        embed = self._codebook.embed if self.strict_upstream else self._codebook.codes_now()
        known = indices.clamp_min(0)
        if self.separate_codebook_per_head:
            codes = embed[torch.arange(self.heads, device=indices.device), known]
        else:
            codes = embed[0][known]
        return torch.where((indices >= 0).unsqueeze(-1), codes, 0).to(self._module_dtype.dtype)

    def _losses(self, x: Tensor, tokens: Tensor, step: Step, keep: Tensor | None) -> tuple[Tensor, LossBreakdown]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        off = torch.zeros((), dtype=dtype, device=x.device)
        per_token = step.commitment.dim() > 0  # of a top-k, which has its loss in eval too
        commitment, weight = off, self.commitment_weight if self.has_commitment_loss or self.training else 1.0
        if per_token and (not self.training or self.has_commitment_loss):
            commitment = self._layout.indices_from_rows(step.commitment, tokens).to(dtype)
        elif self.training and self.has_commitment_loss:
            commitment = step.commitment.to(dtype)
        diversity = off if step.diversity is None else step.diversity.to(dtype)
        in_place = off if step.in_place is None else step.in_place.to(dtype)
        orthogonality = off
        if self.training and self.has_codebook_orthogonal_loss:
            used = step.indices
            if keep is not None:
                used = used.masked_fill(~(keep if used.dim() == 2 else keep.unsqueeze(-1)), -1)
            orthogonality = orthogonality_loss(
                self._codebook.embed.clone(),  # a copy: the codes change in place before backward
                used=used.flatten(1) if self.orthogonal_reg_active_codes_only else None,
                max_codes=self.orthogonal_reg_max_codes,
            ).to(dtype)
        if self.training and not self.has_commitment_loss:
            off = off + x.reshape(-1)[:0].sum().to(dtype)  # 0, but part of the graph: callers may add to it in place
        loss = off + commitment * weight
        if step.to_codes is not None:
            pull = step.to_codes if not per_token else self._layout.indices_from_rows(step.to_codes, tokens)
            loss = loss + pull.to(dtype) * self.codebook_weight
        loss = loss + diversity * self.codebook_diversity_loss_weight + orthogonality * self.orthogonal_reg_weight
        return loss, LossBreakdown(commitment, diversity, orthogonality, in_place)


def _follow_parameters(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Replace the optimizer's parameters by ``parameters`` where loading a checkpoint has made new tensors."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if all(any(p is now for now in parameters) for p in held):
        return
    if len(held) != len(parameters):
        raise RuntimeError(
            f"in_place_codebook_optimizer holds {len(held)} parameters, not all of them the codebook's own, and the "
            f"codebook has {len(parameters)}: make the optimizer again"
        )
    now = dict(zip(map(id, held), parameters, strict=True))
    for group in optimizer.param_groups:
        group["params"] = [now[id(p)] for p in group["params"]]
    for p in held:
        if p in optimizer.state and now[id(p)] is not p:
            optimizer.state[now[id(p)]] = optimizer.state.pop(p)
