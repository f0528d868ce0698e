"""AdamW of the rows that a step touches against torch's dense fused step with a gradient buffer that is kept."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from metarec_fast.train.optimizer import TableAdamW

D, EVERY = 64, 25  # the trainer reads the whole table to evaluate it every 25 steps


@pytest.mark.parametrize("touched", [1000, 3000])
@pytest.mark.parametrize("V", [12_000, 57_000, 1_000_000])
def bench_table_adamw(compare, V, touched):
    steps = []
    for _ in range(EVERY):
        ids = torch.randint(V, (touched,)).unique()
        steps.append((ids, torch.randn(len(ids), D)))
    dense = torch.nn.Parameter(torch.randn(V, D))
    lazy = torch.nn.Parameter(dense.detach().clone())
    adamw, ours = torch.optim.AdamW([dense], fused=True), TableAdamW([lazy])
    dense.grad = torch.zeros_like(dense)
    turns = {name: cycle(range(EVERY)) for name in ("ours", "theirs")}

    def step_ours():
        turn = next(turns["ours"])
        ids, grad = steps[turn]
        ours.catch_up(lazy, ids)
        lazy.grad = torch.sparse_coo_tensor(ids[None], grad, lazy.shape, is_coalesced=True, check_invariants=False)
        ours.step()
        if turn == EVERY - 1:
            ours.flush()

    def step_theirs():
        ids, grad = steps[next(turns["theirs"])]
        dense.grad.index_copy_(0, ids, grad)
        adamw.step()
        dense.grad.index_fill_(0, ids, 0.0)

    def fast():
        for _ in range(EVERY):
            step_ours()
        return lazy.detach().clone()

    def baseline():
        for _ in range(EVERY):
            step_theirs()
        return dense.detach().clone()

    for _ in range(4):  # beyond the first steps, whose missed sums are taken one by one
        fast(), baseline()

    def same(a, b):
        """Within float32 rounding of 125 dense steps: each rounds an element of at most 5."""
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

    compare(
        fast,
        baseline,
        subject="AdamW of a table, 25 steps and a flush",
        shape=f"{touched} rows of {V} x {D}",
        against="torch.optim.AdamW fused",
        check=same,
        rounds=7,
    )
