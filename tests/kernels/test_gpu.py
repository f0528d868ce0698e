"""The kernels and the operators over them on a CUDA device, against float64 and against the CPU."""

import pytest
import torch

from metarec_fast import ops, reference
from metarec_fast.kernels import nearest_codeword as kernel
from metarec_fast.kernels.vq_commit import vq_commit
from metarec_fast.kernels.vq_statistics import vq_statistics

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
SHAPES = [
    (1, 1, 1, 2),
    (3, 37, 5, 8),
    (2, 0, 5, 8),
    (1, 1000, 257, 33),
    (2, 5000, 700, 64),
    (1, 3000, 300, 130),
    (1, 500, 100, 520),
]


@pytest.fixture(params=["screened", "by size"])
def path(request, monkeypatch):
    if request.param == "screened":
        monkeypatch.setattr(kernel, "_REFINE_ALL", 0)


def data(H, N, K, D, dtype, kind):
    x, codebook = torch.randn(H, N, D), torch.randn(H, K, D)
    if kind == "offset":
        x, codebook = x + 300, codebook + 300
    elif kind == "lengths":
        codebook *= 10.0 ** -torch.randint(0, 40, (H, K, 1))
        codebook[:, ::3] = 0
    elif kind == "ties":
        x, codebook = x.round().clamp(-1, 1), codebook.round().clamp(-1, 1)
        codebook[:, K // 2 :] = codebook[:, : K - K // 2]
    return x.to(dtype).cuda(), codebook.to(dtype).cuda()


@pytest.mark.parametrize("kind", ["normal", "offset", "ties", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("H", "N", "K", "D"), SHAPES)
@pytest.mark.parametrize("metric", ["distance", "product"])
def test_nearest_codeword(path, H, N, K, D, dtype, kind, metric):
    x, codebook = data(H, N, K, D, dtype, kind)
    indices, margin = kernel.nearest_codeword(x, codebook, metric=metric)
    expected, expected_margin = reference.nearest_codeword(x, codebook, metric=metric)
    assert torch.equal(indices, expected)
    if kind == "normal":
        torch.testing.assert_close(margin, expected_margin, rtol=1e-4, atol=1e-5 * D)


def test_repeats_to_the_bit():
    # the list of undecided rows is filled in any order; the result may not show it
    x, codebook = data(2, 20000, 600, 64, torch.float32, "ties")
    first = kernel.nearest_codeword(x, codebook)
    for _ in range(3):
        again = kernel.nearest_codeword(x, codebook)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_operators_agree_with_the_cpu(dtype):
    x, codebook = torch.randn(20000, 64).to(dtype), torch.randn(700, 64).to(dtype)
    cpu, gpu = ops.nearest_codeword(x, codebook), ops.nearest_codeword(x.cuda(), codebook.cuda())
    assert torch.equal(cpu.indices, gpu.indices.cpu())
    for metric in ("product", "distance"):
        cpu, gpu = (ops.vq_commit(*pair, metric=metric) for pair in ((x, codebook), (x.cuda(), codebook.cuda())))
        assert torch.equal(cpu.quantized, gpu.quantized.cpu())
        torch.testing.assert_close(cpu.loss, gpu.loss.cpu())
    cpu = ops.vq_statistics(x, cpu.indices, 700)
    gpu = ops.vq_statistics(x.cuda(), gpu.indices, 700)
    assert torch.equal(cpu.counts, gpu.counts.cpu())
    torch.testing.assert_close(cpu.sums, gpu.sums.cpu(), rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_finite():
    x, codebook = torch.randn(1, 3000, 64).cuda(), torch.randn(1, 700, 64).cuda()
    x[0, ::7, 5], x[0, 1::7, 6] = float("nan"), float("inf")
    indices, margin = kernel.nearest_codeword(x, codebook)
    expected, _ = reference.nearest_codeword(x, codebook)
    assert torch.equal(indices, expected)
    assert (margin[0, ::7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("H", "N", "K", "D"), SHAPES)
def test_vq_commit(H, N, K, D, dtype):
    x, codebook = torch.randn(H, N, D).to(dtype).cuda(), torch.randn(H, K, D).cuda()
    quantized, indices, row_error, *_ = vq_commit(x, codebook)
    expected, _ = reference.nearest_codeword(x, codebook)
    codes = codebook.gather(1, expected[..., None].expand(H, N, D))
    assert torch.equal(indices, expected)
    assert torch.equal(quantized, codes.to(dtype))
    torch.testing.assert_close(row_error, (x.double() - codes).square().sum(-1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("H", "N", "K", "D"), SHAPES)
def test_vq_statistics_repeats_to_the_bit(H, N, K, D, dtype, weighted):
    x = torch.randn(H, N, D).to(dtype).cuda()
    x[:, 2::9, 1] = float("nan")
    indices = torch.randint(-1, K, (H, N)).cuda()
    indices[:, : N // 2] = K - 1
    row_weight = torch.rand(N).cuda() if weighted else None
    counts, sums = vq_statistics(x, indices, K, row_weight)
    weight = None if row_weight is None else row_weight.cpu()
    expected = reference.vq_statistics(x.cpu().double(), indices.cpu(), K, row_weight=weight)
    torch.testing.assert_close(counts.cpu(), expected[0].float(), rtol=1e-5 if weighted else 0, atol=0)
    torch.testing.assert_close(sums.cpu(), expected[1].float(), rtol=1e-4, atol=1e-3)
    again = vq_statistics(x, indices, K, row_weight)
    assert torch.equal(counts, again[0])
    assert torch.equal(sums, again[1])


def test_captured_in_a_cuda_graph():
    # a capture fails if anything waits for the device
    x, codebook = torch.randn(1, 4096, 64).cuda(), torch.randn(1, 1024, 64).cuda()

    def step():
        quantized, indices, *_ = vq_commit(x, codebook)
        return quantized, indices, *vq_statistics(x, indices, 1024)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for replayed, direct in zip(captured, step(), strict=True):
        assert torch.equal(replayed, direct)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    N, D, K = (1 << 25) + 77, 64, 16
    if torch.cuda.mem_get_info()[0] < 28 << 30:
        pytest.skip("needs 28 GB of free GPU memory")
    x = torch.empty(1, N, D, dtype=torch.bfloat16, device="cuda").normal_()
    codebook = torch.randn(1, K, D, dtype=torch.bfloat16, device="cuda")
    quantized, indices, row_error, *_ = vq_commit(x, codebook)
    counts, _ = vq_statistics(x, indices, K)
    assert counts.sum().item() == pytest.approx(N, rel=1e-6)
    tail = slice(N - 3000, N)
    expected, _ = reference.nearest_codeword(x[:, tail], codebook)
    assert torch.equal(indices[:, tail], expected)
    assert torch.equal(quantized[0, tail], codebook[0][indices[0, tail]])
    exact = (x[:, tail].double() - quantized[:, tail].double()).square().sum(-1)
    torch.testing.assert_close(row_error[:, tail], exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 1000, 64), (2, 333, 100), (1, 50, 1000)], ids=str)
@pytest.mark.parametrize("rotation", [False, True])
def test_backward_equals_the_reference(shape, rotation):
    from metarec_fast.kernels.vq_backward import vq_backward

    grad, x, quantized = (torch.randn(shape, device="cuda") for _ in range(3))
    grad_error = torch.randn(shape[:2], device="cuda")
    found = vq_backward(grad, grad_error, x, quantized, rotation=rotation)
    exact = (t.double() for t in (grad, grad_error, x, quantized))
    expected = reference.vq_backward(*exact, rotation=rotation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 300, 16), (1000, 20000, 64), (50, 3000, 257)], ids=str)
def test_target_ranks_of_integers(shape):
    # no sum rounds, so that all backends agree, and ties are real
    (B, V, D), draw = shape, lambda *size: torch.randint(-2, 3, size).float()
    h, table, bias, targets = draw(B, D), draw(V, D), draw(V), torch.randint(V, (B,))
    offsets = torch.arange(B + 1)
    lists = {"seen": (offsets * 5, torch.randint(V, (5 * B,))), "added": (offsets, torch.randint(V, (B,)), draw(B))}
    expected = ops.target_ranks(h, table, targets, bias=bias, **lists)
    on_device = {name: tuple(x.cuda() for x in csr) for name, csr in lists.items()}
    found = ops.target_ranks(h.cuda(), table.cuda(), targets.cuda(), bias=bias.cuda(), **on_device, backend="triton")
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), right)


@pytest.mark.parametrize("D", [1, 50, 64, 300])
def test_target_ranks_ties_to_the_bit_wherever_the_row_lies(D):
    h, table, bias = torch.randn(1000, D).cuda(), torch.randn(777, D).cuda(), torch.randn(777).cuda()
    targets = torch.randint(777, (1000,)).cuda()
    once = ops.target_ranks(h, table, targets, bias=bias)
    five = ops.target_ranks(h, table.repeat(5, 1), targets, bias=bias.repeat(5))
    assert torch.equal(five.greater, 5 * once.greater)
    assert torch.equal(five.equal, 5 * once.equal + 4)
    everything = (torch.arange(1001).cuda() * 777, torch.arange(777).cuda().repeat(1000))
    for counts in ops.target_ranks(h, table, targets, bias=bias, seen=everything):
        assert not counts.any()


def test_target_ranks_refuses_items_outside_the_table():
    h, table = torch.randn(3, 8).cuda(), torch.randn(20, 8).cuda()
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 20\), the rows of table, got 0 to 20"):
        ops.target_ranks(h, table, torch.tensor([0, 20, 1]).cuda())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan_equals_the_cpu_to_the_second_order(reverse, dtype):
    offsets = torch.tensor([0, 3, 3, 200, 201])
    a, u, weight = torch.rand(2, 83, dtype=dtype) - 0.5, *torch.randn(2, 201, 2, 83, dtype=dtype)

    def results(device):
        inputs = [x.to(device).requires_grad_() for x in (a, u)]
        h = ops.linear_scan(*inputs, offsets.to(device), reverse=reverse)
        first = torch.autograd.grad(h, inputs, weight.to(device), create_graph=True)
        return [x.cpu() for x in (h, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs))]

    for found, expected in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("T", "V", "D"), [(1, 1, 1), (77, 1000, 17), (900, 12_001, 64), (200, 3000, 130)])
def test_linear_cross_entropy_equals_float64_to_the_second_order(T, V, D, reduction):
    h, table, bias = torch.randn(T, D), torch.randn(V, D) * 2 / D**0.5, torch.randn(V)
    targets, weight = torch.randint(V, (T,)), torch.rand(T)
    targets[3::7] = -100

    def results(run, device, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in (h, table, bias)]
        options = {"row_weight": weight.to(device, dtype), "reduction": reduction}
        loss = run(inputs[0], inputs[1], targets.to(device), inputs[2], **options)
        first = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        return [x.cpu() for x in (loss, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs))]

    found = results(ops.linear_cross_entropy, "cuda", torch.float32)
    expected = results(reference.linear_cross_entropy, "cpu", torch.float64)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=0, atol=1e-4 * float(e.abs().max()))
    again = results(ops.linear_cross_entropy, "cuda", torch.float32)
    assert all(map(torch.equal, found[:4], again[:4]))  # loss and first gradients repeat to the bit
