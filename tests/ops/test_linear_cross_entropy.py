import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import _C, reference
from metarec_fast.ops import linear_cross_entropy
from metarec_fast.ops.linear_cross_entropy import cuda

SHAPES = [(1, 1, 1), (3, 17, 1), (17, 3, 3), (65, 130, 17), (130, 95, 64), (50, 97, 65), (64, 1700, 130), (0, 5, 4)]


def problem(T, V, D, bias=True):
    """h, table, bias or None, targets and a weight a row, float32. Logits have a spread of about 2."""
    h, table = torch.randn(T, D), torch.randn(V, D) * 2 / D**0.5
    return h, table, torch.randn(V) if bias else None, torch.randint(V, (T,)), torch.randn(T)


def loss_and_gradients(run, h, table, bias, targets, weight, dtype=torch.float32):
    inputs = [x.to(dtype).requires_grad_() for x in (h, table, bias) if x is not None]
    loss = run(inputs[0], inputs[1], targets, *inputs[2:])
    return loss, *torch.autograd.grad(loss, inputs, weight.to(dtype))


def second_gradients(run, h, table, bias, targets, weight, dtype=torch.float32):
    """Gradients, in the weight and all inputs, of a linear function of the first gradients."""
    inputs = [x.to(dtype).requires_grad_() for x in (weight, h, table, bias) if x is not None]
    loss = run(inputs[1], inputs[2], targets, *inputs[3:])
    first = torch.autograd.grad(loss, inputs[1:], inputs[0], create_graph=True)
    generator = torch.Generator().manual_seed(1)
    total = sum((g * torch.randn(g.shape, generator=generator).to(dtype)).sum() for g in first)
    return torch.autograd.grad(total, inputs)


def assert_near(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest element, with which rounding scales: small elements are sums of large ones."""
    for a, e in zip(actual, expected, strict=True):
        scale = float(e.detach().abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_loss_and_gradients_match_float64(shape, bias):
    case = problem(*shape, bias)
    actual = loss_and_gradients(linear_cross_entropy, *case)
    assert_near(actual, loss_and_gradients(reference.linear_cross_entropy, *case, dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_second_gradients_match_float64(shape, bias):
    case = problem(*shape, bias)
    actual = second_gradients(linear_cross_entropy, *case)
    assert_near(actual, second_gradients(reference.linear_cross_entropy, *case, dtype=torch.float64))


OPTIONS = {
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "weighted mean": {"reduction": "mean", "weighted": True},
    "ignored": {"ignored": 0.4},
    "ignored mean": {"reduction": "mean", "ignored": 0.4},
    "smooth": {"label_smoothing": 0.2},
    "everything": {"reduction": "mean", "weighted": True, "ignored": 0.4, "label_smoothing": 0.1},
}


def with_options(run, case, options, *, second=False, dtype=torch.float32):
    """Loss and gradients in h, table, bias and the row weights, or gradients of a function of those."""
    h, table, bias, targets, weight = case
    inputs = [x.to(dtype).requires_grad_() for x in (h, table, bias, weight) if x is not None]
    keywords = {name: value for name, value in options.items() if name not in ("weighted", "ignored")}
    if options.get("weighted"):
        keywords["row_weight"] = inputs[-1].abs()
    else:
        inputs = inputs[:-1]
    if "ignored" in options:
        # nothing of such a row may count, and the mark need not be the default one
        ignored = torch.arange(len(targets)) % 5 < 5 * options["ignored"]
        targets, keywords["ignore_index"] = targets.masked_fill(ignored, -7), -7
    loss = run(inputs[0], inputs[1], targets, None if bias is None else inputs[2], **keywords)
    first = torch.autograd.grad(loss.square().sum(), inputs, create_graph=second)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs) if second else (loss.detach(), *first)


@pytest.mark.parametrize("second", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(7, 17, 1), (65, 130, 17), (230, 310, 64)], ids=str)
@pytest.mark.usefixtures("poison")
def test_options_match_float64(shape, options, second):
    for bias in (False, True):
        case = problem(*shape, bias)
        actual = with_options(linear_cross_entropy, case, options, second=second)
        expected = with_options(reference.linear_cross_entropy, case, options, second=second, dtype=torch.float64)
        assert_near(actual, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_options_are_those_of_torch(reduction):
    h, table, bias, targets, _ = (x.double() if x.is_floating_point() else x for x in problem(20, 31, 5))
    targets = targets.masked_fill(torch.arange(20) % 3 == 0, -100)
    for smoothing in (0.0, 0.3):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        expected = torch.nn.functional.cross_entropy(h @ table.T + bias, targets, **options)
        torch.testing.assert_close(reference.linear_cross_entropy(h, table, targets, bias, **options), expected)
        actual = linear_cross_entropy(h.float(), table.float(), targets, bias.float(), **options)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poison")
def test_ignored_rows_are_not_looked_at():
    h, table, bias, targets, _ = problem(50, 130, 9)
    ignored = torch.arange(50) % 3 == 0
    h[ignored] = torch.nan
    marked = targets.masked_fill(ignored, -100)
    for reduction in ("none", "mean"):
        inputs = [x.clone().requires_grad_() for x in (h, table, bias)]
        loss = linear_cross_entropy(inputs[0], inputs[1], marked, inputs[2], reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), inputs)
        kept = linear_cross_entropy(h[~ignored], table, targets[~ignored], bias, reduction=reduction)
        torch.testing.assert_close(loss if reduction == "mean" else loss[~ignored], kept)
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][ignored].any()
        if reduction == "none":
            assert not loss[ignored].any()
    nothing = linear_cross_entropy(h, table, torch.full((50,), -100), bias, reduction="mean")
    assert nothing.isnan()


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_over_no_rows_is_nan_and_a_sum_zero(backend, dtype):
    h, table = torch.empty(0, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    arguments = (h, table, torch.empty(0, dtype=torch.int64))
    assert linear_cross_entropy(*arguments, reduction="mean", backend=backend).isnan()
    assert linear_cross_entropy(*arguments, reduction="sum", backend=backend) == 0


def test_a_mean_scales_with_what_follows_it():
    """backward() takes the gradients of the forward pass as they are only if nothing follows the mean."""
    h, table, bias, targets, _ = problem(30, 200, 8)
    inputs = [x.requires_grad_() for x in (h, table, bias)]
    loss = linear_cross_entropy(h, table, targets, bias, reduction="mean")
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for p, t, a in zip(plain, tripled, again, strict=True):
        torch.testing.assert_close(3 * p, t)
        assert torch.equal(p, a)


@pytest.mark.parametrize("shape", [(900, 5, 3), (900, 100, 64), (40, 2000, 9)], ids=str)
@pytest.mark.usefixtures("poison")
def test_without_gradients_the_value_is_the_same(shape):
    h, table, bias, targets, _ = problem(*shape)
    value = linear_cross_entropy(h, table, targets, bias, reduction="mean")
    assert not value.requires_grad
    for x in (h, table, bias):
        x.requires_grad_()
        assert torch.equal(linear_cross_entropy(h, table, targets, bias, reduction="mean"), value)


def test_beyond_the_memory_for_exponentials():
    """A table too large for them computes its logits twice, with the results of the separate passes."""
    h, table, bias, targets, _ = problem(7, 45_000, 3)
    inputs = [x.requires_grad_() for x in (h, table, bias)]
    actual = torch.autograd.grad(linear_cross_entropy(h, table, targets, bias, reduction="sum"), inputs)
    expected = torch.autograd.grad(linear_cross_entropy(h, table, targets, bias).sum(), inputs)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batches_of_states_over_one_table_are_one_call(reduction, monkeypatch):
    hs, table, bias, targets, _ = problem(36, 40, 5)
    hs, targets = hs.view(4, 9, 5), targets.view(4, 9)
    rows = []
    for name in ("forward", "backward", "sum"):
        run = getattr(_C, f"linear_cross_entropy_{name}")
        monkeypatch.setattr(
            _C, f"linear_cross_entropy_{name}", lambda x, *rest, run=run: (rows.append(x), run(x, *rest))
        )

    def loss(h, y):
        return linear_cross_entropy(h, table, y, bias, reduction=reduction).square().sum()

    grad, value = torch.vmap(torch.func.grad_and_value(loss))(hs, targets)
    assert len(rows) == (2 if reduction == "none" else 1)
    each = [torch.func.grad_and_value(loss)(h, y) for h, y in zip(hs, targets, strict=True)]
    torch.testing.assert_close((grad, value), tuple(map(torch.stack, zip(*each, strict=True))))


@pytest.mark.parametrize("shape", [(96, 500, 64), (200, 2000, 64)], ids=str)
def test_errors_in_units_of_rounding(shape):
    """Relative to the largest element: the loss within 2 eps, gradients within 16 eps."""
    case = problem(*shape)
    options = OPTIONS["mean"]
    actual = with_options(linear_cross_entropy, case, options)
    expected = with_options(reference.linear_cross_entropy, case, options, dtype=torch.float64)
    errors = [
        float((a.double() - e).abs().max() / e.abs().max()) / torch.finfo(torch.float32).eps
        for a, e in zip(actual, expected, strict=True)
    ]
    assert errors[0] <= 2.0
    assert max(errors[1:]) <= 16.0


@pytest.mark.parametrize("given", [(True, True, True), (True, False, False), (False, True, True)], ids=str)
def test_composed_second_gradient_equals_the_fused_one(given, monkeypatch):
    """What stands in for a kernel on a GPU, here on CPU tensors, in several runs of rows."""
    monkeypatch.setattr(cuda, "ELEMENTS", 1000)
    h, table, bias, targets, grad = problem(20, 130, 17)
    targets[3], h[3] = -100, torch.nan
    _, lse = torch.ops.metarec_fast.linear_cross_entropy(h, table, targets, bias, -100)
    by = [torch.randn_like(x) if g else None for x, g in zip((h, table, bias), given, strict=True)]
    for needs in ((True, True, True), (True, False, False)):
        args = (grad, h, table, targets, bias, lse, *by, -100, *needs)
        fused = torch.ops.metarec_fast.linear_cross_entropy_double_backward(*args)
        assert_near(cuda.double_backward(*args), fused)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["h", "table", "bias", "h and bias"])
@pytest.mark.usefixtures("poison")
def test_gradients_of_some_inputs(wanted):
    """What nobody asks for is not computed, and what is asked for does not change: first and second order."""
    *inputs, targets, weight = problem(20, 130, 17)

    def gradients(run, dtype):
        xs = [x.to(dtype) for x in inputs]
        leaves = [xs[i].requires_grad_() for i in wanted]
        first = torch.autograd.grad(run(xs[0], xs[1], targets, xs[2]), leaves, weight.to(dtype), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    actual = gradients(linear_cross_entropy, torch.float32)
    assert_near(actual, gradients(reference.linear_cross_entropy, torch.float64))


def test_float64_is_the_reference_and_passes_gradcheck():
    h, table, bias, targets, _ = problem(4, 5, 3)
    inputs = [x.double().requires_grad_() for x in (h, table, bias)]
    run = lambda h, table, bias: linear_cross_entropy(h, table, targets, bias)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    assert torch.equal(run(*inputs), reference.linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2]))


def test_large_logits_do_not_overflow():
    h, table, bias, targets, weight = problem(40, 200, 16)
    case = (h * 300, table, bias, targets, weight)
    actual = loss_and_gradients(linear_cross_entropy, *case)
    expected = loss_and_gradients(reference.linear_cross_entropy, *case, dtype=torch.float64)
    assert expected[0].abs().max() > 1000
    # a logit of 1e3 carries a rounding error of about 1e-4, and a probability has it as a relative one
    assert_near(actual, expected, tolerance=2e-4)


def test_small_losses_keep_their_digits():
    """A confident row has a loss far below the rounding of its logits."""
    targets = torch.arange(6)
    logits = torch.eye(6) * torch.tensor([8.0, 10.0, 12.0, 13.0, 14.0, 15.0])
    loss = linear_cross_entropy(torch.eye(6), logits.T.contiguous() + 1000.0, targets)
    expected = reference.linear_cross_entropy(torch.eye(6).double(), logits.T.double() + 1000.0, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=6e-8)


def test_items_of_bias_minus_infinity_are_left_out():
    h, table, bias, targets, weight = problem(30, 300, 8)
    keep = torch.arange(300) % 3 != 1
    keep[targets] = True
    bias = bias.masked_fill(~keep, -torch.inf)
    loss, grad_h, grad_table, grad_bias = loss_and_gradients(linear_cross_entropy, h, table, bias, targets, weight)
    inside = loss_and_gradients(
        reference.linear_cross_entropy, h, table[keep], bias[keep], (keep.cumsum(0) - 1)[targets], weight, torch.float64
    )
    assert_near((loss, grad_h, grad_table[keep], grad_bias[keep]), inside)
    assert not grad_table[~keep].any()
    assert not grad_bias[~keep].any()


def test_not_a_number_shows_in_its_row_only():
    h, table, bias, targets, _ = problem(20, 200, 8)
    h[3, 2] = torch.nan
    loss = linear_cross_entropy(h, table, targets, bias)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert linear_cross_entropy(h, table.index_fill(0, torch.tensor([150]), torch.nan), targets, bias).isnan().all()


@pytest.mark.usefixtures("poison")
def test_rows_of_zero_weight_add_nothing():
    h, table, bias, targets, weight = problem(100, 130, 9)
    ignored = torch.arange(100) % 4 == 0
    h[ignored] = torch.nan
    _, grad_h, *grads = loss_and_gradients(
        linear_cross_entropy, h, table, bias, targets, weight.masked_fill(ignored, 0.0)
    )
    case = (h[~ignored], table, bias, targets[~ignored], weight[~ignored])
    expected = loss_and_gradients(reference.linear_cross_entropy, *case, dtype=torch.float64)
    assert_near((grad_h[~ignored], *grads), expected[1:])
    assert not grad_h[ignored].any()


def test_exponential_within_two_units_in_the_last_place():
    # with h = 0, lse = 0 and one row of gradient 1, grad_bias is exp(bias)
    x = torch.cat((torch.linspace(-87.3, 88.0, 200_001), torch.tensor([0.0, -0.0]), torch.linspace(-1e-3, 1e-3, 2001)))
    x = torch.cat((x, torch.tensor([-88.0, -1e30, -torch.inf])))
    _, _, actual = torch.ops.metarec_fast.linear_cross_entropy_backward(
        torch.ones(1), torch.zeros(1, 1), torch.zeros(len(x), 1), torch.tensor([len(x) - 1]), x, torch.zeros(1),
        -100, False, False, True,
    )  # fmt: skip
    assert actual[-3:].tolist() == [0.0, 0.0, -1.0]  # the last one is the target, from which the gradient is taken
    expected = x[:-3].double().exp()
    unit = torch.ldexp(torch.ones(()), torch.frexp(expected)[1].float() - 24)
    assert ((actual[:-3].double() - expected).abs() / unit).max() <= 2.0


def test_does_not_depend_on_the_number_of_threads():
    case = problem(150, 1700, 33)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                (
                    *loss_and_gradients(linear_cross_entropy, *case),
                    *second_gradients(linear_cross_entropy, *case),
                    *with_options(linear_cross_entropy, case, OPTIONS["everything"]),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_strided_and_expanded_inputs():
    h, table, bias, targets, weight = problem(20, 130, 6)
    case = (h.T.contiguous().T, table.T.contiguous().T, bias[:1].expand(130), targets, weight[:1].expand(20))
    actual = loss_and_gradients(linear_cross_entropy, *case)
    assert_near(actual, loss_and_gradients(reference.linear_cross_entropy, *case, dtype=torch.float64))


def test_functional_gradients_and_vmap():
    h, table, bias, targets, weight = problem(9, 40, 5)

    def total(run, h, table, bias):
        return (run(h, table, targets, bias) * weight.to(h.dtype)).sum()

    def curvature(run, h, table, bias):
        grads = torch.func.grad(total, argnums=(1, 2, 3))(run, h, table, bias)
        return sum(g.square().sum() for g in grads)

    for function in (total, curvature):
        grad = torch.func.grad(function, argnums=(1, 2, 3))
        expected = grad(reference.linear_cross_entropy, h.double(), table.double(), bias.double())
        assert_near(grad(linear_cross_entropy, h, table, bias), expected)

        hs, tables = torch.stack((h, -h, 2 * h)), torch.stack((table, table, table.flip(0)))
        batched = torch.vmap(lambda h, t, grad=grad: grad(linear_cross_entropy, h, t, bias))(hs, tables)
        each = [grad(linear_cross_entropy, h_s, t_s, bias) for h_s, t_s in zip(hs, tables, strict=True)]
        assert_near(batched, [torch.stack(parts) for parts in zip(*each, strict=True)], tolerance=1e-6)


def test_inner_adaptation_matches_float64():
    """The exact meta gradient: through a step of gradient descent on h and table."""
    h, table, bias, targets, _ = problem(30, 120, 7)

    def after_a_step(run, h, table):
        step_h, step_table = torch.func.grad(
            lambda h, table: run(h, table, targets, bias.to(h.dtype)).mean(), argnums=(0, 1)
        )(h, table)
        return run(h - step_h, table - step_table, targets.flip(0), bias.to(h.dtype)).mean()

    grad = torch.func.grad(after_a_step, argnums=(1, 2))
    assert_near(grad(linear_cross_entropy, h, table), grad(reference.linear_cross_entropy, h.double(), table.double()))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_without_breaks_and_without_recompiling(reduction):
    def loss(h, table, targets, bias):
        return linear_cross_entropy(h, table, targets, bias, reduction=reduction).square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for T in (5, 12, 33):
        h, table, bias, targets, _ = problem(T, 50, 6)
        inputs = [x.requires_grad_() for x in (h, table, bias)]
        grads = torch.autograd.grad(compiled(h, table, targets, bias), inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(loss(h, table, targets, bias), inputs))
    assert counter.frame_count == 1


def test_functional_gradients_inside_compiled_code():
    """torch.compile would drop the gradient of an autograd.Function here: exact by the reference, or an error."""
    h, table, bias, targets, _ = problem(12, 50, 6)

    def loss(h, table, backend):
        return linear_cross_entropy(h, table, targets, bias, backend=backend).square().sum()

    def after_a_step(h, table, backend):
        return loss(h - 0.01 * torch.func.grad(loss)(h, table, backend), table, backend)

    for function in (loss, after_a_step):
        torch._dynamo.reset()
        grad = torch.func.grad(function, argnums=(0, 1))
        compiled = torch.compile(grad, fullgraph=True, backend="aot_eager")
        assert_near(compiled(h, table, "auto"), grad(h, table, "auto"))
        with pytest.raises(RuntimeError, match="has no gradient where torch"):
            torch.compile(grad, fullgraph=True, backend="aot_eager")(h, table, "cpu")


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_opcheck(bias):
    h, table, bias, targets, weight = problem(5, 30, 4, bias)
    ops = torch.ops.metarec_fast
    _, lse = ops.linear_cross_entropy(h, table, targets, bias, -100)
    first = (weight, h, table, targets, bias, lse)
    torch.library.opcheck(ops.linear_cross_entropy.default, (h, table, targets, bias, -100))
    torch.library.opcheck(ops.linear_cross_entropy_sum.default, (*first[1:5], weight, -100, True, False, True))
    torch.library.opcheck(ops.linear_cross_entropy_backward.default, (*first, -100, True, False, True))
    torch.library.opcheck(
        ops.linear_cross_entropy_double_backward.default, (*first, h, table, None, -100, True, True, False)
    )


def test_third_derivative_names_the_option():
    h, table, bias, targets, _ = problem(5, 30, 4)

    def third(backend):
        run = lambda h: linear_cross_entropy(h, table, targets, bias, backend=backend).sum()  # noqa: E731
        square = lambda f: lambda h: torch.func.grad(f)(h).square().sum()  # noqa: E731
        return torch.func.grad(square(square(run)))(h)

    with pytest.raises(RuntimeError, match="third one pass backend='reference'"):
        third("auto")
    assert third("reference").isfinite().all()


_OTHER_ISA = """
import sys, torch
from metarec_fast import _C
from metarec_fast.ops import linear_cross_entropy
case = torch.load(sys.argv[1], weights_only=True)
inputs = [x.requires_grad_() for x in case[:3]]
results = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    loss = linear_cross_entropy(inputs[0], inputs[1], case[3], inputs[2])
    first = torch.autograd.grad(loss, inputs, case[4], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    total = linear_cross_entropy(inputs[0], inputs[1], case[3], inputs[2], row_weight=case[4], reduction="sum")
    results.append([x.detach() for x in (loss, *first, *second, total, *torch.autograd.grad(total, inputs))])
assert all(map(torch.equal, *results)), "results depend on the number of threads"
torch.save([_C.active_isa(), results[0]], sys.argv[2])
"""


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_every_instruction_set_matches_float64(isa, tmp_path):
    h, table, bias, targets, weight = problem(150, 1230, 33)
    torch.save([h, table, bias, targets, weight], tmp_path / "case.pt")
    subprocess.run(
        [sys.executable, "-c", _OTHER_ISA, tmp_path / "case.pt", tmp_path / "out.pt"],
        env={**os.environ, "METAREC_FAST_ISA": isa},
        check=True,
    )
    ran, actual = torch.load(tmp_path / "out.pt", weights_only=True)
    assert ran == isa
    inputs = [x.double().requires_grad_() for x in (h, table, bias)]
    loss = reference.linear_cross_entropy(inputs[0], inputs[1], targets, inputs[2])
    first = torch.autograd.grad(loss, inputs, weight.double(), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    total = (weight.double() * loss).sum()
    assert_near(actual, (loss, *first, *second, total, *first))


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory counter")
def test_memory_does_not_hold_all_logits():
    T, V, D = 600, 40_000, 8
    case = problem(T, V, D)
    loss_and_gradients(linear_cross_entropy, *case)

    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    loss_and_gradients(linear_cross_entropy, *case)
    second_gradients(linear_cross_entropy, *case)
    assert resident("VmHWM") - before < T * V * 4 / 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h, t, y, b: (h.half(), t, y, b), TypeError, "h must be float32 or float64, got float16"),
        (lambda h, t, y, b: (h, t.double(), y, b), TypeError, "table must be float32, got float64"),
        (lambda h, t, y, b: (h, t[:, :3], y, b), ValueError, r"table must be \[V, 4\] to match h, got \(30, 3\)"),
        (lambda h, t, y, b: (h, t[:0], y, b[:0]), ValueError, r"table must have at least one row, got \(0, 4\)"),
        (lambda h, t, y, b: (h, t, y.int(), b), TypeError, "targets must be int64, got int32"),
        (lambda h, t, y, b: (h, t, y[:2], b), ValueError, r"targets must be \[5\] to match h, got \(2,\)"),
        (lambda h, t, y, b: (h, t, y * 0 - 1, b), ValueError, r"targets must lie in \[0, 30\).* got -1 at position 0"),
        (lambda h, t, y, b: (h, t, y * 0 + 30, b), ValueError, r"targets must lie in \[0, 30\).* got 30 at position 0"),
        (lambda h, t, y, b: (h, t, y, b[:7]), ValueError, r"bias must be \[30\] to match table, got \(7,\)"),
        (lambda h, t, y, b: (h[0], t, y, b), ValueError, "h must have 2 dimensions"),
        (lambda h, t, y, b: (h, t, y, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
    ],
)
def test_bad_arguments(change, error, message):
    h, table, bias, targets, _ = problem(5, 30, 4)
    with pytest.raises(error, match=message):
        linear_cross_entropy(*change(h, table, targets, bias))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_weight": torch.ones(4)}, ValueError, r"row_weight must be \[5\] to match h, got \(4,\)"),
        ({"row_weight": torch.ones(5).double()}, TypeError, "row_weight must be float32, got float64"),
        ({"reduction": "max"}, ValueError, "reduction must be one of none, mean, sum, got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options(options, error, message):
    h, table, bias, targets, _ = problem(5, 30, 4)
    with pytest.raises(error, match=message):
        linear_cross_entropy(h, table, targets, bias, **options)


def test_bad_backends():
    h, table, bias, targets, _ = problem(5, 30, 4)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: backend='triton' needs tensors on a CUDA device"):
        linear_cross_entropy(h, table, targets, bias, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        linear_cross_entropy(h, table, targets, bias, backend="fast")
