import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops import vq_commit
from metarec_fast.ops.vq_backward import op

SHAPES = [(1, 7, 1), (1, 5, 3), (2, 33, 16), (3, 10, 17), (1, 40, 64), (1, 9, 100), (2, 0, 4)]
ESTIMATORS = ["rotation", "straight_through"]


def problem(H, N, D, dtype=torch.float32):
    grad, x, quantized = (torch.randn(H, N, D, dtype=dtype) for _ in range(3))
    grad_error = torch.randn(H, N, dtype=dtype)
    grad_error[:, ::3] = 0
    if D == 1:  # opposite directions leave the plane of the rotation to rounding
        quantized = quantized.abs() * x.sign()
    return grad, grad_error, x, quantized


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("given", ["both", "grad", "grad_error", "neither"])
@pytest.mark.usefixtures("poison")
def test_equals_reference(shape, rotation, given):
    grad, grad_error, x, quantized = problem(*shape)
    grad = grad if given in ("both", "grad") else None
    grad_error = grad_error if given in ("both", "grad_error") else None
    found = op(grad, grad_error, x, quantized, rotation)
    exact = [None if t is None else t.double() for t in (grad, grad_error, x, quantized)]
    expected = reference.vq_backward(*exact, rotation=rotation)
    # 20 roundings of the row's largest terms
    scale = 1 + sum(0 if t is None else t.norm(dim=-1, keepdim=True) for t in (grad, x, quantized))
    assert ((found - expected).abs() <= 20 * 2.0**-24 * scale**2 + 1e-6 * expected.abs()).all()


@pytest.mark.parametrize("vectors", [([0.0, 0.0], [1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0]), ([1.0, 2.0], [-1.0, -2.0])])
def test_zero_and_opposite_vectors(vectors):
    x, quantized = (torch.tensor([[v]]) for v in vectors)
    grad = torch.tensor([[[0.3, -0.7]]])
    found = op(grad, None, x, quantized, True)
    assert found.isfinite().all()
    torch.testing.assert_close(found, reference.vq_backward(grad, None, x, quantized, rotation=True))


def test_a_row_without_weight_may_hold_anything():
    _, grad_error, x, quantized = problem(1, 4, 6)
    grad_error[:] = torch.tensor([0.0, 1, 0, 2])
    x[:, 0], x[:, 2] = float("nan"), float("inf")
    found = op(None, grad_error, x, quantized, False)
    assert not found[:, [0, 2]].any() and found.isfinite().all()


def training_gradients(x, codebook, gradient, row_weight=None):
    x = x.clone().requires_grad_()
    quantized, _, loss = vq_commit(x, codebook, gradient=gradient, row_weight=row_weight)
    ((quantized * torch.arange(1.0, 1 + x.shape[-1])).sum() + 3 * loss).backward()
    return x.grad


@pytest.mark.parametrize("gradient", ESTIMATORS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_fused_gradient_of_vq_commit_equals_the_reference(gradient, weighted, heads):
    x, codebook = torch.randn(*heads, 50, 12), torch.randn(*heads, 9, 12)
    weight = torch.rand(50) if weighted else None
    found = training_gradients(x, codebook, gradient, weight)
    leaf = x.double().requires_grad_()
    quantized, _, loss = reference.vq_commit(leaf, codebook.double(), gradient=gradient, row_weight=weight)
    ((quantized * torch.arange(1.0, 13)).sum() + 3 * loss).backward()
    torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_second_order_and_transforms_equal_the_reference(gradient):
    x, codebook = torch.randn(3, 8, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)

    def run(commit):
        def loss(x):
            quantized, _, commitment = commit(x, codebook, gradient=gradient)
            return (quantized.sin() * torch.arange(5)).sum() + 3 * commitment

        return loss

    fast, plain = (run(commit) for commit in (vq_commit, reference.vq_commit))
    grad = torch.func.grad
    torch.testing.assert_close(grad(fast)(x[0]), grad(plain)(x[0]))
    second = [grad(lambda x, f=f: grad(f)(x).sin().sum())(x[0]) for f in (fast, plain)]
    torch.testing.assert_close(*second)
    torch.testing.assert_close(torch.vmap(grad(fast))(x), torch.stack([grad(plain)(rows) for rows in x]))


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_compiles_and_keeps_the_fused_gradient(gradient):
    x, codebook = torch.randn(40, 8), torch.randn(7, 8)
    compiled = torch.compile(training_gradients, fullgraph=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x, codebook, gradient), training_gradients(x, codebook, gradient))


def test_unknown_gradient_is_named():
    with pytest.raises(ValueError, match="gradient must be one of rotation, straight_through or None, got 'gumbel'"):
        vq_commit(torch.ones(2, 3), torch.ones(4, 3), gradient="gumbel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    grad, grad_error, x, quantized = problem(2, 6, 5, dtype)
    for given in ((grad, grad_error), (None, grad_error), (grad, None)):
        torch.library.opcheck(torch.ops.metarec_fast.vq_backward.default, (*given, x, quantized, True))
