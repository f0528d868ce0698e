import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from metarec_fast.vq import quantize, rotate_to, straight_through

ESTIMATORS = {"straight_through": straight_through, "rotation": rotate_to}


def rotation_matrix(u, v):
    """The rotation in the plane of unit vectors u and v that takes u to v, by Rodrigues' formula."""
    skew = torch.outer(v, u) - torch.outer(u, v)
    return torch.eye(len(u), dtype=u.dtype) + skew + skew @ skew / (1 + u @ v)


def written_out(x, q, kind):
    """The estimators as formulas of x with constants, which autograd can differentiate."""
    q = q.detach()
    if kind == "straight_through":
        return x + (q - x).detach()
    rows = []
    for row, code in zip(x, q, strict=True):
        u, v = F.normalize(row.detach(), dim=0), F.normalize(code, dim=0)
        rows.append(code.norm() / row.detach().norm() * (rotation_matrix(u, v) @ row))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_value_is_the_code_exactly_and_the_gradient_that_of_the_formula(kind):
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 5, dtype=torch.float64)
    out = ESTIMATORS[kind](x, q)
    expected = written_out(x, q, kind)
    assert torch.equal(out, q)
    torch.testing.assert_close(expected, q.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, g)[0] for o in (out, expected)), rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(ESTIMATORS[kind](x, q), q, g, allow_unused=True)[0] is None


def test_rotation_preserves_the_angle_between_gradient_and_code():
    x, q, g = torch.randn(3, 20, 6, dtype=torch.float64).unbind(0)
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(rotate_to(x, q), x, g)
    torch.testing.assert_close(
        F.cosine_similarity(grad_x, x.detach(), dim=-1), F.cosine_similarity(g, q, dim=-1), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("x,q", [([0.0, 0.0], [1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0]), ([1.0, 2.0], [-1.0, -2.0])])
def test_rotation_is_finite_at_zero_and_opposite_vectors(x, q):
    x = torch.tensor([x], requires_grad=True)
    rotate_to(x, torch.tensor([q])).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_dtype_and_round_once(dtype):
    x, q, g = torch.randn(3, 50, 16).to(dtype).unbind(0)
    half, full = x.clone().requires_grad_(), x.float().requires_grad_()
    (grad_half,) = torch.autograd.grad(rotate_to(half, q), half, g)
    (grad_full,) = torch.autograd.grad(rotate_to(full, q.float()), full, g.float())
    assert grad_half.dtype == dtype
    assert torch.equal(grad_half, grad_full.to(dtype))


def quantized_loss(x, codebook, gradient):
    q, _, loss = quantize(x, codebook, gradient=gradient)
    return (q.sin() * torch.arange(q.shape[-1])).sum() + loss


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_quantize_under_func_grad_and_vmap(gradient):
    x, codebook = torch.randn(3, 7, 8), torch.randn(5, 8)
    rows, codes = x[0].clone().requires_grad_(), codebook.clone().requires_grad_()
    quantized_loss(rows, codes, gradient).backward()
    grads = grad(quantized_loss, argnums=(0, 1))(x[0], codebook, gradient)
    torch.testing.assert_close(grads, (rows.grad, codes.grad))
    batched = vmap(grad(lambda x: quantized_loss(x, codebook, gradient)))(x)
    torch.testing.assert_close(batched, torch.stack([grad(quantized_loss)(b, codebook, gradient) for b in x]))


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_quantize_second_derivative_holds_the_rotation_constant(gradient):
    x, codebook = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def by_formula(x):
        q, _, loss = quantize(x, codebook)
        return (written_out(x, q, gradient).sin() * torch.arange(4)).sum() + loss

    def inner(f):
        return lambda x: grad(f)(x).sin().sum()

    second = grad(inner(lambda x: quantized_loss(x, codebook, gradient)))(x)
    leaf = x.clone().requires_grad_()  # the formula loops over rows: plain autograd
    (first,) = torch.autograd.grad(by_formula(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(first.sin().sum(), leaf)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("gradient", ESTIMATORS)
def test_functional_transforms_inside_compiled_code(gradient):
    """torch.compile would drop gradients of an autograd.Function here, and refuses vmap of one."""
    x, codebook = torch.randn(3, 7, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)

    def estimated(x, codebook):
        return (ESTIMATORS[gradient](x, codebook[:1].expand_as(x)).sin() * torch.arange(8)).sum()

    def quantized(x, codebook):
        return quantized_loss(x, codebook, gradient)

    for function, arguments in (
        (grad(estimated), (x[0], codebook)),
        (grad(lambda x, c: grad(estimated)(x, c).sin().sum()), (x[0], codebook)),
        (grad(quantized, (0, 1)), (x[0], codebook)),
        (vmap(grad(quantized, (0, 1)), in_dims=(0, None)), (x, codebook)),
    ):
        torch._dynamo.reset()  # all transformed functions share one code object, which may be compiled a few times only
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_quantize_in_functional_call_trains_the_codebook():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codebook = torch.nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            q, _, loss = quantize(x, self.codebook)
            return q.square().sum() + loss

    model, x = Model(), torch.randn(9, 8)
    grads = grad(lambda p: torch.func.functional_call(model, p, (x,)))(dict(model.named_parameters()))
    indices = quantize(x, model.codebook)[1]
    expected = torch.zeros(5, 8)
    for row, k in zip(x, indices, strict=True):
        expected[k] += 2 * (model.codebook[k].detach() - row) / x.numel()
    torch.testing.assert_close(grads["codebook"], expected)
    loss = quantize(x, model.codebook, codebook_grad=False)[2]
    assert not torch.autograd.grad(loss, model.codebook)[0].any()


def test_quantize_row_weight_zero_leaves_a_row_out_of_the_loss():
    x, codebook = torch.randn(6, 4), torch.randn(5, 4)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1])
    torch.testing.assert_close(quantize(x, codebook, row_weight=weight)[2], quantize(x[weight > 0], codebook)[2])


def test_errors():
    with pytest.raises(ValueError, match="gradient must be one of rotation, straight_through, got 'gumbel'"):
        quantize(torch.randn(2, 3), torch.randn(4, 3), gradient="gumbel")
    for estimator in ESTIMATORS.values():
        with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3,\)"):
            estimator(torch.randn(2, 3), torch.randn(3))
