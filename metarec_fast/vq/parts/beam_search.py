"""Several candidates for the codes of each vector, through the levels of a residual quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Beams:
    """Up to J candidates of each token. residual, total: [B, N, J, D]; scores: [B, N, J], minus the weighted errors.

    indices, errors: a level each, [B, N, J]. inputs: each level's input, [B, N, J, D].
    """

    def __init__(self, tokens: Tensor) -> None:
        self.residual = tokens.unsqueeze(2)
        self.total = torch.zeros_like(self.residual)
        self.scores = tokens.new_zeros((*tokens.shape[:2], 1))
        self.indices: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.inputs: list[Tensor] = []

    @staticmethod
    def flat(beams: Tensor) -> Tensor:
        """Candidates as tokens: [B, N, J, D] to [B, N * J, D]."""
        return beams.flatten(1, 2)

    def step(
        self,
        quantize: Callable[..., tuple[Tensor, Tensor, Tensor]],
        *,
        mask: Tensor | None,
        topk: int,
        width: int,
        weight: float,
        subtract: Callable[[Tensor], Tensor],
    ) -> None:
        """Extend each candidate by its ``topk`` best codes of ``quantize``, and keep the ``width`` best of all.

        mask: bool [B, N]. weight: of this level's error in the score. subtract: from codes to what the residual loses.
        """
        B, N, J, D = self.residual.shape
        of_beams = None if mask is None else mask.unsqueeze(-1).expand(B, N, J).flatten(1)
        codes, indices, errors = quantize(self.flat(self.residual), mask=of_beams, topk=topk)
        k = indices.shape[-1]
        codes = codes.reshape(B, N, J * k, D)
        indices, errors = (t.reshape(B, N, J * k) for t in (indices, errors))
        scores = (self.scores.unsqueeze(-1) - weight * errors.view(B, N, J, k)).flatten(2)
        if J * k > width:
            scores, kept = scores.topk(width, dim=-1)
        else:
            kept = torch.arange(J * k, device=scores.device).expand(B, N, J * k)
        parent = kept // k
        codes = _select(codes, kept)
        self.scores = scores
        self.inputs = [_select(t, parent) for t in (*self.inputs, self.residual)]
        self.indices = [*(t.gather(2, parent) for t in self.indices), indices.gather(2, kept)]
        self.errors = [*(t.gather(2, parent) for t in self.errors), errors.gather(2, kept)]
        self.residual = self.inputs[-1] - subtract(codes)
        self.total = _select(self.total, parent) + codes

    def best(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The first candidate: total [B, N, D], indices and errors [B, N, L], and the levels' inputs [B, N, D]."""
        indices, errors = (torch.stack([t[:, :, 0] for t in ts], -1) for ts in (self.indices, self.errors))
        return self.total[:, :, 0], indices, errors, [t[:, :, 0].detach() for t in self.inputs]


def _select(beams: Tensor, at: Tensor) -> Tensor:
    """[B, N, J, D] at candidates [B, N, J'] to [B, N, J', D]."""
    return beams.gather(2, at.unsqueeze(-1).expand(*at.shape, beams.shape[-1]))
