"""How well a codebook is used, from what a training pass computes anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metarec_fast.ops._register import define


class CodebookHealth(NamedTuple):
    """Of the last training pass, one number each; a mean over codebooks if there are several.

    usage: share of the codes that a row chose. perplexity: exp of the entropy of the choices, K if all are chosen
    alike. dead_codes: number of codes that have fallen out of use, by their ``cluster_size``.
    """

    usage: float
    perplexity: float
    dead_codes: float


def _run(usage: Tensor, perplexity: Tensor, dead_codes: Tensor, counts: Tensor, dead: Tensor) -> None:
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    usage.copy_((counts > 0).sum(-1) / counts.shape[-1])
    perplexity.copy_(torch.special.entr(share).sum(-1).exp())
    dead_codes.copy_(dead.sum(-1))


# an operator: transforms of torch.func let it write to buffers, as they do for the averages
_record_ = define(
    "vq_record_health_(Tensor(a!) usage, Tensor(b!) perplexity, Tensor(c!) dead_codes, Tensor counts, Tensor dead) "
    "-> ()",
    cpu=_run,
    cuda=_run,
    fake=lambda *args: None,
)


class Health(nn.Module):
    """Buffers that no checkpoint holds, [H] each; written on the device that computes, read by the host on demand."""

    def __init__(self, num_codebooks: int) -> None:
        super().__init__()
        for name in CodebookHealth._fields:
            self.register_buffer(name, torch.zeros(num_codebooks), persistent=False)

    def record(self, counts: Tensor, dead: Tensor) -> None:
        """Take in one pass. counts: [H, K], how often each code was chosen. dead: bool [H, K].

        This is the one place for what else a pass finds out, such as margins and rechecked rows.
        """
        _record_(self.usage, self.perplexity, self.dead_codes, counts, dead)

    def stats(self) -> CodebookHealth:
        """The buffers as floats; waits for the device."""
        values = torch.stack([getattr(self, name).mean() for name in CodebookHealth._fields])
        return CodebookHealth(*values.tolist())
