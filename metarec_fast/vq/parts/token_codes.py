"""Codes that differ from row to row, made by a function of the codebook: their scores in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from metarec_fast.ops.exact_costs import exact_costs
from metarec_fast.ops.portable_lookup import stable_order
from metarec_fast.vq.parts.code_scores import entropy, gumbel_noise, score_cross_entropy

_PAIRWISE_EPS = 1e-6  # added to each difference, as torch.nn.functional.pairwise_distance does


class TokenCodes:
    """What ``CodeScores`` does, for codes [H, N, K, D] that are materialised."""

    def __init__(self, rows: Tensor, codes: Tensor, *, cosine: bool) -> None:
        self.codes = F.normalize(codes, dim=-1, eps=1e-6) if cosine else codes
        self.rows, self.cosine = rows, cosine
        if cosine:
            self.scores = (rows.unsqueeze(-2) * self.codes).sum(-1)
        else:
            self.scores = -torch.linalg.vector_norm(rows.unsqueeze(-2) - self.codes + _PAIRWISE_EPS, dim=-1)

    def _exact_scores(self) -> Tensor:
        """What decides the nearest: products as the lookup's definition has them, the distances of `scores`."""
        if not self.cosine:
            return self.scores.detach()
        rows, codes = self.rows.detach().flatten(0, 1).unsqueeze(1), self.codes.detach().flatten(0, 1)
        return -exact_costs(rows, codes, "product").view(self.scores.shape)

    def gather(self, indices: Tensor) -> Tensor:
        at = indices.unsqueeze(-1) if indices.dim() == 2 else indices
        chosen = self.codes.gather(2, at.unsqueeze(-1).expand(*at.shape, self.codes.shape[-1]))
        return chosen if indices.dim() == 3 else chosen.squeeze(2)

    def nearest(self) -> Tensor:
        return self._exact_scores().argmax(-1)

    def sample(self, temperature: float) -> Tensor:
        scores = self.scores.detach()
        return (scores / temperature + gumbel_noise(scores)).argmax(-1)

    def topk(self, k: int, temperature: float | None = None) -> Tensor:
        scores = self._exact_scores()
        if temperature is not None:
            scores = self.scores.detach()
            scores = scores / temperature + gumbel_noise(scores)
        return stable_order(-scores)[..., :k]

    def cross_entropy(self, targets: Tensor) -> Tensor:
        return score_cross_entropy(self.scores, targets)

    def entropy(self, temperature: float, by_position: Callable[[Tensor], Tensor], keep: Tensor | None) -> Tensor:
        share = by_position((self.scores * temperature).softmax(-1))
        weight = share.new_ones(share.shape[1:3]) if keep is None else keep.to(share.dtype)
        number = (share.shape[0] * weight.sum(-1, keepdim=True)).clamp_min(1)
        return entropy((share * weight.unsqueeze(-1)).sum((0, 2)) / number)

    def straight_through(self, indices: Tensor, temperature: float) -> Tensor:
        share = (self.scores / temperature).softmax(-1)
        return self.gather(indices) + ((share - share.detach()).unsqueeze(-1) * self.codes).sum(-2)


def transformed_codes(
    transform: Callable[[Tensor], Tensor], codes: Tensor, *, rows: int, positions: int, heads_in_batch: int
) -> Tensor:
    """``transform`` of codes [H, K, D], for each row: [H, rows, K, D].

    The function returns [H, B, N, K, D], with B the batch, times the heads if they share a codebook, and N
    the positions of an item.
    Raises ValueError for another shape.
    """
    H, K, D = codes.shape
    made = transform(codes.clone())  # a copy: the codes change in place before backward
    if made.dim() != 5 or made.shape[0] != H or made.shape[1] * made.shape[2] != rows or made.shape[3:] != (K, D):
        raise ValueError(
            f"codebook_transform_fn must return [{H}, B, N, {K}, {D}] with B * N = {rows}, got {tuple(made.shape)}"
        )
    if heads_in_batch > 1:
        # the heads of a token lie side by side in the rows
        made = made.reshape(H, -1, heads_in_batch, positions, K, D).transpose(2, 3)
    return made.reshape(H, rows, K, D)
