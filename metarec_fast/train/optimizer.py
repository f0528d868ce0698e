"""AdamW on item tables at the cost of the rows that a step touches, with the results of dense AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec_fast.ops.missed_steps import Past, missed_steps_

CAPACITY = 4096  # steps that are remembered; then every row is brought up to date


class TableAdamW(torch.optim.Optimizer):
    """AdamW for tables [V, ...] of which a step touches few rows; equal to ``torch.optim.AdamW`` but for rounding.

    Dense AdamW goes on moving rows that get no gradient. Here a row is brought up to date when it is next read, at a
    cost that does not grow with the steps it missed (`ops.missed_steps`). A step is: ``catch_up(table, ids)``, reading
    the rows ``ids``, gradients that are sparse in rows, ``step()``. Before anything reads the whole table: ``flush()``.

        >>> optimizer = TableAdamW([embedding.weight], lr=1e-3)
        >>> optimizer.catch_up(embedding.weight, ids)
        >>> F.embedding(ids, embedding.weight, sparse=True).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.flush()

    A table without gradient takes no step, as with torch. The learning rate may change from step to step. What is left
    out of the sum over missed steps is below a quarter of an epsilon of it; dense AdamW rounds the parameter at each
    step and this one once, so ours lies nearer the real numbers. Between steps ``state_dict`` belongs together with
    the tables as they are, rows behind included.

    tables: float32 or float64 on the CPU: a GPU's memory makes the dense step cheap. lr, betas, eps, weight_decay: as
    in torch.optim.AdamW. Raises ValueError for options out of range: eps > 0, 0 < beta1 < sqrt(beta2) < 1,
    lr * weight_decay < 1.
    """

    def __init__(
        self,
        tables: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            if not 0 < beta1 < math.sqrt(beta2) < 1:
                raise ValueError(f"betas must satisfy 0 < beta1 < sqrt(beta2) < 1, got {group['betas']}")
            if not group["eps"] > 0:
                raise ValueError(f"eps must be positive, got {group['eps']}")
            if not (group["lr"] >= 0 and group["weight_decay"] >= 0 and group["lr"] * group["weight_decay"] < 1):
                raise ValueError(
                    "lr and weight_decay must be at least 0 and their product below 1, "
                    f"got {group['lr']} and {group['weight_decay']}"
                )
            for table in group["params"]:
                if table.dtype not in (torch.float32, torch.float64) or table.device.type != "cpu":
                    raise ValueError(f"tables must be float32 or float64 on cpu, got {table.dtype} on {table.device}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        tables = [table for group in self.param_groups for table in group["params"]]
        for index, given in state_dict["state"].items():
            for name in ("step", "first", "last", "past"):  # torch gave them the dtype of the table
                self.state[tables[int(index)]][name] = given[name].clone()

    def _state(self, table: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            # the step with which each row is up to date
            state["last"] = torch.zeros(len(table), dtype=torch.int64)
            self._forget(table, group)
        return state

    def _forget(self, table: Tensor, group: dict[str, Any]) -> None:
        """Start the past anew: every row is up to date."""
        state = self.state[table]
        past = Past.empty(group["betas"], table.dtype, step=int(state["step"]), capacity=CAPACITY)
        state["first"], state["past"] = state["step"].clone(), past.history

    def _past(self, table: Tensor, group: dict[str, Any]) -> Past:
        state = self.state[table]
        first, step = int(state["first"]), int(state["step"])
        return Past(group["betas"], table.dtype, first=first, step=step, history=state["past"])

    def _catch_up(self, table: Tensor, group: dict[str, Any], ids: Tensor | None) -> None:
        state, past = self._state(table, group), self._past(table, group)
        tensors = (table.detach(), state["exp_avg"], state["exp_avg_sq"], state["last"])
        missed_steps_(*tensors, past, eps=group["eps"], ids=ids)
        if ids is None:
            self._forget(table, group)

    def catch_up(self, table: Tensor, ids: Tensor) -> None:
        """Bring the rows ``ids`` [N] int64, which may repeat, to where dense AdamW has them."""
        group = next(g for g in self.param_groups if any(p is table for p in g["params"]))
        self._catch_up(table, group, ids.unique())

    def flush(self) -> None:
        """Bring every row of every table to where dense AdamW has it."""
        for group in self.param_groups:
            for table in group["params"]:
                if self.state[table]:
                    self._catch_up(table, group, None)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every table that has a gradient.

        Raises ValueError for a gradient that is not sparse in rows alone, and RuntimeError for one of rows that were
        not up to date, as dense AdamW would have taken it at other values.
        """
        if closure is not None:
            raise ValueError("TableAdamW takes no closure: rows are brought up to date before they are read")
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group)

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        if not (table.grad.is_sparse and table.grad.sparse_dim() == 1):
            raise ValueError(f"gradients must be sparse in rows alone, got {table.grad.layout}")
        grad = table.grad.coalesce()
        ids, g = grad.indices()[0], grad.values()
        state = self._state(table, group)
        if bool((state["last"][ids] < state["step"]).any()):
            raise RuntimeError("rows were not up to date: call catch_up(table, ids) before reading them")
        if int(state["step"] - state["first"]) == CAPACITY:
            self._catch_up(table, group, None)
        past = self._past(table, group)
        past.record(lr=group["lr"], weight_decay=group["weight_decay"])
        state["step"] += 1
        (beta1, beta2), eps, lr, step = group["betas"], group["eps"], group["lr"], past.step
        m = state["exp_avg"].index_select(0, ids).lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].index_select(0, ids).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        state["exp_avg"].index_copy_(0, ids, m)
        state["exp_avg_sq"].index_copy_(0, ids, v)
        denominator = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(eps)
        rows = table.index_select(0, ids).mul_(1 - lr * group["weight_decay"])
        table.index_copy_(0, ids, rows.addcdiv_(m, denominator, value=-lr / (1 - beta1**step)))
        state["last"][ids] = step


def decayed_and_free(parameters: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def clip_and_step(
    parameters: Iterable[Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    losses: Iterable[float],
    *,
    clip: float,
) -> bool:
    """Clip the gradients of ``parameters`` to norm ``clip`` and step.

    No step, and False, if a loss or any gradient is not finite, also of parameters that are moved and not clipped.
    """
    parameters, optimizers = list(parameters), list(optimizers)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    clipped = {id(p) for p in parameters}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and id(p) not in clipped:
                values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                norm = norm + 0 * torch.linalg.vector_norm(values)
    if not all(map(math.isfinite, [float(norm), *losses])):
        return False
    for optimizer in optimizers:
        optimizer.step()
    return True


def dropout_seed(seed: int, stage: int, step: int) -> int:
    """Below 2**64, for torch: dropout is a function of where the run stands. seed: below 2**63. step: below 2**32."""
    if seed < 2**24:
        return (seed << 40) + (stage << 32) + step
    return int(np.random.SeedSequence((seed, stage, step)).generate_state(1, np.uint64)[0])
