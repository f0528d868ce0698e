import pytest
import torch
import torch.nn.functional as F

from metarec_fast.ops import linear


def inputs(rows=5, wide=7, out=3, dtype=torch.float32):
    shapes = ((rows, wide), (out, wide), (out,))
    return [(torch.randn(s, dtype=dtype) / wide**0.5).requires_grad_() for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (1, 1, 1), (0, 4, 2), (130, 64, 256)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_torch(dtype, sizes, with_bias):
    x, weight, bias = inputs(*sizes, dtype=dtype)
    leaves = (x, weight, bias) if with_bias else (x, weight)
    results = []
    for run in (linear, F.linear):
        y = run(*leaves)
        grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in grads), leaves)
        results.append((y, grads, second))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_strided_inputs():
    x, weight, bias = inputs()
    got = linear(x.t().contiguous().t(), weight[:, ::2].repeat(1, 2)[:, :7], bias)
    torch.testing.assert_close(got, F.linear(x, weight[:, ::2].repeat(1, 2)[:, :7], bias))


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, 0), (0, 0, None), (0, 0, 0)])
def test_vmap_of_gradients(in_dims):
    def grads(run):
        return torch.func.grad(lambda *a: run(*a).sin().sum(), argnums=(0, 1, 2))

    parts = [inputs() for _ in range(4)]
    args = [
        torch.stack(p).detach() if dim == 0 else p[0].detach()
        for p, dim in zip(zip(*parts, strict=True), in_dims, strict=True)
    ]
    torch.testing.assert_close(
        torch.vmap(grads(linear), in_dims)(*args), torch.vmap(grads(F.linear), in_dims)(*args), rtol=1e-4, atol=1e-5
    )


def test_compiled():
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 9):
        leaves = inputs(rows)
        results = [(y := run(*leaves), torch.autograd.grad(y.sin().sum(), leaves)) for run in (compiled, F.linear)]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_opcheck():
    torch.library.opcheck(torch.ops.metarec_fast.linear.default, tuple(x.detach() for x in inputs()))
