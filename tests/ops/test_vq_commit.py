import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import reference
from metarec_fast.ops import nearest_codeword, vq_commit
from metarec_fast.ops.vq_commit import vq_commit_with_health

SHAPES = [((), 7, 5, 3), ((), 100, 40, 8), ((3,), 33, 31, 17), ((2,), 50, 9, 70), ((), 1, 1, 1), ((), 0, 4, 3)]


def problem(heads=(), N=11, K=6, D=4, dtype=torch.float64):
    return torch.randn(*heads, N, D, dtype=dtype), torch.randn(*heads, K, D, dtype=dtype)


def objective(commit, **options):
    """A scalar that reads loss and quantized rows, so that every gradient path carries something."""

    def run(x, codebook):
        quantized, _, loss = commit(x, codebook, **options)
        return 3 * loss + (quantized.square() * torch.arange(1.0, 1 + quantized.shape[-1])).sum()

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poison")
def test_equals_reference(shape, dtype, weighted):
    x, codebook = problem(*shape, dtype=dtype)
    weight = torch.rand(shape[1]) if weighted else None
    found = vq_commit(x, codebook, row_weight=weight)
    quantized, indices, loss = reference.vq_commit(x, codebook, row_weight=weight)
    assert found.quantized.dtype == dtype and found.loss.dtype == loss.dtype and found.loss.dim() == 0
    assert torch.equal(found.indices, indices) and torch.equal(found.quantized, quantized)
    torch.testing.assert_close(found.loss, loss)


def test_half_rows_with_a_float32_codebook():
    x, codebook = problem(N=60, K=20, D=9, dtype=torch.float32)
    found = vq_commit(x.bfloat16(), codebook)
    assert found.quantized.dtype == torch.bfloat16 and found.loss.dtype == torch.float32
    error = x.bfloat16().float() - codebook[found.indices]
    torch.testing.assert_close(found.loss, error.square().mean())


def test_weights_are_multiplicities_and_masks():
    x, codebook = problem(N=5)
    count = torch.tensor([2, 0, 1, 3, 1])
    repeated = vq_commit(x.repeat_interleave(count, 0), codebook).loss
    torch.testing.assert_close(vq_commit(x, codebook, row_weight=count.double()).loss, repeated)
    mask = count > 1
    torch.testing.assert_close(vq_commit(x, codebook, row_weight=mask).loss, vq_commit(x[mask], codebook).loss)
    assert vq_commit(x, codebook, row_weight=torch.zeros(5)).loss == 0


@pytest.mark.parametrize("commit", [vq_commit, reference.vq_commit])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_broken_row_of_weight_zero_does_not_matter(commit, broken, heads):
    x, codebook = problem(heads, N=6)
    x[..., 2, 1] = broken
    weight, kept = torch.tensor([1.0, 2, 0, 1, 0, 3]).double(), torch.tensor([0, 1, 3, 4, 5])
    results = []
    for rows, w in ((x, weight), (x[..., kept, :], weight[kept])):
        leaves = [t.clone().requires_grad_() for t in (rows, codebook, w)]
        loss = commit(leaves[0], leaves[1], row_weight=leaves[2], codebook_grad=True)[2]
        results.append((loss, *torch.autograd.grad(loss, leaves, create_graph=True)))
        second = torch.autograd.grad(results[-1][1].pow(3).sum(), leaves[0])[0]
        assert second.isfinite().all() and results[-1][3].isfinite().all()
    (loss, grad_x, grad_codebook, grad_weight), expected = results
    assert not grad_x[..., 2, :].any()
    torch.testing.assert_close(
        (loss, grad_x[..., kept, :], grad_codebook, grad_weight[kept]), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("codebook_grad", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_first_and_second_order_equal_reference(heads, codebook_grad, weighted):
    x, codebook = (t.requires_grad_() for t in problem(heads))
    options = {"codebook_grad": codebook_grad, "row_weight": torch.rand(11) if weighted else None}
    results = []
    for commit in (vq_commit, reference.vq_commit):
        first = torch.autograd.grad(objective(commit, **options)(x, codebook), (x, codebook), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), (x, codebook))
        results.append((first, second))
    torch.testing.assert_close(results[0], results[1])


def test_gradients_are_derivatives():
    # with codebook_grad nothing is held constant, so finite differences must agree; indices stay put
    x, codebook = (t.requires_grad_() for t in problem())
    run = objective(vq_commit, codebook_grad=True)
    assert torch.autograd.gradcheck(run, (x, codebook))
    assert torch.autograd.gradgradcheck(run, (x, codebook))


def test_what_carries_gradient():
    x, codebook = (t.requires_grad_() for t in problem(N=9, D=5))
    weight = torch.rand(9, dtype=torch.float64, requires_grad=True)
    quantized, indices, loss = vq_commit(x, codebook, row_weight=weight)
    grad_x, grad_codebook, grad_weight = torch.autograd.grad(loss, (x, codebook, weight), retain_graph=True)
    share = (weight / weight.sum() / 5).detach()
    torch.testing.assert_close(grad_x, 2 * (x - quantized).detach() * share[:, None])
    assert not grad_codebook.any() and grad_weight.any()
    grad_x, grad_codebook = torch.autograd.grad(quantized.sum(), (x, codebook))
    assert not grad_x.any()
    torch.testing.assert_close(
        grad_codebook, torch.bincount(indices, minlength=6).double()[:, None].expand(6, 5).contiguous()
    )


def test_backward_after_the_codebook_moved_in_place():
    x, codebook = problem(dtype=torch.float32)
    x.requires_grad_()
    loss, expected = (vq_commit(x, codebook).loss for _ in range(2))
    (expected,) = torch.autograd.grad(expected, x)
    codebook.add_(1)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("codebook_grad", [False, True])
def test_vmap_of_grad(in_dims, codebook_grad):
    x, codebook = problem((4,))
    x, codebook = x if in_dims[0] == 0 else x[0], codebook if in_dims[1] == 0 else codebook[0]
    gradient = torch.func.grad(objective(vq_commit, codebook_grad=codebook_grad), argnums=(0, 1))
    batched = torch.vmap(gradient, in_dims=in_dims)(x, codebook)
    expected = torch.func.grad(objective(reference.vq_commit, codebook_grad=codebook_grad), argnums=(0, 1))
    for b in range(4):
        one = expected(x[b] if in_dims[0] == 0 else x, codebook[b] if in_dims[1] == 0 else codebook)
        torch.testing.assert_close(tuple(g[b] for g in batched), one)


def test_grad_of_grad():
    x, codebook = problem()
    inner = lambda commit: lambda x: torch.func.grad(objective(commit))(x, codebook).pow(3).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(inner(vq_commit))(x), torch.func.grad(inner(reference.vq_commit))(x))


def test_compiles_without_breaks_and_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")
    run = objective(vq_commit, codebook_grad=True)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for N in (3, 8, 21):
        x, codebook = (t.requires_grad_() for t in problem(N=N, dtype=torch.float32))
        grads = [torch.autograd.grad(f(x, codebook), (x, codebook)) for f in (compiled, run)]
        torch.testing.assert_close(grads[0], grads[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize("codebook_grad", [False, True])
def test_functional_transforms_inside_compiled_code(codebook_grad):
    """torch.compile would drop gradients of an autograd.Function here, and refuses vmap of one."""
    x, codebook = problem((3,), N=7)
    weight = torch.tensor([1.0, 0, 1, 2, 1, 0, 1])
    x[:, 1] = float("nan")

    def run(x, codebook):
        quantized, _, loss = vq_commit(x, codebook, row_weight=weight, codebook_grad=codebook_grad)
        return 3 * loss + (quantized.square() * torch.arange(1.0, 5)).sum()

    first = torch.func.grad(run, argnums=(0, 1))
    second = torch.func.grad(lambda x, c: torch.func.grad(run)(x, c).pow(3).sum())
    for function, arguments in (
        (first, (x[0], codebook[0])),
        (second, (x[0], codebook[0])),
        (torch.vmap(first, in_dims=(0, None)), (x, codebook[0])),
    ):
        torch._dynamo.reset()  # all transformed functions share one code object, which may be compiled a few times only
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_result_does_not_depend_on_the_number_of_threads():
    x, codebook = problem((2,), 700, 130, 20, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(torch.ops.metarec_fast.vq_commit.default(x, codebook))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_row_of_nan_gets_a_valid_index():
    x, codebook = problem(N=3, dtype=torch.float32)
    x[1] = float("nan")
    found = vq_commit(x, codebook)
    assert found.indices[1] == 0 and torch.equal(found.quantized[1], codebook[0]) and found.loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, codebook = problem((2,), dtype=dtype)
    torch.library.opcheck(torch.ops.metarec_fast.vq_commit.default, (x, codebook))
    assert torch.equal(vq_commit(x, codebook).indices, nearest_codeword(x, codebook).indices)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook": torch.ones(6, 3)}, ValueError, r"codebook must be \[K, 4\] to match x, got \(6, 3\)"),
        ({"x": torch.ones(11, 4).long()}, TypeError, "x must be float32 or .* got int64"),
        ({"row_weight": torch.ones(10)}, ValueError, r"row_weight must be \[11\] to match x, got \(10,\)"),
        ({"row_weight": torch.ones(11, 1)}, ValueError, "row_weight must have 1 dimensions"),
        ({"row_weight": torch.ones(11).int()}, TypeError, "row_weight must be float32 or .* or bool, got int32"),
        ({"backend": "triton"}, RuntimeError, "vq_commit: backend='triton' needs tensors on a CUDA device"),
    ],
)
def test_bad_arguments(change, error, message):
    x, codebook = problem()
    with pytest.raises(error, match=message):
        vq_commit(**{"x": x, "codebook": codebook, **change})


@pytest.mark.parametrize("shape", [(130, 40, 12), (64, 300, 24), (1, 3, 5), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poison")
def test_health(shape, dtype):
    x, codebook = problem((2,), *shape, dtype)
    commit, health = vq_commit_with_health(x, codebook)
    assert torch.equal(commit.indices, vq_commit(x, codebook).indices)
    margin = reference.nearest_codeword(x, codebook)[1][:, ::64]
    assert health.margin.dtype == torch.float32
    torch.testing.assert_close(health.margin, margin.sum(-1) / max(1, margin.shape[1]), rtol=1e-4, atol=1e-4)
    assert health.rechecked.shape == () and 0 <= health.rechecked.item() <= x.shape[0] * x.shape[1]


def test_health_counts_rows_that_float32_does_not_decide():
    x, codebook = torch.zeros(100, 32), torch.ones(50, 32)
    codebook[torch.arange(1, 50), torch.arange(1, 50) % 32] = -1  # all at one distance from zero
    assert vq_commit_with_health(x, codebook)[1].rechecked.item() == 100
    assert vq_commit_with_health(torch.randn(1000, 32), torch.randn(50, 32))[1].rechecked.item() < 100


def test_health_under_vmap_is_of_the_whole_batch():
    x, codebook = torch.randn(3, 100, 8), torch.randn(20, 8)
    quantized = torch.vmap(lambda x: vq_commit_with_health(x, codebook)[0].quantized)(x)
    assert torch.equal(quantized, vq_commit(x.flatten(0, 1), codebook).quantized.view_as(x))
