"""The rows of a large item table that a step's batches name, as a small table of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_fast.sampling.batch import PackedBatch

Parameters = dict[str, Tensor]
ROWS = ("weight", "bias")  # the private parameters that have a row for each item


@dataclass(frozen=True)
class TableRows:
    """A domain's part in a step.

    private: what the loss reads. batches: with items numbered as the rows of ``private``. ids: the items of these rows,
    ascending, or None for the whole table.
    """

    parameters: Parameters
    private: Parameters
    batches: list[PackedBatch]
    ids: Tensor | None = None

    def take_gradients(self, grads: Parameters) -> None:
        """Put gradients with respect to ``private`` into the domain's parameters, sparse where only rows were read."""
        for key, grad in grads.items():
            parameter = self.parameters[key]
            if self.ids is not None and key in ROWS:
                grad = torch.sparse_coo_tensor(
                    self.ids[None], grad, parameter.shape, is_coalesced=True, check_invariants=False
                )
            parameter.grad = grad


def all_rows(parameters: Parameters, batches: list[PackedBatch]) -> TableRows:
    return TableRows(parameters, parameters, batches)


def named_rows(
    parameters: Parameters, batches: list[PackedBatch], *, before_reading: Callable[[Tensor, Tensor], None]
) -> TableRows:
    """Only the items, targets and negatives of ``batches``; for losses that read no other.

    before_reading: called with each table and the ids of its rows that will be read.
    """
    named = [x for b in batches for x in (b.items, b.targets, b.negatives) if x is not None]
    ids = torch.cat([x.flatten() for x in named]).unique()
    private = dict(parameters)
    for key in ROWS:
        before_reading(parameters[key], ids)
        private[key] = parameters[key].detach().index_select(0, ids).requires_grad_()

    def numbered(items: Tensor) -> Tensor:
        return torch.searchsorted(ids, items)

    renumbered = [
        replace(b, items=numbered(b.items), targets=numbered(b.targets), negatives=numbered(b.negatives))
        for b in batches
    ]
    return TableRows(parameters, private, renumbered, ids)
