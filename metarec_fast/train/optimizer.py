"""AdamW on item tables at the cost of the rows that a step touches, with the results of dense AdamW.

Dense AdamW goes on moving a row that gets no gradient: its averages m and v shrink and it moves by them. With q =
sqrt(beta2), a row last touched at step l stands at step l + n at

    p' = P_n (p - m sum_(k=1..n) W_k / (s + eps e_k)),   m' = beta1^n m,   v' = beta2^n v,   s = sqrt(v),
    e_k = sqrt(1 - beta2^(l+k)) / q^k,   W_k = lr_(l+k) e_k beta1^k / ((1 - beta1^(l+k)) P_k),   P_k = prod (1 - lr wd),

and W_k and e_k are the same for all elements of all rows last touched at l. As e_k hardly changes while beta1^k
vanishes, the sum is a short series about a center c, the same length for every s >= 0:

    sum_k W_k / (s + eps e_k) = 1/d sum_j M_j (-eps c / d)^j,   d = s + eps c,   M_j = sum_k W_k (e_k / c - 1)^j.

So what a row missed is made up when it is next read, in time that does not grow with n. See `Series` for the errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CAPACITY = 4096  # steps that are remembered; then every row is brought up to date
CHUNK = 4096  # rows brought up to date at once: a few of their temporaries fit a cache


@dataclass(frozen=True)
class Series:
    """How the sum over missed steps is cut off.

    window: steps after which what a row still moves is left out. terms: length of the series. start: the first step
    of a last touch from which the series holds; the bias corrections of earlier ones change too fast, and their sums
    are taken step by step. None: the series never holds for these betas, for example (0.9, 0.95).

    Both errors are at most ``tolerance`` of the sum, for a learning rate that is the same over a window.
    """

    window: int
    terms: int
    start: int | None
    tolerance: float


@cache
def series(beta1: float, beta2: float, dtype: torch.dtype) -> Series:
    """The shortest window and the first step for the rounding of ``dtype``."""
    tolerance = torch.finfo(dtype).eps / 4
    terms = 10 if dtype == torch.float32 else 18
    ratio = beta1 / math.sqrt(beta2)
    # sum_(k>K) W_k/e_k <= ratio^K / (1 - ratio) times what the bias corrections grow by, at most 1/sqrt(1 - beta2)
    window = math.ceil(math.log(tolerance * (1 - ratio) * math.sqrt(1 - beta2)) / math.log(ratio))
    for start in range(1, 2000):
        weight, e = _weights(torch.tensor([start]), window, beta1, beta2)
        delta = e / center(torch.tensor([start]), window, beta1, beta2)[:, None] - 1
        # of 1/(1 + x) = 1 - x + x^2 ..., |x| <= |delta|, the rest is x^terms / (1 + x)
        rest = (weight * delta.abs() ** terms / (1 + delta.clamp(max=0))).cumsum(1)
        if float((rest / (weight / (1 + delta.clamp(min=0))).cumsum(1)).max()) <= tolerance:
            return Series(window, terms, start, tolerance)
    return Series(window, terms, None, tolerance)


def _weights(last: Tensor, window: int, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """W_k / (lr / P_k) and e_k of k = 1..window, for last touches [L]: both [L, window] float64."""
    k = torch.arange(1, window + 1, device=last.device, dtype=torch.float64)
    step = last[:, None] + k
    e = (1 - beta2**step).sqrt() / beta2 ** (k / 2)
    return e * beta1**k / (1 - beta1**step), e


def center(last: Tensor, window: int, beta1: float, beta2: float) -> Tensor:
    """c of last touches: the mean of e_k by its weights."""
    weight, e = _weights(last, window, beta1, beta2)
    return (weight * e).sum(1) / weight.sum(1)


class TableAdamW(torch.optim.Optimizer):
    """AdamW for tables [V, ...] of which a step touches few rows; equal to ``torch.optim.AdamW`` but for rounding.

    A step is: ``catch_up(table, ids)``, then reading the rows ``ids``, then gradients as coalesced sparse tensors of
    one sparse dimension in ``table.grad``, then ``step()``. Before anything reads the whole table: ``flush()``.

        >>> optimizer = TableAdamW([embedding.weight], lr=1e-3)
        >>> optimizer.catch_up(embedding.weight, ids)
        >>> F.embedding(ids, embedding.weight, sparse=True).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.flush()

    Tables without gradient take no step, as with torch. The learning rate may change from step to step. Sums over
    missed steps are right to a quarter of the dtype's epsilon; dense AdamW rounds at every step, this one once, so
    the two differ by about an epsilon of the parameter for each step missed, ours being nearer the real numbers.
    A state_dict may be taken between any two steps; tables whose rows are not up to date belong together with it.

    tables: float32 or float64. lr, betas, eps, weight_decay: as in torch.optim.AdamW.
    Raises ValueError for options out of range: eps > 0, 0 <= beta1 < sqrt(beta2) < 1, lr * weight_decay < 1.
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
            (beta1, beta2), keep = group["betas"], 1 - group["lr"] * group["weight_decay"]
            if not 0 < beta1 < math.sqrt(beta2) < 1:
                raise ValueError(f"betas must satisfy 0 < beta1 < sqrt(beta2) < 1, got {group['betas']}")
            if not group["eps"] > 0:
                raise ValueError(f"eps must be positive, got {group['eps']}")
            if not (group["lr"] >= 0 and 0 < keep <= 1):
                raise ValueError(
                    f"lr and weight_decay must be at least 0 and their product below 1, got {group['lr']} and "
                    f"{group['weight_decay']}"
                )
            for table in group["params"]:
                if table.dtype not in (torch.float32, torch.float64):
                    raise ValueError(f"tables must be float32 or float64, got {table.dtype}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        tables = [table for group in self.param_groups for table in group["params"]]
        for index, given in state_dict["state"].items():  # torch gives everything the dtype of the table
            for name in ("step", "first", "last", "past"):
                device = tables[int(index)].device if name in ("last", "past") else "cpu"
                self.state[tables[int(index)]][name] = given[name].to(device, copy=True)

    def _series(self, table: Tensor, group: dict[str, Any]) -> Series:
        return series(*group["betas"], table.dtype)

    def _state(self, table: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            # the step at which each row was last up to date
            state["last"] = torch.zeros(len(table), dtype=torch.int64, device=table.device)
            # of each step since the last flush: its lr, sum of log(1 - lr wd), center and M_j
            self._remember_from(state, table, group)
        return state

    def _remember_from(self, state: dict[str, Any], table: Tensor, group: dict[str, Any]) -> None:
        """Forget the steps before now: no row was last up to date there."""
        plan = self._series(table, group)
        state["first"] = state["step"].clone()
        state["past"] = torch.zeros(CAPACITY + 1, 3 + plan.terms, dtype=torch.float64, device=table.device)
        state["past"][0, 2] = center(state["step"].to(table.device)[None], plan.window, *group["betas"])[0]

    @torch.no_grad()
    def catch_up(self, table: Tensor, ids: Tensor) -> None:
        """Bring the rows ``ids`` [N] int64, which may repeat, to where dense AdamW has them."""
        group = next(g for g in self.param_groups if any(p is table for p in g["params"]))
        state = self._state(table, group)
        step, plan = int(state["step"]), self._series(table, group)
        ids = ids[state["last"][ids] < step].unique()
        if len(ids) == 0:
            return
        short = torch.zeros_like(ids, dtype=torch.bool)
        if plan.start is not None:
            short = state["last"][ids] >= plan.start
        # rows that never had a gradient do not move, whatever the series says
        m = state["exp_avg"][ids[~short]]
        short[~short] = ~m.view(len(m), table[0].numel()).any(1)
        for chosen, by_series in ((ids[short], True), (ids[~short], False)):
            for rows in chosen.split(CHUNK) if len(chosen) else ():
                self._move(table, group, state, rows, by_series=by_series)

    def _move(
        self, table: Tensor, group: dict[str, Any], state: dict[str, Any], ids: Tensor, *, by_series: bool
    ) -> None:
        step, first = int(state["step"]), int(state["first"])
        (beta1, beta2), eps, plan, past = group["betas"], group["eps"], self._series(table, group), state["past"]

        def column(values: Tensor) -> Tensor:
            return values.to(table.dtype).view(-1, *(1,) * (table.dim() - 1))

        last = state["last"][ids]
        missed, then = step - last, past[last - first]
        keep = (past[step - first, 1] - then[:, 1]).exp()
        p, m, v = table[ids], state["exp_avg"][ids], state["exp_avg_sq"][ids]
        s = v.sqrt()
        if by_series:
            inverse = (s + column(eps * then[:, 2])).reciprocal_()
            z = inverse * column(-eps * then[:, 2])
            total = column(then[:, -1]).expand_as(z)
            for j in range(plan.terms - 2, -1, -1):
                total = torch.addcmul(column(then[:, 3 + j]), total, z)
            total *= inverse
        else:
            total = torch.zeros_like(s)
            weight, e = _weights(last, min(int(missed.max()), plan.window), beta1, beta2)
            for k in range(weight.shape[1]):
                now = past[(last - first + k + 1).clamp(max=step - first)]
                share = now[:, 0] * weight[:, k] * (then[:, 1] - now[:, 1]).exp() * (k < missed)
                total.addcdiv_(column(share), s + column(eps * e[:, k]))
        table[ids] = column(keep) * (p - m * total)
        state["exp_avg"][ids] = m * column(beta1 ** missed.double())
        state["exp_avg_sq"][ids] = v * column(beta2 ** missed.double())
        state["last"][ids] = step

    @torch.no_grad()
    def flush(self) -> None:
        """Bring every row of every table to where dense AdamW has it."""
        for group in self.param_groups:
            for table in group["params"]:
                if self.state[table]:
                    self.catch_up(table, torch.arange(len(table), device=table.device))
                    self._remember_from(self.state[table], table, group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every table that has a gradient.

        Raises ValueError for a gradient that is not sparse in rows alone, and RuntimeError if it is one of rows that
        were not up to date, as it was then taken of other values than dense AdamW's.
        """
        if closure is not None:
            raise ValueError("TableAdamW takes no closure: rows are caught up before they are read")
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._step(table, group)

    def _step(self, table: Tensor, group: dict[str, Any]) -> None:
        if not (table.grad.is_sparse and table.grad.sparse_dim() == 1):
            raise ValueError(f"gradients must be sparse in rows alone, got {table.grad.layout} for {table.shape}")
        grad = table.grad.coalesce()
        ids, g = grad.indices()[0], grad.values()
        state = self._state(table, group)
        if int(state["step"]) - int(state["first"]) == CAPACITY:
            self.catch_up(table, torch.arange(len(table), device=table.device))
            self._remember_from(state, table, group)
        if bool((state["last"][ids] < state["step"].to(table.device)).any()):
            raise RuntimeError("rows were read that were not up to date: call catch_up(table, ids) before reading them")
        self._record(table, group, state)
        (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
        step = int(state["step"])
        m = state["exp_avg"][ids].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"][ids].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        state["exp_avg"][ids], state["exp_avg_sq"][ids] = m, v
        s = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(eps)
        table[ids] = table[ids].mul_(1 - lr * group["weight_decay"]).addcdiv_(m, s, value=-lr / (1 - beta1**step))
        state["last"][ids] = step

    def _record(self, table: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Add the step to what every row has missed that was last touched at one of the steps remembered."""
        state["step"] += 1
        plan, past, betas, lr = self._series(table, group), state["past"], group["betas"], group["lr"]
        step, first = int(state["step"]), int(state["first"])
        log_keep = past[step - first - 1, 1] + math.log1p(-lr * group["weight_decay"])
        begin = max(first, step - plan.window)
        rows = past[begin - first : step - first]
        k = torch.arange(step - begin, 0, -1, dtype=torch.float64, device=table.device)
        e = math.sqrt(1 - betas[1] ** step) * betas[1] ** (-k / 2)
        weight = lr / (1 - betas[0] ** step) * e * betas[0] ** k * (rows[:, 1] - log_keep).exp()
        delta = (e / rows[:, 2] - 1)[:, None]
        rows[:, 3:] += weight[:, None] * delta ** torch.arange(plan.terms, device=table.device)
        past[step - first, 0], past[step - first, 1] = lr, log_keep
        past[step - first, 2] = center(state["step"].to(table.device)[None], plan.window, *betas)[0]
