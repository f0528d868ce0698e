"""Lookups of rows that come back by what is remembered of them, against a full search at every step."""

from itertools import chain, cycle

import pytest
import torch

from metarec_fast.ops import nearest_codeword
from metarec_fast.vq import CodebookAssignments

ROWS, STEPS = 4_000, 12


def walk(rows_step, codes_step, *, H, K, D):
    """(rows, codebook) of STEPS steps, and back again: rows scattered about codes, both in random motion."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    codebook = randn(H, K, D)
    chosen = torch.randint(K, (H, ROWS, 1), generator=generator).expand(H, ROWS, D)
    x = codebook.gather(1, chosen) + 0.5 * randn(H, ROWS, D)
    steps = [(x, codebook)]
    for _ in range(STEPS - 1):
        x, codebook = x + rows_step * randn(H, ROWS, D), codebook + codes_step * randn(H, K, D)
        steps.append((x, codebook))
    return cycle(chain(steps, steps[::-1]))


@pytest.mark.parametrize(("H", "K", "D"), [(8, 256, 8), (1, 1_024, 64), (1, 8_192, 64)])
@pytest.mark.parametrize(("drift", "rows_step", "codes_step"), [("slow", 0.01, 0.003), ("wild", 1.0, 1.0)])
def bench_against_a_full_search(compare, H, K, D, drift, rows_step, codes_step):
    assignments = CodebookAssignments(ROWS, K, D, num_codebooks=H)
    ids = torch.arange(ROWS)
    ours, theirs = walk(rows_step, codes_step, H=H, K=K, D=D), walk(rows_step, codes_step, H=H, K=K, D=D)

    def same(got, expected):
        assert torch.equal(got, expected)

    compare(
        lambda: assignments.lookup(ids, *next(ours)),
        lambda: nearest_codeword(*next(theirs), with_margin=False).indices,
        subject=f"CodebookAssignments, {drift} drift",
        shape=f"{H}x{ROWS}x{D}x{K}",
        against="nearest_codeword",
        check=same,
    )
