import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import reference
from metarec_fast.ops import linear_scan
from metarec_fast.ops.linear_scan import _backward_composed

WIDTHS = [1, 5, 83]  # 83: whole blocks of vectors, single vectors and single channels on every instruction set
LENGTHS = [(3, 1, 5), (0, 2, 0, 4, 0), (1,), (0,), tuple(range(40)), ()]


def problem(lengths, width=5, dtype=torch.float64):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    a = torch.rand(2, width, dtype=dtype) - 0.5  # |a| < 1, or rounding errors grow with the length
    u = torch.randn(int(offsets[-1]), 2, width, dtype=dtype)
    return a, u, offsets


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.usefixtures("poison")
def test_matches_reference(width, lengths, reverse, dtype):
    a, u, offsets = problem(lengths, width, dtype)
    expected = reference.linear_scan(a, u, offsets, reverse=reverse)
    torch.testing.assert_close(linear_scan(a, u, offsets, reverse=reverse), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poison")
def test_gradients_match_float64(dtype, width, lengths, reverse):
    a, u, offsets = problem(lengths, width)
    weight = torch.randn_like(u)

    def gradients(scan, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (a, u)]
        h = scan(*inputs, offsets, reverse=reverse)
        return torch.autograd.grad((h * weight.to(dtype)).sum() + 0 * inputs[0].sum() + 0 * inputs[1].sum(), inputs)

    # the definition of no rows depends on nothing, hence the zeros added to both
    tolerance = 2e-4 if dtype == torch.float32 else 1e-11  # sums over up to 780 products of size 1
    for x, y in zip(gradients(linear_scan, dtype), gradients(reference.linear_scan, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=tolerance)


def test_sums_over_long_segments_keep_their_digits():
    a, u, offsets = problem((20_000, 3), 4, torch.float32)
    a = a.abs()
    u = u.abs()  # nothing cancels in the sums
    grads = [
        torch.func.grad(lambda a, u=u: linear_scan(a, u.to(a.dtype), offsets)[:, 0].sum())(a.to(dtype)).double()
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6 * float(grads[1].abs().max()))


def test_does_not_depend_on_the_number_of_threads():
    a, u, offsets = problem((700, 3, 0, *range(1, 40)), 83, torch.float32)
    weight = torch.randn_like(u)
    inputs = (a.requires_grad_(), u.requires_grad_())
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            h = linear_scan(*inputs, offsets)
            first = torch.autograd.grad(h, inputs, weight, create_graph=True)
            results.append((h, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_backward_of_cuda_is_that_of_the_cpu():
    """The composition that stands in where there is no kernel, here on CPU tensors."""
    for reverse in (False, True):
        a, u, offsets = problem((3, 0, 1, 4, 0))
        h, grad_h = linear_scan(a, u, offsets, reverse=reverse), torch.randn_like(u)
        actual = torch.ops.metarec_fast.linear_scan_backward(a, h, grad_h, offsets, reverse)
        torch.testing.assert_close(actual, _backward_composed(a, h, grad_h, offsets, reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_first_and_second_order(reverse):
    a, u, offsets = problem((3, 0, 1, 4), width=2)
    run = lambda a, u: linear_scan(a, u, offsets, reverse=reverse)  # noqa: E731
    inputs = (a.requires_grad_(), u.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradient_equals_reference():
    a, u, offsets = problem((3, 0, 1, 4, 0))
    weight = torch.randn_like(u)
    grads = [
        torch.func.grad(lambda a, u, scan=scan: (scan(a, u, offsets) * weight).sum(), argnums=(0, 1))(a, u)
        for scan in (linear_scan, reference.linear_scan)
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_vmap_over_transitions_and_inputs():
    offsets = torch.tensor([0, 3, 7])
    a, u = torch.randn(4, 2, 3, dtype=torch.float64), torch.randn(7, 2, 3, dtype=torch.float64)
    batched = torch.vmap(lambda a: linear_scan(a, u, offsets))(a)
    torch.testing.assert_close(batched, torch.stack([linear_scan(a_s, u, offsets) for a_s in a]))
    grad = torch.vmap(torch.func.grad(lambda a, u: linear_scan(a, u, offsets).square().sum()), in_dims=(0, None))(a, u)
    loop = [torch.func.grad(lambda a: linear_scan(a, u, offsets).square().sum())(a_s) for a_s in a]
    torch.testing.assert_close(grad, torch.stack(loop))

    def curvature(a, u):
        return torch.func.grad(lambda a: linear_scan(a, u, offsets).square().sum())(a).square().sum()

    for dims in ((0, None), (0, 0)):
        us = u if dims[1] is None else torch.stack([u, -u, 2 * u, u.flip(0)])
        batched = torch.vmap(torch.func.grad(curvature, argnums=(0, 1)), in_dims=dims)(a, us)
        each = [torch.func.grad(curvature, argnums=(0, 1))(a[s], u if dims[1] is None else us[s]) for s in range(4)]
        torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))))


def test_compiles_without_breaks_and_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda a, u, o: linear_scan(a, u, o).square().sum(), fullgraph=True, dynamic=True, backend=counter
    )
    for lengths in ((3, 4), (4, 1, 6), (9, 9, 9, 9)):
        a, u, offsets = problem(lengths, dtype=torch.float32)
        a.requires_grad_()
        (grad,) = torch.autograd.grad(compiled(a, u, offsets), a)
        (expected,) = torch.autograd.grad(linear_scan(a, u, offsets).square().sum(), a)
        torch.testing.assert_close(grad, expected)
    assert counter.frame_count == 1


def test_opcheck():
    a, u, offsets = problem((3, 2))
    torch.library.opcheck(torch.ops.metarec_fast.linear_scan.default, (a, u, offsets, False))
    torch.library.opcheck(torch.ops.metarec_fast.linear_scan_backward.default, (a, u, u, offsets, True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a, u, o: (a, u.half(), o), TypeError, "u must be float32 or float64, got float16"),
        (lambda a, u, o: (a[:, :3], u, o), ValueError, r"a must be \[2, 5\] to match u, got \(2, 3\)"),
        (lambda a, u, o: (a, u, o.int()), TypeError, "offsets must be int64, got int32"),
        (lambda a, u, o: (a, u, o + 1), ValueError, "offsets must rise from 0 to the number of rows"),
        (lambda a, u, o: (a, u, o.flip(0)), ValueError, "offsets must rise from 0 to the number of rows"),
        (lambda a, u, o: (a, u[:, 0], o), ValueError, "u must have 3 dimensions"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        linear_scan(*change(*problem((3, 2))))
    a, u, offsets = problem((3, 2))
    with pytest.raises(RuntimeError, match="linear_scan has no Triton kernel"):
        linear_scan(a, u, offsets, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        linear_scan(a, u, offsets, backend="fast")


def test_functional_gradients_inside_compiled_code_are_refused():
    """torch.compile would drop the gradient of an autograd.Function here."""
    a, u, offsets = problem((3, 1, 5))
    torch._dynamo.reset()
    gradient = torch.func.grad(lambda a, u: linear_scan(a, u, offsets).square().sum(), argnums=(0, 1))
    with pytest.raises(RuntimeError, match=r"linear_scan loses its gradient where torch\.compile traces torch\.func"):
        torch.compile(gradient, fullgraph=True, backend="aot_eager")(a, u)
    a.requires_grad_(), u.requires_grad_()
    compiled = torch.compile(
        lambda a, u: linear_scan(a, u, offsets).square().sum(), fullgraph=True, backend="aot_eager"
    )
    expected = gradient(a.detach(), u.detach())
    torch.testing.assert_close(torch.autograd.grad(compiled(a, u), (a, u)), expected)
