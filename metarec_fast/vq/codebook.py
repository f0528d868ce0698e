"""The codes and what moves them: moving averages, the k-means start, replacement of dead codes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metarec_fast.ops import nearest_codeword, vq_ema_update_, vq_statistics
from metarec_fast.vq.sampling import draw_rows, sum_over_ranks, world_size

_COSINE_EPS = 1e-6

EmaWeight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Codebook(nn.Module):
    """H codebooks of K codes of width D, with the names that a VectorQuantize checkpoint has.

    embed: [H, K, D], a buffer, or a Parameter if ``as_parameter``. embed_avg: [H, K, D] and cluster_size: [H, K],
    moving averages of the sum and number of rows per code. initted: bool, False until k-means has run.
    All stay float32 whatever the module is cast to: an average with 8 bits of mantissa stops moving.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int = 1,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        sync: bool | None = None,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        as_parameter: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.decay, self.eps = decay, eps
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.use_cosine_sim = use_cosine_sim
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.sync = sync
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update

        if kmeans_init:
            embed = torch.zeros(num_codebooks, codebook_size, dim)
        else:
            embed = self.transform_input(nn.init.kaiming_uniform_(torch.empty(num_codebooks, codebook_size, dim)))
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if as_parameter:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.needs_kmeans = kmeans_init  # `initted` for the host: no forward reads the device to learn it

    def transform_input(self, x: Tensor) -> Tensor:
        """Rows as they are compared with the codes: of length 1 for cosine similarity, else as they are."""
        return F.normalize(x, dim=-1, eps=_COSINE_EPS) if self.use_cosine_sim else x

    @property
    def has_dead_code_replacement(self) -> bool:
        return self.threshold_ema_dead_code > 0

    @torch.no_grad()
    def update(
        self,
        rows: Tensor,
        indices: Tensor,
        *,
        keep: Tensor | None = None,
        ema_update: bool | None = None,
        weight: EmaWeight = None,
        accumulate: bool = False,
    ) -> None:
        """Move the averages by one batch, then the codes, then replace dead codes.

        rows: [H, N, D]. indices: int64 [H, N], -1 for a row to skip. keep: bool [N], None for all.
        Rows that are not finite are skipped. ema_update: overrides the module's.
        weight: [K] or [H, K], or a function of (sums, counts) that returns it; scales how far each code moves.
        accumulate: only add the batch to the ``grad`` of the averages; the next update takes it in.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not ema_update and not self.has_dead_code_replacement:
            return
        if keep is not None:
            indices = indices.masked_fill(~keep, -1)
        counts, sums = self._statistics(rows, indices, sync=self._syncs)
        if callable(weight):
            weight = weight(sums, counts)
        if weight is not None:
            weight = weight.to(counts).expand_as(counts)
        if accumulate:
            _add_to_grad(self.cluster_size, counts)
            _add_to_grad(self.embed_avg, sums)
            return
        counts, sums = _take_grad(self.cluster_size, counts), _take_grad(self.embed_avg, sums)
        moves_codes = ema_update and not self.manual_ema_update
        vq_ema_update_(
            self.cluster_size,
            self.embed_avg,
            self.embed if moves_codes else torch.empty_like(self.embed),
            counts,
            sums,
            decay=self.decay,
            eps=self.eps,
            weight=weight,
            normalize=self.use_cosine_sim,
        )
        self._replace_dead_codes(rows, keep)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to the averages: each sum over its count, counts smoothed by ``eps``."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.embed.copy_(self.transform_input(self.embed_avg / smoothed.unsqueeze(-1)))

    @torch.no_grad()
    def expire_codes_(self, rows: Tensor, seq_mask: Tensor | None = None) -> None:
        """In training, replace codes whose ``cluster_size`` is below the threshold by rows of the batch.

        rows: [..., D], or [H, ..., D] with H codebooks. seq_mask: bool [N] or [H, N], rows to choose from.
        """
        self._replace_dead_codes(rows.reshape(self.num_codebooks, -1, rows.shape[-1]), seq_mask)

    def _replace_dead_codes(self, rows: Tensor, keep: Tensor | None) -> None:
        if not self.training or not self.has_dead_code_replacement:
            return
        dead = self.cluster_size < self.threshold_ema_dead_code
        if dead.device.type == "cpu" and not self._syncs and not torch.compiler.is_compiling() and not dead.any():
            return  # on a CPU the question is free; elsewhere it would stall the device, and an empty draw is cheap
        drawn, replaced = draw_rows(rows.float(), _valid_rows(rows, keep), dead, sync=self._syncs)
        drawn, replaced = self.transform_input(drawn), replaced.unsqueeze(-1)
        self.embed.copy_(torch.where(replaced, drawn, self.embed))
        self.embed_avg.copy_(torch.where(replaced, drawn * self.threshold_ema_dead_code, self.embed_avg))
        self.cluster_size.masked_fill_(replaced.squeeze(-1), self.threshold_ema_dead_code)

    @torch.no_grad()
    def init_kmeans_(self, rows: Tensor, keep: Tensor | None = None) -> None:
        """Start the codes at the k-means centres of ``rows`` [H, N, D]; waits for a batch that has valid rows."""
        rows, valid = rows.float(), _valid_rows(rows, keep)
        sync = self._syncs and self.sync_kmeans
        num_rows = int(sum_over_ranks(valid.sum(-1).amin(), sync=sync))
        if num_rows == 0:
            return
        if num_rows < self.codebook_size:
            warnings.warn(
                f"k-means starts {self.codebook_size} codes from {num_rows} rows: some codes start equal", stacklevel=3
            )
        rows = torch.where(valid.unsqueeze(-1), rows, 0)
        means, _ = draw_rows(rows, valid, torch.ones_like(self.cluster_size, dtype=torch.bool), sync=sync)
        for _ in range(self.kmeans_iters):
            indices = nearest_codeword(rows, means, with_margin=False).indices
            counts, sums = self._statistics(rows, indices.masked_fill(~valid, -1), sync=sync)
            centres = self.transform_input(sums / counts.clamp_min(1).unsqueeze(-1))
            means = torch.where((counts > 0).unsqueeze(-1), centres, means)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(means * counts.unsqueeze(-1))
        self.update_ema()
        self.initted.fill_(True)
        self.needs_kmeans = False

    @property
    def _syncs(self) -> bool:
        return self.sync is not False and world_size() > 1

    def _statistics(self, rows: Tensor, indices: Tensor, *, sync: bool) -> tuple[Tensor, Tensor]:
        counts, sums = vq_statistics(rows.float(), indices, self.codebook_size)
        if sync:
            packed = sum_over_ranks(torch.cat((sums, counts.unsqueeze(-1)), -1), sync=True)
            sums, counts = packed[..., :-1].contiguous(), packed[..., -1].contiguous()
        return counts, sums

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.initted.is_meta:
            self.needs_kmeans = not bool(self.initted)


def _valid_rows(rows: Tensor, keep: Tensor | None) -> Tensor:
    # one NaN or infinity makes the sum of a row NaN or infinite
    finite = rows.sum(-1).isfinite()
    return finite if keep is None else finite & keep


def _add_to_grad(buffer: Tensor, value: Tensor) -> None:
    buffer.grad = value if buffer.grad is None else buffer.grad + value


def _take_grad(buffer: Tensor, value: Tensor) -> Tensor:
    if buffer.grad is None:
        return value
    grad, buffer.grad = buffer.grad, None
    return value + grad
