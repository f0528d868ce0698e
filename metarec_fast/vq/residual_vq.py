"""FastResidualVQ: vector_quantize_pytorch.ResidualVQ with exact codes, and one loop and one gradient for all levels."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metarec_fast.ops.gradient_estimators import step_towards
from metarec_fast.ops.portable_lookup import check_leaves_in_eval
from metarec_fast.ops.register import check_is_tensor, traced_transform
from metarec_fast.vq.fast_vq import FastVQ
from metarec_fast.vq.parts.beam_search import Beams
from metarec_fast.vq.parts.implicit_codebook import ImplicitCodebook
from metarec_fast.vq.parts.layout import Layout, as_indices
from metarec_fast.vq.parts.projection import project
from metarec_fast.vq.parts.recomputation import repeatable
from metarec_fast.vq.parts.residual_chain import residual_chain
from metarec_fast.vq.parts.sampling import sum_over_ranks, world_size

_DIVEQ_VARIANCE = 5e-3


class FastResidualVQ(nn.Module):
    """Quantize vectors by a first codebook, the residual by a second, and so on; a drop-in for ``ResidualVQ``.

    Constructor, call, results and state_dict are those of vector_quantize_pytorch.ResidualVQ 1.32; checkpoints load in
    both directions. ``layers`` are FastVQ modules. Source: algorithm 1 of arXiv 2107.03312.

    dim: width of the vectors. num_quantizers: number of levels L, may be left out if codebook_size is a tuple.
    codebook_size: codes per level, one number or a tuple of L.
    codebook_dim: width of a code (default dim); linear projections are added if it differs.
    shared_codebook: one codebook for all levels; its codes move once a step, after the last level.
    quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: in training, stop after a random
        level from the cutoff on, rounded up to a multiple of levels.
    accept_image_fmap: x is [B, dim, H, W].
    quant_grad_frac: share of the gradient that passes through what a level subtracts to the levels before it.
    diveq: learn the codes by a noisy step from x towards the sum of its codes (openreview KRVnpTbx7R).
    implicit_neural_codebook, mlp_kwargs: codes of later levels depend on what is quantized so far, see
        ``ImplicitCodebook``; takes N x K x dim memory.
    beam_size, eval_beam_size, beam_score_quantizer_weights: keep this many candidates through the levels, and return
        the one of least weighted sum of errors.
    return_zeros_for_masked_padding: masked positions are 0, else as in x.
    vq_kwargs: arguments of FastVQ, the same for each level; commitment_weight, decay, use_cosine_sim, kmeans_init,
        threshold_ema_dead_code, rotation_trick are served by the fused loop, others level by level.

    Raises ValueError for arguments out of range or at odds with each other.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | Sequence[int],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: Mapping[str, Any] | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs: Any,
    ) -> None:
        super().__init__()
        sizes = _codebook_sizes(codebook_size, num_quantizers)
        if heads != 1:
            raise ValueError(f"heads must be 1, got {heads}; FastGroupedResidualVQ splits vectors into groups")
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"shared_codebook=True needs one codebook_size for all levels, got {sizes}")
        if quantize_dropout_cutoff_index < 0 or (quantize_dropout and quantize_dropout_cutoff_index >= len(sizes)):
            raise ValueError(
                f"quantize_dropout_cutoff_index must be in [0, {len(sizes)}), got {quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(f"quantize_dropout_multiple_of must be at least 1, got {quantize_dropout_multiple_of}")
        if eval_beam_size is not None and beam_size is None:
            raise ValueError("eval_beam_size needs beam_size")
        weights = [1.0] * len(sizes) if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        if len(weights) != len(sizes):
            raise ValueError(f"beam_score_quantizer_weights must be {len(sizes)} numbers, got {len(weights)}")
        if implicit_neural_codebook:
            vq_kwargs |= {"learnable_codebook": True, "ema_update": False}
        if shared_codebook:
            vq_kwargs |= {"manual_ema_update": True, "manual_in_place_optimizer_update": True}
        if diveq:
            vq_kwargs |= {"ema_update": False, "learnable_codebook": True}
            vq_kwargs |= {"route_gradients_to_input": False, "commitment_weight": 0.0}

        self.dim, self.codebook_dim = dim, dim if codebook_dim is None else codebook_dim
        self._layout = Layout(
            dim,
            heads=1,
            separate=False,
            channel_last=vq_kwargs.pop("channel_last", True),
            image=accept_image_fmap,
            volume=vq_kwargs.pop("accept_3d_fmap", False),
        )
        self.accept_image_fmap = accept_image_fmap
        self.mask_nonfinite = vq_kwargs.pop("mask_nonfinite", False)
        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.layers = nn.ModuleList(
            FastVQ(
                dim=self.codebook_dim,
                codebook_size=size,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **vq_kwargs,
            )
            for size in sizes
        )
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.diveq, self.quant_grad_frac = diveq, 1.0 if diveq else quant_grad_frac
        self.beam_size, self.eval_beam_size = beam_size, beam_size if eval_beam_size is None else eval_beam_size
        self._beam_score_weights = tuple(map(float, weights))
        self.implicit_neural_codebook = implicit_neural_codebook
        self.mlps = None
        if implicit_neural_codebook:
            self.mlps = nn.ModuleList(
                ImplicitCodebook(self.codebook_dim, l2norm_output=self.layers[0].use_cosine_sim, **(mlp_kwargs or {}))
                for _ in sizes[1:]
            )
        self.shared_codebook = shared_codebook
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook

    @property
    def beam_score_weights(self) -> Tensor:
        """``beam_score_quantizer_weights`` as a tensor [L], where the codes are."""
        return torch.tensor(self._beam_score_weights, dtype=torch.float32, device=self.layers[0].codebook.device)

    @property
    def codebook_size(self) -> int:
        """Codes of the first level."""
        return self.layers[0].codebook_size

    @property
    def vq_is_ema_updating(self) -> bool:
        """Whether moving averages set the codes."""
        return self.layers[0].ema_update

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes: [L, K, D], or a tuple of [K, D] if levels differ in size."""
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    @repeatable
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize ``x``; in training also move the codebooks, unless frozen here or in the constructor.

        x: [B, ..., dim], or [B, dim, H, W] with accept_image_fmap. mask: bool [B, N], True where x counts.
        indices: integers [B, ..., L] (or L of [B, ...]), -1 for none: codes to compute a cross-entropy to.
        return_all_codes: append the result of ``get_codes_from_indices``. beam_size: overrides the module's.
        rand_quantize_dropout_fixed_seed: where to end under quantize_dropout follows from it. None: from torch's
            generator, which costs a number that the host reads, so torch.compile(fullgraph=True) needs a seed.

        Returns (quantized like x, indices int64 [B, ..., L], losses [L]). Levels that dropout leaves out have index -1
        and loss 0; masked positions have index -1. With ``indices``: (quantized, sum of the levels' cross-entropies).
        Raises ValueError for shapes that do not fit, TypeError for what is no tensor, and RuntimeError if traced or
        exported in training mode.
        """
        check_leaves_in_eval(self)
        tokens, mask = self._layout.tokens_and_mask(x, mask, only_finite=self.mask_nonfinite)
        targets = None if indices is None else self._targets(indices, tokens)
        levels = self.num_quantizers
        if self.training and self.quantize_dropout and indices is None:
            levels = self._levels_kept(rand_quantize_dropout_fixed_seed, x.device)
        if beam_size is None:
            beam_size = self.beam_size if self.training else self.eval_beam_size
        frozen = freeze_codebook or self.layers[0].freeze_codebook

        with torch.autocast(x.device.type, enabled=False):
            # padding may be anything, also NaN: use zeros there
            inner = project(self.project_in, tokens if mask is None else torch.where(mask.unsqueeze(-1), tokens, 0))
            beams = beam_size is not None and beam_size > 1
            if targets is None and not beams and self._runs_fused(masked=mask is not None):
                quantized, chosen, losses, inputs = self._fused_levels(inner, mask, levels, frozen=frozen)
            else:
                quantized, chosen, losses, inputs = self._level_by_level(
                    inner,
                    mask,
                    levels,
                    targets=targets,
                    beam_size=beam_size if beams else None,
                    frozen=frozen,
                    sample_codebook_temp=sample_codebook_temp,
                )
            if self.training and self.shared_codebook and not frozen:
                self._move_shared_codebook(inputs, mask)
            if self.diveq:
                quantized = step_towards(inner, quantized, variance=_DIVEQ_VARIANCE)
            quantized = project(self.project_out, quantized)
        quantized = quantized.to(x.dtype)
        if mask is not None:
            padding = torch.zeros_like(tokens) if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        quantized = self._layout.like_input(quantized, x)
        if targets is not None:
            return quantized, losses.sum()
        if mask is not None:
            chosen = chosen.masked_fill(~mask.unsqueeze(-1), -1)
        if levels < self.num_quantizers:
            left_out = self.num_quantizers - levels
            chosen = torch.cat((chosen, chosen.new_full((*chosen.shape[:-1], left_out), -1)), -1)
            losses = torch.cat((losses, losses.new_zeros(left_out)))
        if return_all_codes:
            return quantized, chosen, losses, self.get_codes_from_indices(chosen)
        return quantized, chosen, losses

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of integers ``indices`` [B, ..., l], as ``forward`` returns them: [L, B, ..., codebook_dim], 0 at -1.

        Fewer levels than the module has may be given with quantize_dropout; the others count as left out.
        """
        indices = as_indices(indices)
        given = indices.shape[-1]
        if given > self.num_quantizers or (given < self.num_quantizers and not self.quantize_dropout):
            fewer = " or fewer" if self.quantize_dropout else ""
            raise ValueError(f"indices must have {self.num_quantizers} levels{fewer} last, got {tuple(indices.shape)}")
        codes, total = [], 0
        for level, layer in enumerate(self.layers):
            if level >= given:
                codes.append(torch.zeros_like(codes[0]))
                continue
            of_level = layer._codes(indices[..., level])
            if level and self.mlps is not None:
                of_level = self.mlps[level - 1].at(of_level.flatten(1, -2), total.flatten(1, -2)).view_as(of_level)
                of_level = torch.where((indices[..., level] >= 0).unsqueeze(-1), of_level, 0)
            codes.append(of_level)
            total = total + of_level
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns in eval mode as quantized for ``indices`` that it returned, in the form of x."""
        output = project(self.project_out, self.get_codes_from_indices(indices).sum(0))
        return self._layout.like_input(output, output)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_quantizers={self.num_quantizers}, codebook_size={self.codebook_sizes}"

    def _runs_fused(self, *, masked: bool) -> bool:
        """Whether one loop over rows does what the layers' own calls would do."""
        if self.quant_grad_frac > 0 or self.mlps is not None or traced_transform():
            return False
        return all(
            layer._runs_fused(masked=masked, routed=False, moves=True)
            and not layer.directional_reparam
            and not layer.learnable_codebook
            and not layer.has_codebook_orthogonal_loss
            for layer in self.layers
        )

    def _fused_levels(
        self, inner: Tensor, mask: Tensor | None, levels: int, *, frozen: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        first = self.layers[0]
        rows = inner.reshape(1, -1, self.codebook_dim)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        moves = self.training and not frozen
        quantized, indices, commitments, inputs = residual_chain(
            [layer._codebook for layer in self.layers[:levels]],
            rows,
            None if mask is None else mask.flatten(),
            gradient=first._gradient if self.training and first.route_gradients_to_input else None,
            update=moves,
            keep_inputs=moves and self._replaces_shared_codes,
        )
        if self.training and first.has_commitment_loss:
            losses = commitments * first.commitment_weight
        else:
            losses = torch.zeros_like(commitments)
            if self.training:
                losses = losses + rows.reshape(-1)[:0].sum()  # 0, but part of the graph, as FastVQ's loss is
        places = inner.shape[:-1]
        return quantized.reshape(inner.shape), indices.reshape(levels, *places).movedim(0, -1), losses, inputs

    def _level_by_level(
        self,
        inner: Tensor,
        mask: Tensor | None,
        levels: int,
        *,
        targets: Tensor | None,
        beam_size: int | None,
        frozen: bool,
        sample_codebook_temp: float | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, list[Tensor]]:
        """Through the layers' own calls, which serve every option. Returns what `_fused_levels` does."""
        tokens = inner.reshape(inner.shape[0], -1, self.codebook_dim)
        mask = None if mask is None else mask.reshape(tokens.shape[:-1])
        options = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": frozen}
        if beam_size is not None:
            return self._search(tokens, mask, levels, beam_size, options, inner.shape[:-1])
        residual, total = tokens, torch.zeros_like(tokens)
        chosen, losses, inputs = [], [], []
        for level, layer in enumerate(self.layers[:levels]):
            inputs.append(residual.detach())
            target = None if targets is None else targets[..., level].reshape(tokens.shape[:-1])
            transform = self._code_transform(level, total)
            out = layer(residual, mask=mask, indices=target, codebook_transform_fn=transform, **options)
            quantized, losses = out[0], [*losses, out[-1]]
            if targets is None:
                chosen.append(out[1].reshape(inner.shape[:-1]))
            residual = residual - _scale_gradient(quantized, self.quant_grad_frac)
            total = total + quantized
        chosen = torch.stack(chosen, -1) if targets is None else None
        return total.reshape(inner.shape), chosen, torch.stack(losses), inputs

    def _search(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        levels: int,
        beam_size: int,
        options: Mapping[str, Any],
        places: torch.Size,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        beams = Beams(tokens)
        for level, layer in enumerate(self.layers[:levels]):
            beams.step(
                partial(layer, codebook_transform_fn=self._code_transform(level, beams.flat(beams.total)), **options),
                mask=mask,
                topk=beam_size,
                width=1 if level == levels - 1 else beam_size,
                weight=self._beam_score_weights[level],
                subtract=partial(_scale_gradient, share=self.quant_grad_frac),
            )
        quantized, indices, errors, inputs = beams.best()
        if mask is None:
            losses = errors.mean((0, 1))
        else:
            losses = torch.where(mask.unsqueeze(-1), errors, 0).sum((0, 1)) / mask.sum().clamp_min(1)
        if self.training and not options["freeze_codebook"]:
            for level, layer in enumerate(self.layers[:levels]):
                layer.update_indices(inputs[level], indices[..., level], mask=mask)
        shape = (*places, quantized.shape[-1])
        return quantized.reshape(shape), indices.reshape(*places, levels), losses, inputs

    def _code_transform(self, level: int, total: Tensor) -> Any:
        if self.mlps is None or level == 0:
            return None
        return partial(self.mlps[level - 1], condition=total)

    @property
    def _replaces_shared_codes(self) -> bool:
        return self.shared_codebook and self.layers[0]._codebook.has_dead_code_replacement

    def _move_shared_codebook(self, inputs: list[Tensor], mask: Tensor | None) -> None:
        first = self.layers[0]
        if first.ema_update:
            first._codebook.update_ema()
            first.update_in_place_optimizer()
        if self._replaces_shared_codes:
            rows = torch.cat([level.reshape(1, -1, self.codebook_dim) for level in inputs], 1)
            first._codebook.expire_codes_(rows, None if mask is None else mask.flatten().repeat(len(inputs)))

    def _targets(self, indices: Tensor | Sequence[Tensor], tokens: Tensor) -> Tensor:
        if isinstance(indices, (tuple, list)):
            indices = torch.stack([as_indices(level) for level in indices], -1)
        indices = as_indices(indices)
        expected = (*tokens.shape[:-1], self.num_quantizers)
        if indices.shape != expected:
            raise ValueError(f"indices must be int64 {expected}, got {indices.dtype} {tuple(indices.shape)}")
        return indices

    def _levels_kept(self, seed: int | None, device: torch.device) -> int:
        seed = draw_dropout_seed(device) if seed is None else seed
        last = _last_level(operator.index(seed), self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(self.num_quantizers, math.ceil((last + 1) / multiple) * multiple)


class FastGroupedResidualVQ(nn.Module):
    """Split vectors into groups, each with a residual quantizer of its own; a drop-in for ``GroupedResidualVQ``.

    dim, groups: width of the vectors and number of groups it splits into. accept_image_fmap: x is [B, dim, H, W].
    kwargs: arguments of ``FastResidualVQ``. Source: arXiv 2305.02765. Raises ValueError if groups do not divide dim.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups must divide dim={dim}, got {groups}")
        self.dim, self.groups, self.accept_image_fmap = dim, groups, accept_image_fmap
        self.rvqs = nn.ModuleList(
            FastResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **kwargs) for _ in range(groups)
        )

    @property
    def codebooks(self) -> Tensor:
        """The codes [groups, L, K, D]; levels must be of one size."""
        return torch.stack(tuple(rvq.codebooks for rvq in self.rvqs))

    @property
    def split_dim(self) -> int:
        return 1 if self.accept_image_fmap else -1

    @repeatable
    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """As ``FastResidualVQ.forward``; groups drop the same levels.

        Returns (quantized like x, indices [groups, B, ..., L], losses [groups, L]), and with return_all_codes a tuple
        of codes, one a group. With ``indices`` [groups, B, ..., L]: (quantized, sum of cross-entropies).
        """
        check_is_tensor(x, "x")
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels in dimension {self.split_dim}, got {tuple(x.shape)}")
        if indices is not None and len(indices) != self.groups:
            raise ValueError(f"indices must have {self.groups} groups first, got {len(indices)}")
        seed = draw_dropout_seed(x.device) if self.training and self.rvqs[0].quantize_dropout else None
        outputs = [
            rvq(
                part,
                mask=mask,
                indices=target,
                return_all_codes=return_all_codes,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part, target in zip(
                self.rvqs,
                x.chunk(self.groups, self.split_dim),
                [None] * self.groups if indices is None else indices,
                strict=True,
            )
        ]
        quantized, *rest = zip(*outputs, strict=True)
        quantized = torch.cat(quantized, self.split_dim)
        if indices is not None:
            return quantized, torch.stack(rest[0]).sum()
        chosen, losses, *codes = rest
        return quantized, torch.stack(chosen), torch.stack(losses), *codes

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes [groups, L, B, ..., D] of ``indices`` [groups, B, ..., l]."""
        return torch.stack([rvq.get_codes_from_indices(part) for rvq, part in zip(self.rvqs, indices, strict=True)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What ``forward`` returns in eval mode as quantized for ``indices`` that it returned."""
        parts = [rvq.get_output_from_indices(part) for rvq, part in zip(self.rvqs, indices, strict=True)]
        return torch.cat(parts, self.split_dim)


def _last_level(seed: int, first: int, levels: int) -> int:
    return random.Random(seed).randrange(first, levels)


# A compiled graph is for one number of levels and is guarded by the seed. This is all that
# torch.compiler.assume_constant_result does, which would import torch._dynamo for everyone.
_last_level._dynamo_marked_constant = True


def draw_dropout_seed(device: torch.device) -> int:
    """A seed from torch's generator of the CPU, the same on every rank; of ``device`` only where ranks must agree."""
    seed = torch.randint(0, 10_000, ())
    if world_size() > 1:
        seed = sum_over_ranks(seed.to(device), sync=True)
    return int(seed)


def _codebook_sizes(codebook_size: int | Sequence[int], num_quantizers: int | None) -> tuple[int, ...]:
    if isinstance(codebook_size, int):
        if num_quantizers is None or num_quantizers < 1:
            raise ValueError(f"num_quantizers must be at least 1 for one codebook_size, got {num_quantizers}")
        return (codebook_size,) * num_quantizers
    sizes = tuple(codebook_size)
    if not sizes or num_quantizers not in (None, len(sizes)):
        raise ValueError(f"codebook_size must be a number or {num_quantizers} numbers, got {sizes}")
    return sizes


def _scale_gradient(x: Tensor, share: float) -> Tensor:
    """``x`` in value, with this share of its gradient."""
    if share <= 0:
        return x.detach()
    return x if share == 1 else share * x + (1 - share) * x.detach()
