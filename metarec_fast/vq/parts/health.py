"""How well a codebook is used, from what a training pass computes anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarec_fast.ops.register import define
from metarec_fast.ops.vq_commit import Health as LookupHealth
from metarec_fast.vq.parts.recomputation import check_may_move, check_not_compiled_in_checkpoint


class CodebookHealth(NamedTuple):
    """Of the last training pass, one number each; a mean over codebooks if there are several.

    usage: share of the codes that a row chose. perplexity: exp of the entropy of the choices, K if all are chosen
    alike. dead_codes: number of codes that have fallen out of use, by their ``cluster_size``.
    margin: how much farther the second nearest code is, in squared distance, the mean over every 64th row.
    recheck_rate: share of rows that took more than the first pass over the codes to decide; near ties cost time.
    These two are of the fused step alone (docs/reference/options.md), NaN before one.
    """

    usage: float
    perplexity: float
    dead_codes: float
    margin: float
    recheck_rate: float


def _run(first: Tensor, second: Tensor, new_first: Tensor, new_second: Tensor, moves: bool) -> None:
    if moves:
        check_may_move()  # here too, as compiled code passes nowhere else
    first.copy_(new_first)
    second.copy_(new_second)


def _fake(first: Tensor, second: Tensor, new_first: Tensor, new_second: Tensor, moves: bool) -> None:
    if moves:
        check_not_compiled_in_checkpoint()


# an operator: transforms of torch.func let it write to buffers, as they do for the averages
_record_ = define(
    "vq_record_health_(Tensor(a!) first, Tensor(b!) second, Tensor new_first, Tensor new_second, bool moves) -> ()",
    cpu=_run,
    cuda=_run,
    fake=_fake,
)


class Health(nn.Module):
    """Statistics of the last training pass, in buffers that are in no checkpoint; summarised on demand.

    counts: float32 [H, K], how often each code was chosen. dead: bool [H, K], codes out of use. margin: float32 [H] and
    recheck_rate: float32 [], see CodebookHealth.
    ``usage``, ``perplexity`` and ``dead_codes`` are tensors [H], computed without waiting for the device.
    """

    def __init__(self, num_codebooks: int, codebook_size: int) -> None:
        super().__init__()
        for name, shape, dtype in (
            ("counts", (num_codebooks, codebook_size), torch.float32),
            ("dead", (num_codebooks, codebook_size), torch.bool),
            ("margin", (num_codebooks,), torch.float32),
            ("recheck_rate", (), torch.float32),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype), persistent=False)
        self.reset()

    def reset(self, device: torch.device | None = None) -> None:
        """Clear the statistics. device: the buffers' new device, None: the present one."""
        for name, value in (("counts", 0), ("dead", False), ("margin", torch.nan), ("recheck_rate", torch.nan)):
            setattr(self, name, torch.full_like(getattr(self, name), value, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Health:
        was_meta = self.counts.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.counts.is_meta:
            self.reset()  # to_empty leaves them uninitialised
        return self

    def record(self, counts: Tensor, dead: Tensor, *, moves: bool) -> None:
        """Store the statistics of one pass. moves: whether that pass moves the codes."""
        _record_(self.counts, self.dead, counts, dead, moves)

    def record_lookup(self, lookup: LookupHealth, rows: int, *, moves: bool) -> None:
        """Add the by-products of a lookup of ``rows`` rows, over all codebooks. moves: the codes move next."""
        _record_(self.margin, self.recheck_rate, lookup.margin, lookup.rechecked / max(1, rows), moves)

    @property
    def usage(self) -> Tensor:
        return (self.counts > 0).float().mean(-1)

    @property
    def perplexity(self) -> Tensor:
        share = self.counts / self.counts.sum(-1, keepdim=True).clamp_min(1)
        return torch.special.entr(share).sum(-1).exp()

    @property
    def dead_codes(self) -> Tensor:
        return self.dead.sum(-1)

    def stats(self) -> CodebookHealth:
        """The sums as floats; waits for the device."""
        return CodebookHealth(
            *torch.stack([getattr(self, name).float().mean() for name in CodebookHealth._fields]).tolist()
        )
