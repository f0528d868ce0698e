"""FastVQ: vector_quantize_pytorch.VectorQuantize with exact codes and no N x K tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarec_fast.ops import vq_commit
from metarec_fast.ops.vq_commit import Gradient
from metarec_fast.vq.codebook import Codebook, EmaWeight
from metarec_fast.vq.orthogonality import orthogonality_loss


class LossBreakdown(NamedTuple):
    """The parts of the loss before their weights; a part that is off is 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


# Switches that VectorQuantize has and this version has not: argument -> (its value when off, what to do instead).
_ELSEWHERE = "vector_quantize_pytorch.VectorQuantize serves it and loads the same state_dict"
_UNSUPPORTED_OPTIONS: dict[str, tuple[Any, str]] = {
    "commitment_use_cross_entropy_loss": (False, "leave it False for the mean squared commitment loss"),
    "codebook_diversity_loss_weight": (0.0, "threshold_ema_dead_code keeps codes in use"),
    "stochastic_sample_codes": (False, "leave it False for the nearest code"),
    "directional_reparam": (False, "use rotation_trick"),
    "vq_bridge": (None, "use learnable_codebook"),
    "in_place_codebook_optimizer": (None, "use learnable_codebook=True with ema_update=False and any optimizer"),
    "affine_param": (False, "use ema_update"),
    "sync_update_v": (0.0, "leave it 0"),
}
_UNSUPPORTED_CALLS = {
    "indices": "compute the cross-entropy from codebook and x, or use vq_commit's loss",
    "topk": "leave it None for the nearest code",
    "codebook_transform_fn": "transform the codes and call metarec_fast.vq.quantize",
}


class FastVQ(nn.Module):
    """Replace vectors by their nearest codes of a codebook that learns; a drop-in for ``VectorQuantize``.

    Constructor, call, results and state_dict are those of vector_quantize_pytorch.VectorQuantize 1.32; checkpoints
    load in both directions. Indices are exact (lowest index at the least real distance of the float32 values), also
    under autocast, and do not depend on the rest of the batch. Statistics stay float32 whatever the module is cast to.

    dim, codebook_size: width of the vectors and number of codes.
    codebook_dim, heads, separate_codebook_per_head: width of a code (default dim), codes per vector, and whether
        each head has its own codebook; linear projections are added if codebook_dim * heads differs from dim.
    decay, eps: of the moving averages that set the codes (arXiv 1711.00937, appendix A.1).
    kmeans_init, kmeans_iters, sync_kmeans: start from the k-means centres of the first batch (of all ranks).
    use_cosine_sim: compare directions. threshold_ema_dead_code: replace codes used less than this by rows of the batch.
    channel_last, accept_image_fmap, accept_3d_fmap: form of the input, see ``forward``.
    commitment_weight: of the mean squared distance between vector and code.
    orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: of the codes' non-orthogonality.
    straight_through, rotation_trick: how the gradient passes; rotation is the default for dim > 1.
    sync_codebook: sum statistics over ranks; None: whenever torch.distributed is running at the call.
    ema_update, manual_ema_update, learnable_codebook: averages move the codes; only on ``_codebook.update_ema()``; or
        the codes are a Parameter that the commitment loss pulls (needs ema_update=False).
    freeze_codebook, return_zeros_for_masked_padding, route_gradients_to_input: as named.

    Raises ValueError for arguments out of range or at odds with each other, and for options of VectorQuantize that
    this version does not have.
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
    ) -> None:
        _refuse_unsupported(locals())
        super().__init__()
        ema_update = True if ema_update is None else ema_update
        learnable_codebook = bool(learnable_codebook)
        rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        codebook_dim = dim if codebook_dim is None else codebook_dim
        for name, value in (
            ("dim", dim),
            ("codebook_size", codebook_size),
            ("codebook_dim", codebook_dim),
            ("heads", heads),
            ("kmeans_iters", kmeans_iters),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        for name, value in (
            ("eps", eps),
            ("threshold_ema_dead_code", threshold_ema_dead_code),
            ("commitment_weight", commitment_weight),
            ("orthogonal_reg_weight", orthogonal_reg_weight),
        ):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if straight_through and rotation_trick:
            raise ValueError(
                "straight_through and rotation_trick exclude each other; pass rotation_trick=False as well"
            )
        if learnable_codebook and use_cosine_sim:
            raise ValueError("learnable_codebook=True needs use_cosine_sim=False")
        if learnable_codebook and straight_through:
            raise ValueError("learnable_codebook=True needs straight_through=False")
        if learnable_codebook and ema_update:
            raise ValueError("learnable_codebook=True needs ema_update=False: one of the two moves the codes")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap exclude each other")
        if orthogonal_reg_active_codes_only and separate_codebook_per_head and heads > 1:
            raise ValueError("orthogonal_reg_active_codes_only=True needs separate_codebook_per_head=False")

        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.channel_last, self.accept_image_fmap, self.accept_3d_fmap = channel_last, accept_image_fmap, accept_3d_fmap
        self.eps, self.use_cosine_sim = eps, use_cosine_sim
        self.freeze_codebook, self.learnable_codebook = freeze_codebook, learnable_codebook
        self.rotation_trick, self.route_gradients_to_input = rotation_trick, route_gradients_to_input
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.commitment_weight, self.has_commitment_loss = commitment_weight, commitment_weight > 0
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
        self._codebook = Codebook(
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
        )
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
        with torch.no_grad():
            self.codebook.copy_(codes)

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
        mask: bool [B, N], True where x counts, or lens: [B]; for sequences only.
        freeze_codebook, ema_update: override the module's. sample_codebook_temp has no effect on nearest codes.
        ema_update_weight: [K] or [H, K], or a function of (sums, counts) that returns it: how far each code moves.
        accum_ema_update: keep this batch's statistics for the next update instead of moving the averages.

        Returns (quantized with shape and dtype of x, indices int64 [B, ...] with a last dimension of heads if several,
        loss: one number), and a LossBreakdown if asked for. Masked positions: quantized 0 (or x, without
        return_zeros_for_masked_padding), index -1, no part in loss and codebook. Under torch.vmap, and under
        torch.func.grad with dead-code replacement, freeze the codebook: torch cannot mutate buffers there.
        Raises ValueError for shapes that do not fit and for arguments this version does not serve.
        """
        for name, value in (("indices", indices), ("topk", topk), ("codebook_transform_fn", codebook_transform_fn)):
            if value is not None:
                raise ValueError(_unsupported(name, _UNSUPPORTED_CALLS[name]))
        self._check_input(x)
        channels_second = self._channels_second and x.dim() > 2
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        moves = self.training and not frozen
        tokens = x.movedim(1, -1) if channels_second else x
        mask = self._resolve_mask(tokens, mask, lens)

        with torch.autocast(x.device.type, enabled=False):
            # padding may hold anything, NaN too: read zeros there
            rows = self._rows(tokens if mask is None else torch.where(mask.unsqueeze(-1), tokens, 0))
            keep = None if mask is None else self._per_row(mask)
            if self._codebook.needs_kmeans:
                self._codebook.init_kmeans_(rows.detach(), keep)
            routed = self.training and self.route_gradients_to_input and x.requires_grad
            pulled = self.learnable_codebook and not frozen
            embed = self._codebook.embed
            codes, row_indices, commitment = vq_commit(
                rows,
                embed.detach() if routed and not pulled else embed,
                row_weight=keep,
                codebook_grad=pulled,
                gradient=self._gradient if routed else None,
            )
            if moves:
                self._codebook.update(
                    rows.detach(),
                    row_indices,
                    keep=keep,
                    ema_update=ema_update,
                    weight=ema_update_weight,
                    accumulate=accum_ema_update,
                )
            loss, breakdown = self._losses(x, commitment, row_indices, keep)

        quantized = self._from_rows(codes, tokens)
        out_indices = self._indices_from_rows(row_indices, tokens)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
            out_indices = out_indices.masked_fill(~(mask.unsqueeze(-1) if self.heads > 1 else mask), -1)
        if channels_second:
            quantized = quantized.movedim(-1, 1)
        if return_loss_breakdown:
            return quantized, out_indices, loss, breakdown
        return quantized, out_indices, loss

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of ``indices`` as ``forward`` returns them; 0 at -1.

        [..., D], channels second where x is; [..., heads * D] with separate_codebook_per_head, [..., heads, D] with
        heads that share a codebook.
        """
        codes = self._codes(indices)
        if self.separate_codebook_per_head:
            codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self._channels_second else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns in eval mode as quantized for ``indices`` that it returned."""
        codes = self._codes(indices).flatten(-2) if self.heads > 1 else self._codes(indices)
        known = (indices[..., 0] if self.heads > 1 else indices) >= 0
        output = torch.where(known.unsqueeze(-1), self.project_out(codes), 0)
        return output.movedim(-1, 1) if self._channels_second and output.dim() > 2 else output

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
        self._check_input(x)
        tokens = x.movedim(1, -1) if self._channels_second and x.dim() > 2 else x
        mask = self._resolve_mask(tokens, mask, None)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = self._rows(tokens)
            self._codebook.update(
                rows,
                self._indices_to_rows(indices),
                keep=None if mask is None else self._per_row(mask),
                ema_update=ema_update,
                weight=ema_update_weight,
                accumulate=accum_ema_update,
            )

    update_ema_indices = update_indices

    def expire_codes_(self, x: Tensor) -> None:
        """In training, replace dead codes by rows of ``x`` [..., codebook_dim * heads], already projected."""
        self._codebook.expire_codes_(self._split_heads(x))

    def update_in_place_optimizer(self) -> None:
        """Nothing to do: there is no optimizer inside. Residual quantizers call this on every layer."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}, heads={self.heads}"

    @property
    def _gradient(self) -> Gradient:
        return "rotation" if self.rotation_trick else "straight_through"

    @property
    def _channels_second(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"x must be of a floating dtype, got {x.dtype}")
        if self.accept_image_fmap:
            form, fits = f"[B, {self.dim}, H, W]", x.dim() == 4
        elif self.accept_3d_fmap:
            form, fits = f"[B, {self.dim}, D, H, W]", x.dim() == 5
        elif not self.channel_last:
            form, fits = f"[B, {self.dim}, N] or [B, {self.dim}]", x.dim() in (2, 3)
        else:
            form, fits = f"[B, ..., {self.dim}]", x.dim() >= 2
        if not fits or x.shape[1 if self._channels_second else -1] != self.dim:
            raise ValueError(f"x must be {form}, got {tuple(x.shape)}")

    def _resolve_mask(self, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("mask and lens exclude each other")
        if self.accept_image_fmap or self.accept_3d_fmap or tokens.dim() < 3:
            raise ValueError(f"mask and lens are for sequences of vectors, got x with tokens {tuple(tokens.shape)}")
        if lens is not None:
            if lens.shape != tokens.shape[:1]:
                raise ValueError(f"lens must be [{tokens.shape[0]}], got {tuple(lens.shape)}")
            mask = torch.arange(tokens.shape[1], device=lens.device) < lens.unsqueeze(-1)
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(f"mask must be bool {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        return mask[(..., *(None,) * (tokens.dim() - 3))].expand(tokens.shape[:-1])

    def _rows(self, tokens: Tensor) -> Tensor:
        """Tokens [..., dim] to rows [H, N, D] as they are compared with the codes, float32 or float64."""
        if self.has_projections:
            tokens = self.project_in(tokens.to(self.project_out.weight.dtype))
        rows = self._split_heads(tokens)
        return self._codebook.transform_input(rows if rows.dtype == torch.float64 else rows.float())

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """[..., heads * D] to [heads, N, D], or [1, N * heads, D] if heads share a codebook."""
        if self.separate_codebook_per_head:
            return tokens.reshape(-1, self.heads, tokens.shape[-1] // self.heads).transpose(0, 1)
        return tokens.reshape(1, -1, tokens.shape[-1] // self.heads)

    def _per_row(self, mask: Tensor) -> Tensor:
        """Mask of tokens to mask of rows, [N]."""
        return mask.flatten() if self.separate_codebook_per_head else mask.flatten().repeat_interleave(self.heads)

    def _from_rows(self, codes: Tensor, tokens: Tensor) -> Tensor:
        if self.separate_codebook_per_head:
            codes = codes.transpose(0, 1)
        codes = codes.reshape(*tokens.shape[:-1], codes.shape[-1] * self.heads)
        if self.has_projections:
            codes = self.project_out(codes.to(self.project_out.weight.dtype))
        return codes.to(tokens.dtype)

    def _indices_from_rows(self, indices: Tensor, tokens: Tensor) -> Tensor:
        if self.heads == 1:
            return indices.reshape(tokens.shape[:-1])
        indices = indices.transpose(0, 1) if self.separate_codebook_per_head else indices
        return indices.reshape(*tokens.shape[:-1], self.heads)

    def _indices_to_rows(self, indices: Tensor) -> Tensor:
        if self.separate_codebook_per_head:
            return indices.reshape(-1, self.heads).transpose(0, 1)
        return indices.reshape(1, -1)

    def _codes(self, indices: Tensor) -> Tensor:
        """Codes [..., D], with several heads [..., heads, D]; 0 at -1."""
        embed, known = self._codebook.embed, indices.clamp_min(0)
        if self.separate_codebook_per_head:
            codes = embed[torch.arange(self.heads, device=indices.device), known]
        else:
            codes = embed[0][known]
        return torch.where((indices >= 0).unsqueeze(-1), codes, 0).to(self._module_dtype.dtype)

    def _losses(
        self, x: Tensor, commitment: Tensor, row_indices: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, LossBreakdown]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        off = torch.zeros((), dtype=dtype, device=x.device)
        commitment = commitment.to(dtype) if self.training and self.has_commitment_loss else off
        orthogonality = off
        if self.training and self.has_codebook_orthogonal_loss:
            used = row_indices if keep is None else row_indices.masked_fill(~keep, -1)
            orthogonality = orthogonality_loss(
                self._codebook.embed,
                used=used if self.orthogonal_reg_active_codes_only else None,
                max_codes=self.orthogonal_reg_max_codes,
            ).to(dtype)
        if self.training and not self.has_commitment_loss:
            off = off + x.reshape(-1)[:0].sum().to(dtype)  # 0, but part of the graph: callers may add to it in place
        loss = off + commitment * self.commitment_weight + orthogonality * self.orthogonal_reg_weight
        off = off.detach()
        return loss, LossBreakdown(commitment, off, orthogonality, off)


def _unsupported(name: str, instead: str) -> str:
    return f"{name} is not supported by FastVQ in this version: {instead}, or {_ELSEWHERE}"


def _refuse_unsupported(options: dict[str, Any]) -> None:
    for name, (off, instead) in _UNSUPPORTED_OPTIONS.items():
        value = options[name]
        if value is not off and value != off:
            raise ValueError(_unsupported(f"{name}={value!r}", instead))
