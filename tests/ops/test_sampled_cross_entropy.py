import math

import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops import sampled_cross_entropy


def problem(T=6, V=9, D=4):
    h, table, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((T, D), (V, D), (V,)))
    return h, table, torch.randint(V, (T,)), bias


def test_the_whole_catalogue_gives_the_full_softmax():
    h, table, targets, bias = problem()
    everything, logq = torch.arange(9), torch.full((9,), -math.log(9), dtype=torch.float64)
    expected = reference.linear_cross_entropy(h, table, targets, bias)
    torch.testing.assert_close(sampled_cross_entropy(h, table, targets, everything, logq, bias), expected)
    rows = everything.expand(6, 9)
    torch.testing.assert_close(sampled_cross_entropy(h, table, targets, rows, logq.expand(6, 9), bias), expected)


def test_the_sum_over_negatives_is_an_unbiased_estimate():
    h, table, targets, bias = problem(T=2)
    q = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05], dtype=torch.float64)
    drawn = torch.multinomial(q, 200_000, replacement=True)
    got = sampled_cross_entropy(h, table, targets, drawn, q.log()[drawn], bias)
    torch.testing.assert_close(got, reference.linear_cross_entropy(h, table, targets, bias), rtol=0.02, atol=0)


def test_differentiable_twice():
    h, table, targets, bias = problem(T=3, V=5, D=2)
    negatives, logq = torch.tensor([0, 2, 4]), torch.randn(3, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (h, table, bias))
    run = lambda h, table, bias: sampled_cross_entropy(h, table, targets, negatives, logq, bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": torch.zeros(5, 2, dtype=torch.int64)}, r"negatives must be \[N\] or \[6, N\], got \(5, 2\)"),
        ({"negatives": torch.zeros(0, dtype=torch.int64)}, "negatives must hold at least one item, got none"),
        ({"logq": torch.zeros(2)}, r"logq must have the shape of negatives \(3,\), got \(2,\)"),
        ({"table": torch.zeros(9, 3, dtype=torch.float64)}, r"table must be \[V, 4\] to match h, got \(9, 3\)"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets must be \[6\] to match h, got \(2,\)"),
    ],
)
def test_bad_arguments(change, message):
    h, table, targets, bias = problem()
    arguments = {"h": h, "table": table, "targets": targets, "negatives": torch.tensor([0, 1, 2]), "bias": bias}
    with pytest.raises(ValueError, match=message):
        sampled_cross_entropy(**{"logq": torch.zeros(3), **arguments, **change})
