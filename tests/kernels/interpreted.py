"""Run by test_interpreter.py with TRITON_INTERPRET=1: the launchers on CPU tensors against the definitions.

No bfloat16: the interpreter computes it wrongly without a word (NumPy has no such type). test_gpu.py covers it.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from metarec_fast import reference
from metarec_fast.kernels import (
    _common,
    linear_cross_entropy,
    linear_scan,
    nearest_codeword,
    target_ranks,
    vq_backward,
    vq_commit,
    vq_statistics,
)
from tests.ops.test_nearest_codeword import DATA, UNIT

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_interpreter.py instead"

slow = pytest.mark.slow

# NaN, infinity and overflow are there on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Buffers start as NaN or the smallest integer, so that a forgotten element shows."""

    def poisoned(shape, *, dtype, device):
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full(shape, fill, dtype=dtype, device=device)

    monkeypatch.setattr(_common, "empty", poisoned)


@pytest.fixture(params=["screened", "refined"])
def path(request, monkeypatch):
    """Both ways to an index: small problems would otherwise never reach the screen."""
    monkeypatch.setattr(nearest_codeword, "_REFINE_ALL", 0 if request.param == "screened" else 1 << 62)
    return request.param


@pytest.fixture
def screened(monkeypatch):
    """Small problems take the screen too."""
    monkeypatch.setattr(nearest_codeword, "_REFINE_ALL", 0)


@pytest.fixture
def undecided(monkeypatch, screened):
    """How many rows each screen left to float64."""
    counts = []
    refine = nearest_codeword._refine_rows

    def counting(x, codebook, indices, margin, rows, count, **options):
        counts.append(indices.numel() if count is None else int(count))
        refine(x, codebook, indices, margin, rows, count, **options)

    monkeypatch.setattr(nearest_codeword, "_refine_rows", counting)
    return counts


def check(x, codebook, metric="distance"):
    indices, margin = nearest_codeword.nearest_codeword(x, codebook, metric=metric)
    expected, expected_margin = reference.nearest_codeword(x, codebook, metric=metric)
    assert torch.equal(indices, expected)
    return margin, expected_margin


SHAPES = [
    (1, 1, 1, 2),
    (3, 37, 5, 8),
    (2, 0, 5, 8),
    (1, 9, 257, 33),
    (1, 130, 70, 16),
    (1, 5, 70, 64),
    (1, 5, 130, 130),
]


KINDS = [
    (torch.float32, "distance"),
    (torch.float16, "product"),
    pytest.param(torch.float32, "product", marks=slow),
    pytest.param(torch.float16, "distance", marks=slow),
]


@pytest.mark.parametrize(("H", "N", "K", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "metric"), KINDS)
def test_nearest_codeword(path, H, N, K, D, dtype, metric):
    rows = min(N, 7) if path == "refined" else N  # one at a time there, which is slow to interpret
    x, codebook = torch.randn(H, rows, D).to(dtype), torch.randn(H, K, D).to(dtype)
    margin, expected = check(x, codebook, metric)
    torch.testing.assert_close(margin, expected, rtol=1e-5, atol=1e-5 * D)


@pytest.mark.parametrize("data", UNIT)
@pytest.mark.parametrize(
    ("K", "D", "dtype"),
    [(70, 8, torch.float32), (70, 16, torch.float16), pytest.param(40, 70, torch.float32, marks=slow)],
)
def test_largest_product_whatever_the_lengths(path, data, K, D, dtype):
    x, codebook = (t[None].to(dtype) for t in DATA[data](6 if path == "refined" else 40, K, D))
    margin, expected = check(x, codebook, "product")
    torch.testing.assert_close(margin, expected, rtol=1e-5, atol=1e-6)


def test_wide_half_rows(path):
    check(torch.randn(1, 5, 200).half(), torch.randn(1, 70, 200).half())


def test_half_rows_over_a_float32_codebook(path):
    check(torch.randn(1, 9, 40).half(), torch.randn(1, 70, 40))


def test_float64(path):
    check(torch.randn(1, 5, 9, dtype=torch.float64), torch.randn(1, 7, 9, dtype=torch.float64))


def test_ties_take_the_lowest_index(path):
    x, codebook = torch.randint(-2, 3, (2, 21, 3)).float(), torch.randint(-2, 3, (2, 140, 3)).float()
    check(x, codebook, "product")
    margin, expected = check(x, codebook)
    assert (expected == 0).float().mean() > 0.5
    torch.testing.assert_close(margin, expected, rtol=0, atol=1e-5)
    assert (margin[expected == 0] == 0).all()


def test_duplicates_of_the_nearest_code(path):
    codebook = torch.randn(1, 40, 24).repeat(1, 3, 1)
    check(torch.randn(1, 9, 24), codebook)


@pytest.mark.parametrize("scale", [1e-38, 3e37, *(pytest.param(scale, marks=slow) for scale in (1e-22, 1e15, 1e25))])
def test_extreme_scales(path, scale):
    for metric in ("distance", "product"):
        check(torch.randn(1, 8, 6) * scale, torch.randn(1, 30, 6) * scale, metric)
        check(torch.randn(1, 8, 6) * scale, torch.randn(1, 30, 6), metric)
        check(torch.randn(1, 8, 6), torch.randn(1, 30, 6) * scale, metric)


def test_products_of_long_rows_with_short_codes(path):
    check(torch.randn(1, 8, 6) * 1e15, torch.randn(1, 30, 6) * 1e-23, "product")


def test_rows_and_codes_that_are_not_finite(path):
    x, codebook = torch.randn(1, 8, 6), torch.randn(1, 30, 6)
    x[0, 3, 4], x[0, 5, 0], x[0, 6, 5] = float("nan"), float("inf"), -float("inf")
    margin, expected = check(x, codebook)
    torch.testing.assert_close(margin, expected)
    check(x, codebook, "product")
    codebook[0, 7, 2], codebook[0, 8, 2] = float("nan"), float("inf")
    check(x, codebook)
    check(x, codebook, "product")
    codebook[:] = float("nan")
    check(x, codebook)
    check(x, codebook, "product")


def test_offset_far_beyond_the_spread(undecided):
    # the codes differ in their last bits only: without the centring every row would be undecided
    x, codebook = torch.randn(1, 20, 64) + 1000, torch.randn(1, 70, 64) + 1000
    check(x, codebook)
    assert undecided[-1] <= 2
    margin, expected = check(x, codebook.mul(1 - 2**-12))
    torch.testing.assert_close(margin, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("D", "dtype"), [(64, torch.float32), (64, torch.float16), pytest.param(100, torch.float32, marks=slow)]
)
def test_screen_decides_all_but_close_rows(undecided, D, dtype):
    # integers, so that the halfway points below are the same in float16
    codebook = torch.randint(-4, 5, (1, 64, D)).float()
    x = torch.randn(1, 60, D)
    x[0, :10] = (codebook[0, :10] + codebook[0, 10:20]) / 2  # as far from one code as from the other
    if dtype == torch.float32:
        x[0, :10] += 1e-6 * codebook[0, :10]
    margin, _ = check(x.to(dtype), codebook.to(dtype))
    assert 10 <= undecided[-1] <= 14
    assert margin[0, 20:].min() > 0
    check(F.normalize(x, dim=-1).to(dtype), F.normalize(codebook, dim=-1).to(dtype), "product")
    assert undecided[-1] <= 10


def test_scores_stay_within_the_stated_error(monkeypatch, screened):
    # the margin of the screen alone, against float64
    monkeypatch.setattr(nearest_codeword, "_refine_rows", lambda *_, **__: None)
    x, codebook = torch.randn(1, 128, 64) * torch.logspace(-3, 3, 64), torch.randn(1, 64, 64) * 30
    _, margin = nearest_codeword.nearest_codeword(x, codebook)
    _, expected = reference.nearest_codeword(x, codebook)
    m = codebook.mean(1, keepdim=True)
    R, C = (x - m).norm(dim=2), (codebook - m).norm(dim=2).max()
    error = 2 * R * C * (96 * 2**-22 + 2**-19) + 2**-22 * C**2
    assert ((margin - expected).abs() <= 2 * error).all()
    _, margin = nearest_codeword.nearest_codeword(x, codebook, metric="product")
    _, expected = reference.nearest_codeword(x, codebook, metric="product")
    error = 2 * R * C * (96 * 2**-22 + 2**-19) + 2**-22 * m.norm() * C
    assert ((margin - expected).abs() <= error).all()


@pytest.mark.parametrize(("H", "N", "K", "D"), SHAPES)
@pytest.mark.parametrize(("dtype", "metric"), KINDS)
def test_vq_commit(screened, H, N, K, D, dtype, metric):
    x, codebook = torch.randn(H, N, D).to(dtype), torch.randn(H, K, D)
    quantized, indices, row_error, *_ = vq_commit.vq_commit(x, codebook, metric=metric)
    expected, _ = reference.nearest_codeword(x, codebook, metric=metric)
    codes = codebook.gather(1, expected[..., None].expand(H, N, D))
    assert torch.equal(indices, expected)
    assert torch.equal(quantized, codes.to(dtype))
    exact = (x.double() - codes.double()).square().sum(-1)
    torch.testing.assert_close(row_error, exact.float(), rtol=2e-6, atol=0)


def test_a_row_does_not_depend_on_the_others(screened):
    x, codebook = torch.randn(1, 150, 20), torch.randn(1, 30, 20)
    whole = vq_commit.vq_commit(x, codebook)
    parts = [vq_commit.vq_commit(part, codebook) for part in x.split(67, dim=1)]
    # the margin is to the screen's accuracy, which NumPy's products change with their shape
    for of_whole, of_parts in list(zip(whole, zip(*parts, strict=True), strict=True))[:3]:
        assert torch.equal(of_whole, torch.cat(of_parts, 1))


@pytest.mark.parametrize(("H", "N", "K", "D"), [(1, 1, 1, 2), (3, 137, 5, 8), (2, 0, 5, 8), (1, 90, 20, 130)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pieces", [1, 32])
def test_vq_statistics(monkeypatch, H, N, K, D, weighted, pieces):
    monkeypatch.setattr(vq_statistics, "_MAX_PIECES", pieces)
    x = torch.randn(H, N, D)
    indices = torch.randint(-1, K, (H, N))
    indices[:, : N // 2] = K - 1  # one code that many rows chose
    x[:, 2::9, 1] = float("nan")
    x[:, 3::9, 0] = float("inf")
    row_weight = torch.rand(N) if weighted else None
    counts, sums = vq_statistics.vq_statistics(x, indices, K, row_weight)
    expected_counts, expected_sums = reference.vq_statistics(x.double(), indices, K, row_weight=row_weight)
    torch.testing.assert_close(counts, expected_counts.float(), rtol=1e-6 if weighted else 0, atol=0)
    torch.testing.assert_close(sums, expected_sums.float(), rtol=1e-5, atol=1e-5)


def test_vq_statistics_of_half_rows():
    x, indices = torch.randn(1, 40, 9).half(), torch.randint(0, 4, (1, 40))
    counts, sums = vq_statistics.vq_statistics(x, indices, 4)
    expected_counts, expected_sums = reference.vq_statistics(x.double(), indices, 4)
    assert torch.equal(counts, expected_counts.float())
    torch.testing.assert_close(sums, expected_sums.float(), rtol=1e-5, atol=1e-5)


def test_rows_are_added_in_their_order(monkeypatch):
    monkeypatch.setattr(vq_statistics, "_MAX_PIECES", 1)
    # 2^24 + 1 + 1 is 2^24 in float32 and 1 + 1 + 2^24 is 2^24 + 2: within one lane the order shows
    rows = 3 * vq_statistics._ROWS
    x = torch.zeros(1, rows, 1)
    x[0, 0], x[0, vq_statistics._ROWS], x[0, 2 * vq_statistics._ROWS] = 2.0**24, 1, 1
    indices = torch.zeros(1, rows, dtype=torch.int64)
    _, forward = vq_statistics.vq_statistics(x, indices, 1)
    _, backward = vq_statistics.vq_statistics(x.flip(1), indices, 1)
    assert forward[0, 0].item() == 2.0**24
    assert backward[0, 0].item() == 2.0**24 + 2


@pytest.mark.parametrize("shape", [(1, 5, 1), (2, 70, 16), (1, 33, 20), (1, 9, 300), (1, 0, 4)], ids=str)
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("given", ["both", "grad", "grad_error", "neither"])
def test_backward(shape, rotation, given):
    grad, x, quantized = (torch.randn(shape) for _ in range(3))
    if shape[-1] == 1:  # opposite directions leave the plane of the rotation to rounding
        quantized = quantized.abs() * x.sign()
    grad_error = torch.randn(shape[:2])
    grad_error[:, ::3] = 0
    x[grad_error == 0] = x[grad_error == 0] if given in ("both", "grad") else float("nan")
    grad = grad if given in ("both", "grad") else None
    grad_error = grad_error if given in ("both", "grad_error") else None
    found = vq_backward.vq_backward(grad, grad_error, x, quantized, rotation=rotation)
    expected = reference.vq_backward(grad, grad_error, x, quantized, rotation=rotation)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 5, 4), (70, 200, 16), (5, 130, 33), (3, 9, 0)], ids=str)
@pytest.mark.parametrize("with_all", [False, True])
@pytest.mark.parametrize("tiles", [1, 256])
def test_target_ranks(monkeypatch, shape, with_all, tiles):
    # integers, so that no order of sums shows, and ties are real
    monkeypatch.setattr(target_ranks, "_TILES", tiles)
    (B, V, D), draw = shape, lambda *size: torch.randint(-2, 3, size).float()
    h, table, targets = draw(B, D), draw(V, D), torch.randint(V, (B,))
    bias = seen = added = None
    if with_all:
        offsets = torch.arange(B + 1) * 3
        bias, seen = draw(V), (offsets, torch.randint(V, (3 * B,)))
        seen[1][::7] = targets[: len(seen[1][::7])] if B else seen[1][::7]
        items = torch.stack([torch.randperm(max(V, 3))[:3].sort().values for _ in range(B)]) if B else offsets[:0]
        added = (offsets, items.flatten(), draw(3 * B)) if V >= 3 else None
    lists = (*(seen or (None, None)), *(added or (None, None, None)))
    found = target_ranks.target_ranks(h, table, bias, targets, *lists)
    expected = reference.linear_target_ranks(h, table, targets, bias=bias, seen=seen, added=added)
    for ours, right in zip(found, expected, strict=True):
        assert torch.equal(ours, right)


def test_target_ranks_count_what_is_not_finite():
    h, table, targets = torch.randn(5, 8), torch.randn(90, 8), torch.arange(5)
    h[1, 2], h[3, 0] = float("nan"), 1.0
    table[70, 0] = float("inf")
    added = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([2, 30]), torch.tensor([float("inf"), float("nan")])
    *_, nonfinite = target_ranks.target_ranks(h, table, None, targets, None, None, *added)
    assert nonfinite.tolist() == [1, 90, 2, 2, 1]
    seen = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([2, 30])  # what is no candidate counts too
    *_, nonfinite = target_ranks.target_ranks(h, table, None, targets, *seen, *added)
    assert nonfinite.tolist() == [1, 90, 2, 2, 1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 5, 70])
@pytest.mark.parametrize("lengths", [(3, 1, 5), (0, 2, 0, 4, 0), (0,), (), (40, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=slow)])
def test_linear_scan(dtype, lengths, width, reverse):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    a = (torch.rand(2, width, dtype=dtype) - 0.5).requires_grad_()
    u, grad_h = torch.randn(2, int(offsets[-1]), 2, width, dtype=dtype)
    u.requires_grad_()
    h = linear_scan.linear_scan(a.detach(), u.detach(), offsets, reverse=reverse)
    expected = reference.linear_scan(a, u, offsets, reverse=reverse)
    torch.testing.assert_close(h, expected.detach())
    found = linear_scan.linear_scan_backward(a.detach(), h, grad_h, offsets, reverse=reverse)
    # the definition of no rows depends on neither
    expected = torch.autograd.grad((expected * grad_h).sum() + 0 * a.sum() + 0 * u.sum(), (a, u))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 17), (5, 1100, 70), (0, 5, 4)], ids=str)
def test_linear_cross_entropy(shape, bias):
    T, V, D = shape
    h, table = torch.randn(T, D), torch.randn(V, D) * 2 / D**0.5
    b = torch.randn(V) if bias else None
    targets, weight = torch.randint(V, (T,)), torch.randn(T)
    if T > 3:
        targets[2], h[2], weight[3] = -7, float("nan"), 0.0
    inputs = [x.double().requires_grad_() for x in (h, table, b) if x is not None]
    expected = reference.linear_cross_entropy(inputs[0], inputs[1], targets, *inputs[2:], ignore_index=-7)
    gradients = torch.autograd.grad(expected, inputs, weight.double())

    loss, lse = linear_cross_entropy.linear_cross_entropy(h, table, targets, b, -7)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for needs in ((True, True, bias), (True, False, False), (False, False, bias)):
        found = linear_cross_entropy.linear_cross_entropy_backward(weight, h, table, targets, b, lse, -7, *needs)
        for f, e, need in zip(found, gradients, needs, strict=False):
            if need:
                torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5)
            else:
                assert f.numel() == 0


SHAPES = {
    "no code": lambda: nearest_codeword.nearest_codeword(torch.randn(1, 4, 3), torch.randn(1, 0, 3)),
    "narrow codes": lambda: vq_commit.vq_commit(torch.randn(1, 4, 3), torch.randn(1, 5, 2)),
    "few indices": lambda: vq_statistics.vq_statistics(torch.randn(1, 4, 3), torch.zeros(1, 3, dtype=torch.int64), 5),
    "short gradient": lambda: vq_backward.vq_backward(
        torch.randn(1, 3, 3), None, torch.randn(1, 4, 3), torch.randn(1, 4, 3), rotation=True
    ),
    "short factor": lambda: linear_scan.linear_scan(
        torch.randn(2, 2), torch.randn(4, 2, 3), torch.tensor([0, 4]), reverse=False
    ),
    "no offsets": lambda: linear_scan.linear_scan(
        torch.randn(2, 3), torch.randn(4, 2, 3), torch.zeros(0, dtype=torch.int64), reverse=False
    ),
    "short bias": lambda: linear_cross_entropy.linear_cross_entropy(
        torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), torch.randn(4), -100
    ),
    "short table": lambda: target_ranks.target_ranks(
        torch.randn(2, 3), torch.randn(5, 2), None, torch.tensor([0, 1]), *[None] * 5
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[.*\], got \["):
        SHAPES[shape]()
