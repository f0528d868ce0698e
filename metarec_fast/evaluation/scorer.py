"""Protocol of what can be evaluated (a model, a baseline, a mixture): scores of consecutive items of the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metarec_fast.data.domain import Sequences
from metarec_fast.evaluation.linear_scores import LinearScores

ScoreTile = Callable[[int, int], Tensor]
"""``score_tile(begin, end) -> [B, end - begin]``: float32 or float64 scores of items begin to end, higher is better.

It must be a function: the same bits at every call with the same arguments. The caller never writes to what it
returns, so it may be a view. `LinearScores` are ranked without tiles, many times as fast.
"""


class Scorer(Protocol):
    """Scores every item after a history. What costs once per batch belongs in ``prepare``."""

    @property
    def num_items(self) -> int: ...

    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> ScoreTile:
        """The scores of these cases. histories: B item sequences, some perhaps empty. users: [B] int64, if known."""
        ...


class LinearScorer:
    """Scores ``states @ table.T + bias``, in float32 whatever the tensors are: at 16 bits ties are the norm.

    encode: (histories, users) -> states [B, D]. table: [V, D]. bias: [V] or None.
    """

    def __init__(
        self, encode: Callable[[Sequences, np.ndarray | None], Tensor], table: Tensor, *, bias: Tensor | None = None
    ) -> None:
        if table.dim() != 2:
            raise ValueError(f"table must be [V, D], got shape {tuple(table.shape)}")
        if bias is not None and bias.shape != table.shape[:1]:
            raise ValueError(f"bias must be [{table.shape[0]}] to match table, got shape {tuple(bias.shape)}")
        self._encode, self._table, self._bias = encode, table.detach(), None if bias is None else bias.detach()

    @property
    def num_items(self) -> int:
        return self._table.shape[0]

    @torch.no_grad()
    def prepare(self, histories: Sequences, users: np.ndarray | None = None) -> ScoreTile:
        states = self._encode(histories, users).float()
        if states.shape != (len(histories), self._table.shape[1]):
            expected = (len(histories), self._table.shape[1])
            raise ValueError(f"encode must return states of shape {expected}, got {tuple(states.shape)}")

        if self._table.dtype == torch.float32:
            return LinearScores(states, self._table, None if self._bias is None else self._bias.float())

        def score_tile(begin: int, end: int) -> Tensor:  # the table is not copied as a whole
            table_TD = self._table[begin:end].float()
            if self._bias is None:
                return states @ table_TD.T
            return torch.addmm(self._bias[begin:end].float(), states, table_TD.T)

        return score_tile
