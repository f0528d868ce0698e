"""missed_steps_: what AdamW did while rows had no gradient, made up at once.

A row last touched at step l that then misses n steps stands, with q = sqrt(beta2), at

    p' = P_n (p - m sum_(k=1..n) W_k / (s + eps e_k)),   m' = beta1^n m,   v' = beta2^n v,   s = sqrt(v),
    e_k = sqrt(1 - beta2^(l+k)) / q^k,   W_k = lr_(l+k) e_k beta1^k / ((1 - beta1^(l+k)) P_k),   P_k = prod (1 - lr wd),

and W_k and e_k are the same for all elements of all rows last touched at l. As e_k hardly changes while beta1^k
vanishes, the sum is a short series about a center c, of the same length for every s >= 0:

    sum_k W_k / (s + eps e_k) = 1/d sum_j M_j (-eps c / d)^j,   d = s + eps c,   M_j = sum_k W_k (e_k / c - 1)^j.

The moments M_j grow by one term a step (`Past.record`), so a row is made up in time that does not grow with n.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.register import check_tensor

COLUMNS = 3  # of Past.history before the moments: learning rate, sum of log(1 - lr weight_decay), center


@dataclass(frozen=True)
class Series:
    """Where the sum over missed steps is cut off.

    window: steps after which what a row still moves is left out. terms: length of the series. start: the first step
    of a last touch from which the series holds; bias corrections of earlier ones change too fast, and their sums are
    taken step by step. None: it never holds for these betas, for example (0.9, 0.95).

    Either error is at most ``tolerance`` of the sum while the learning rate does not change within a window; one that
    changes by a factor makes it at most that factor larger.
    """

    window: int
    terms: int
    start: int | None
    tolerance: float


def _weights(last: int, k: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """W_k P_k / lr and e_k after a last touch at step ``last``."""
    e = (1 - beta2 ** (last + k)).sqrt() / beta2 ** (k / 2)
    return e * beta1**k / (1 - beta1 ** (last + k)), e


def _center(last: int, k: Tensor, beta1: float, beta2: float) -> float:
    """The mean of e_k by its weights."""
    weight, e = _weights(last, k, beta1, beta2)
    return float((weight * e).sum() / weight.sum())


@cache
def series(betas: tuple[float, float], dtype: torch.dtype) -> Series:
    """The shortest window and the first start that serve a quarter of the rounding of ``dtype``."""
    tolerance, terms = torch.finfo(dtype).eps / 4, 10 if dtype == torch.float32 else 18
    ratio = betas[0] / math.sqrt(betas[1])
    # the sum from k on is at most ratio^k / (1 - ratio), times 1 / sqrt(1 - beta2) by which bias corrections may grow
    window = math.ceil(math.log(tolerance * (1 - ratio) * math.sqrt(1 - betas[1])) / math.log(ratio))
    k = torch.arange(1, window + 1, dtype=torch.float64)

    def converges(start: int) -> bool:
        weight, e = _weights(start, k, *betas)
        x = e / _center(start, k, *betas) - 1
        # what 1/(1 + x) = 1 - x + x^2 ... leaves after some terms is x^terms / (1 + x)
        rest = (weight * x.abs() ** terms / (1 + x.clamp(max=0))).cumsum(0)
        return float((rest / (weight / (1 + x.clamp(min=0))).cumsum(0)).max()) <= tolerance

    # bias corrections converge, so that the bound also holds at every later step
    latest = 4096
    start = bisect_left(range(latest), True, key=converges)
    return Series(window, terms, start if start < latest else None, tolerance)


class Past:
    """The steps of one table since step ``first``, when all its rows were up to date.

    history: [capacity + 1, 3 + terms] float64; row i describes step first + i.
    """

    def __init__(
        self, betas: tuple[float, float], dtype: torch.dtype, *, first: int, step: int, history: Tensor
    ) -> None:
        self.betas, self.series, self.first, self.step, self.history = betas, series(betas, dtype), first, step, history
        self._k = torch.arange(1, self.series.window + 1, dtype=torch.float64)

    @staticmethod
    def empty(betas: tuple[float, float], dtype: torch.dtype, *, step: int, capacity: int) -> Past:
        """Nothing since ``step``; room for ``capacity`` steps."""
        history = torch.zeros(capacity + 1, COLUMNS + series(betas, dtype).terms, dtype=torch.float64)
        past = Past(betas, dtype, first=step, step=step, history=history)
        history[0, 2] = _center(step, past._k, *betas)
        return past

    def record(self, *, lr: float, weight_decay: float) -> None:
        """Add a step to what rows missed that were last touched at one of the steps before."""
        self.step += 1
        now = self.step - self.first
        rows = self.history[max(0, now - self.series.window) : now]
        k = torch.arange(len(rows), 0, -1, dtype=torch.float64)
        log_keep = float(self.history[now - 1, 1]) + math.log1p(-lr * weight_decay)
        e = math.sqrt(1 - self.betas[1] ** self.step) * self.betas[1] ** (-k / 2)
        weight = lr / (1 - self.betas[0] ** self.step) * e * self.betas[0] ** k * (rows[:, 1] - log_keep).exp()
        powers = (e / rows[:, 2] - 1)[:, None] ** torch.arange(self.series.terms)
        rows[:, COLUMNS:].addcmul_(weight[:, None], powers)
        self.history[now, :COLUMNS] = torch.tensor(
            [lr, log_keep, _center(self.step, self._k, *self.betas)], dtype=torch.float64
        )


def missed_steps_(
    p: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor, past: Past, *, eps: float, ids: Tensor | None = None
) -> None:
    """Bring rows ``ids`` (None: all) to where ``past.step`` steps of AdamW have them, in place; ``last`` follows.

    p, exp_avg, exp_avg_sq: [V, ...] float32 or float64, contiguous, on the CPU. last: [V] int64, the step with which
    each row is up to date, in [past.first, past.step]. ids: [N] int64, distinct.

    Same as `reference.missed_steps_` but for rounding and the errors of `Series`. Not differentiable.
    Raises TypeError or ValueError for arguments of another dtype, shape, range or device.
    """
    cpu = torch.device("cpu")
    check_tensor(p, "p", dtypes=(torch.float32, torch.float64), dims=max(p.dim(), 1), device=cpu)
    for name, value in (("p", p), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(value, name, dtypes=(p.dtype,), dims=p.dim(), device=cpu)
        if value.shape != p.shape or not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous and {tuple(p.shape)} as p, got {tuple(value.shape)}")
    check_tensor(last, "last", dtypes=(torch.int64,), dims=1, device=cpu)
    if len(last) != len(p) or not last.is_contiguous():
        raise ValueError(f"last must be contiguous and [{len(p)}], got {tuple(last.shape)}")
    if ids is not None:
        check_tensor(ids, "ids", dtypes=(torch.int64,), dims=1, device=cpu)
        ids = ids.contiguous()
    plan, steps = past.series, past.step - past.first
    n = torch.arange(steps, -1, -1, dtype=torch.float64)  # missed by rows last up to date at each step
    keep = (past.history[steps, 1] - past.history[: steps + 1, 1]).exp()
    shrink = torch.stack((keep, past.betas[0] ** n, past.betas[1] ** n), 1)
    _C.missed_steps(
        span(p),
        span(exp_avg),
        span(exp_avg_sq),
        span(last),
        span(past.history[: steps + 1]),
        span(shrink),
        span(ids),
        V=len(p),
        rows=len(p) if ids is None else len(ids),
        width=math.prod(p.shape[1:]),
        first=past.first,
        step=past.step,
        terms=plan.terms,
        window=plan.window,
        start=past.step + 1 if plan.start is None else plan.start,
        beta1=past.betas[0],
        beta2=past.betas[1],
        eps=eps,
    )
