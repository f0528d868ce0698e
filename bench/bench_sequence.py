"""The loss over an item table against torch's composition of it: a product, then cross_entropy on the [T, V] logits.

The shapes are packed batches of a small, a mid-sized and a large domain; the composition gets valid rows only, too.
"""

import pytest
import torch
import torch.nn.functional as F

from metarec_fast.ops import linear_cross_entropy

SHAPES = [(300, 2_420, 64), (900, 12_000, 64), (900, 57_289, 64)]


def problem(T, V, D):
    generator = torch.Generator().manual_seed(0)
    h, table = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator) / 4
    bias, targets = torch.zeros(V), torch.randint(V, (T,), generator=generator)
    return [x.requires_grad_() for x in (h, table, bias)], targets


def fused(h, table, bias, targets):
    return linear_cross_entropy(h, table, targets, bias).mean()


def dense(h, table, bias, targets):
    return F.cross_entropy(torch.addmm(bias, h, table.T), targets)


def first_order(loss, inputs, targets):
    value = loss(*inputs, targets)
    return value.detach(), *torch.autograd.grad(value, inputs)


def second_order(loss, inputs, targets):
    """Forward, backward and the product of the Hessian with the gradient."""
    first = torch.autograd.grad(loss(*inputs, targets), inputs, create_graph=True)
    return torch.autograd.grad(first, inputs, [g.detach() for g in first])


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(compare, shape):
    case = problem(*shape)
    compare(
        lambda: first_order(fused, *case),
        lambda: first_order(dense, *case),
        subject="linear_cross_entropy forward+backward",
        shape="T={} V={} D={}".format(*shape),
        against="torch addmm + cross_entropy",
        check=same,
    )


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_second_order(compare, shape):
    case = problem(*shape)
    compare(
        lambda: second_order(fused, *case),
        lambda: second_order(dense, *case),
        subject="linear_cross_entropy second order",
        shape="T={} V={} D={}".format(*shape),
        against="torch addmm + cross_entropy",
        check=same,
    )
