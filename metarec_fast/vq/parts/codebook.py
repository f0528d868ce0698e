"""The codes and what moves them: moving averages, k-means initialisation, replacement of dead codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from metarec_fast.ops import vq_ema_update_
from metarec_fast.ops.codebook_checks import Metric
from metarec_fast.ops.portable_lookup import leaves_python
from metarec_fast.ops.register import transformed
from metarec_fast.ops.vq_commit import Health as LookupHealth
from metarec_fast.vq.parts.health import Health
from metarec_fast.vq.parts.kmeans import init_by_kmeans_, statistics, traced_init_by_kmeans_
from metarec_fast.vq.parts.projection import project
from metarec_fast.vq.parts.recomputation import before_moving
from metarec_fast.vq.parts.sampling import draw_rows, sum_over_ranks, world_size

COSINE_EPS = 1e-6
_UNUSED_BELOW = 100  # times eps: the cluster size below which the smoothing would shrink a code to the origin

EmaWeight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


_HOST_STATE = ("_seen_initialised", "_was_initialised", "_ranks_agreed")


class Codebook(nn.Module):
    """H codebooks of K codes of width D, with the names that a VectorQuantize checkpoint has.

    embed: [H, K, D], a buffer, or a Parameter if ``as_parameter``. embed_avg: [H, K, D] and cluster_size: [H, K],
    moving averages of the sum and number of rows per code. initted: bool, False until k-means has run; its
    value alone decides, whatever wrote it. A compiled program cannot branch on it: it checks at
    every call, unless it was compiled when the value was True.
    All stay float32, whatever dtype the module is built under, cast to or loaded from: an average with 8 bits of
    mantissa stops moving.
    freezes_unused: do not move a code that has been out of use so long that the smoothing by ``eps`` would shrink it
    to the origin. bridge: a module from codes to the codes that rows are compared with.
    """

    _seen_initialised: tuple[Tensor, int, int] | None = None  # `initted`, its version and place when it was True
    _was_initialised: bool = False  # when last looked at, for programs that cannot look
    _ranks_agreed: bool = False

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
        freezes_unused: bool = True,
        bridge: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.decay, self.eps = decay, eps
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.use_cosine_sim = use_cosine_sim
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.sync = sync
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.freezes_unused = freezes_unused

        embed = torch.zeros(num_codebooks, codebook_size, dim, dtype=torch.float32)
        if not kmeans_init:
            embed = self.transform_input(nn.init.kaiming_uniform_(embed))
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size, dtype=torch.float32))
        self.register_buffer("embed_avg", embed.clone())
        if as_parameter:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.vq_bridge = bridge
        self.health = Health(num_codebooks, codebook_size)
        self.kmeans_init = kmeans_init
        self._was_initialised = not kmeans_init

    def transform_input(self, x: Tensor) -> Tensor:
        """Rows as they are compared with the codes: of length 1 for cosine similarity, else as they are."""
        return F.normalize(x, dim=-1, eps=COSINE_EPS) if self.use_cosine_sim else x

    @property
    def metric(self) -> Metric:
        """What makes a code the nearest: for cosine similarity the largest product, whatever the codes' lengths."""
        return "product" if self.use_cosine_sim else "distance"

    @property
    def has_dead_code_replacement(self) -> bool:
        return self.threshold_ema_dead_code > 0

    @property
    def moves_in_place(self) -> bool:
        """Whether calls write to the codes, outside of any optimizer."""
        return self.ema_update or self.has_dead_code_replacement

    def codes_for(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        """The codes [H, K, D] that rows [H, N, D] are compared with. keep: bool [N], rows that count."""
        if self.vq_bridge is None:
            return self.embed
        # a copy: the bridge's graph must not see the codes change in place
        return project(self.vq_bridge, self.embed.clone()).to(self.embed.dtype)

    def codes_now(self) -> Tensor:
        """``codes_for`` the rows seen so far."""
        return self.embed if self.vq_bridge is None else project(self.vq_bridge, self.embed).to(self.embed.dtype)

    @property
    def compares_other_codes(self) -> bool:
        """Whether rows are compared with anything but ``embed`` itself."""
        return self.vq_bridge is not None

    def rows_to_average(self, rows: Tensor) -> Tensor:
        """Rows as the averages take them in: where the codes are."""
        return rows

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
        lookup: LookupHealth | None = None,
    ) -> None:
        """Move the averages by one batch, then the codes, then replace dead codes.

        rows: [H, N, D]. indices: int64 [H, N], -1 for a row to skip. keep: bool [N], None for all.
        Rows that are not finite are skipped. Raises RuntimeError under torch.vmap. ema_update: overrides the module's.
        weight: [K] or [H, K], or a function of (sums, counts) that returns it; scales how far each code moves.
        accumulate: only add the batch to the ``grad`` of the averages; the next update takes it in.
        lookup: by-products of finding ``indices``, for ``health``.
        """
        _check_not_batched(rows)
        ema_update = self.ema_update if ema_update is None else ema_update
        moves = ema_update or self.has_dead_code_replacement
        if moves:
            self._before_moving()
        if lookup is not None:
            self.health.record_lookup(lookup, indices.numel(), moves=moves)
        if keep is not None:
            indices = indices.masked_fill(~keep, -1)
        if not moves:
            self.health.record(_counts(indices, self.codebook_size), self.dead_codes(), moves=False)
            return
        counts, sums = statistics(self.rows_to_average(rows), indices, self.codebook_size, sync=self._syncs)
        if callable(weight):
            weight = weight(sums, counts)
        if weight is not None:
            weight = weight.to(counts).expand_as(counts)
        if accumulate:
            _add_to_grad(self.cluster_size, counts)
            _add_to_grad(self.embed_avg, sums)
            self.health.record(counts, self.dead_codes(), moves=True)
            return
        counts, sums = _take_grad(self.cluster_size, counts), _take_grad(self.embed_avg, sums)
        if self.freezes_unused:
            moves = (counts > 0) | (self.cluster_size >= _UNUSED_BELOW * self.eps)
            weight = moves if weight is None else weight * moves
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
        self.health.record(counts, self.dead_codes(), moves=True)
        self._replace_dead_codes(rows, keep)

    def dead_codes(self) -> Tensor:
        """Codes out of use, bool [H, K]: below the threshold for replacement, or so long that they are frozen."""
        return self.cluster_size < max(self.threshold_ema_dead_code, _UNUSED_BELOW * self.eps)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to the averages: each sum over its count, counts smoothed by ``eps``."""
        self._before_moving()
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
        self._before_moving()
        dead = self.cluster_size < self.threshold_ema_dead_code
        if dead.device.type == "cpu" and not self._syncs and not torch.compiler.is_compiling() and not dead.any():
            return  # free on a CPU; elsewhere it would stall the device, and an empty draw is cheap
        drawn, replaced = draw_rows(rows.float(), self.rows_for_codes(rows, keep), dead, sync=self._syncs)
        drawn, replaced = self.transform_input(drawn), replaced.unsqueeze(-1)
        self.embed.copy_(torch.where(replaced, drawn, self.embed))
        self.embed_avg.copy_(torch.where(replaced, drawn * self.threshold_ema_dead_code, self.embed_avg))
        self.cluster_size.masked_fill_(replaced.squeeze(-1), self.threshold_ema_dead_code)

    def ensure_init_(self, rows: Tensor, keep: Tensor | None) -> None:
        """To be called before a lookup of ``rows`` [H, N, D]: initialises the codes by k-means if ``initted`` is False.

        keep: bool [N], rows that count. With several ranks the first training call also makes them agree.
        """
        if torch.compiler.is_compiling():
            if not self._was_initialised or self._ranks_have_to_agree:
                self.init_kmeans_(rows, keep)
            return
        self._keep_float32()
        initialised = self._is_initialised()
        if initialised != self._was_initialised:
            self._was_initialised = initialised
        if not initialised or self._ranks_have_to_agree:
            self.init_kmeans_(rows, keep)

    @property
    def _ranks_have_to_agree(self) -> bool:
        # Decided by what is the same on every rank, not by `initted`; in eval a rank may run alone: no collective.
        return self.kmeans_init and not self._ranks_agreed and self.training and self.sync_kmeans and self._syncs

    def _is_initialised(self) -> bool:
        """The value of ``initted``; off the CPU read once, and again only after something wrote it."""
        initted, seen = self.initted, self._seen_initialised
        while torch._C._functorch.is_functorch_wrapped_tensor(initted):
            initted = torch._C._functorch.get_unwrapped(initted)
        if initted.is_meta or isinstance(initted, FakeTensor):
            return self._was_initialised  # there is no value
        if self._was_initialised and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return True
        stalls = initted.device.type != "cpu" and not initted.is_inference()
        if stalls and seen is not None and seen[0] is initted and seen[1:] == (initted._version, initted.data_ptr()):
            return True
        initialised = bool(initted.all())
        if stalls:
            self._seen_initialised = (initted, initted._version, initted.data_ptr()) if initialised else None
        return initialised

    @torch.no_grad()
    def init_kmeans_(self, rows: Tensor, keep: Tensor | None = None) -> None:
        """Set the codes to the k-means centres of ``rows`` [H, N, D], unless ``initted``.

        Does nothing for a batch without valid rows. Ranks that have codes already send them to the others.
        """
        if leaves_python():
            raise RuntimeError(
                "a codebook that k-means has not initialised yet cannot be traced or exported; "
                "train the model, load its weights, or call it once on data first"
            )
        _check_not_batched(rows)
        self._before_moving()
        state = (self.embed.detach(), self.embed_avg, self.cluster_size, self.initted)
        rows, valid = rows.detach().float(), self.rows_for_codes(rows, keep)
        sync = self._syncs and self.sync_kmeans
        if torch.compiler.is_compiling() or transformed():  # which let an operator alone write to buffers
            traced_init_by_kmeans_(*state, rows, valid, self.kmeans_iters, self.eps, self.use_cosine_sim, sync)
        elif not init_by_kmeans_(
            *state, rows, valid, iterations=self.kmeans_iters, eps=self.eps, cosine=self.use_cosine_sim, sync=sync
        ):
            return
        self._was_initialised = True
        self._ranks_agreed = self._ranks_agreed or sync

    @torch.no_grad()
    def average_grads(self) -> None:
        """Replace the gradients of the parameters by their mean over ranks, where ranks share the codebook."""
        if self._syncs:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    sum_over_ranks(parameter.grad, sync=True).div_(world_size())

    @staticmethod
    def valid_rows(rows: Tensor, keep: Tensor | None) -> Tensor:
        """Rows that are kept and finite, bool [H, N]."""
        # one NaN or infinity makes the sum of a row NaN or infinite
        finite = rows.sum(-1).isfinite()
        return finite if keep is None else finite & keep

    def rows_for_codes(self, rows: Tensor, keep: Tensor | None) -> Tensor:
        """Valid rows that may become codes, bool [H, N]: for cosine similarity those that have a direction."""
        valid = self.valid_rows(rows, keep)
        return valid & (torch.linalg.vector_norm(rows, dim=-1) >= COSINE_EPS) if self.use_cosine_sim else valid

    def _before_moving(self) -> None:
        if not torch.compiler.is_compiling():
            before_moving(self)

    def host_state(self) -> dict[str, Any]:
        """Attributes that cache what the host has read of the tensors and of other ranks."""
        return {name: getattr(self, name) for name in _HOST_STATE}

    def set_host_state(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def _syncs(self) -> bool:
        return self.sync is not False and world_size() > 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_float32, recurse)
        self._was_initialised = self._is_initialised()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        embed = self._parameters.get("embed")
        if embed is not None and embed.dtype != torch.float32:
            # not in place: the tensor may be the caller's own
            self.embed = nn.Parameter(embed.detach().float(), requires_grad=embed.requires_grad)
        self._keep_float32()
        self._was_initialised = self._is_initialised()

    def _keep_float32(self) -> None:
        """Cast buffers that were set in another dtype, and move the health, which no checkpoint has, to the codes."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype != torch.float32 and buffer.is_floating_point():
                setattr(self, name, buffer.float())
        if self.health.counts.device != self.embed.device:
            self.health.reset(self.embed.device)

    def __getstate__(self) -> dict[str, Any]:
        # caches of this module's tensors and ranks are not valid for a copy
        return {name: value for name, value in self.__dict__.items() if name not in _HOST_STATE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._was_initialised = self._is_initialised()


def _counts(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code is chosen, float32 [H, K], of indices [H, ...]; -1 is nothing."""
    at = indices.flatten(1) + 1
    counts = torch.zeros(at.shape[0], codebook_size + 1, dtype=torch.float32, device=at.device)
    return counts.scatter_add(1, at, torch.ones_like(at, dtype=counts.dtype))[:, 1:]


def _check_not_batched(rows: Tensor) -> None:
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        return
    while functorch.is_functorch_wrapped_tensor(rows):
        if functorch.is_batchedtensor(rows):
            raise RuntimeError(
                "under torch.vmap a codebook cannot move, one for the whole batch: call with freeze_codebook=True"
            )
        rows = functorch.get_unwrapped(rows)


def _add_to_grad(buffer: Tensor, value: Tensor) -> None:
    buffer.grad = value if buffer.grad is None else buffer.grad + value


def _take_grad(buffer: Tensor, value: Tensor) -> Tensor:
    if buffer.grad is None:
        return value
    grad, buffer.grad = buffer.grad, None
    return value + grad
