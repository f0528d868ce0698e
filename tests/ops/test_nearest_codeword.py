from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import reference
from metarec_fast.ops import nearest_codeword

SHAPES = [(1, 1, 1), (7, 5, 3), (100, 256, 8), (33, 31, 17), (101, 100, 64), (50, 70, 256), (97, 1, 33), (0, 4, 3)]
INF, NAN = float("inf"), float("nan")


def duplicated(N, K, D):
    codes = torch.randn(K, D)
    codes[K // 2 :] = codes[: K - K // 2].clone()
    return torch.randn(N, D), codes


def signed_zero_duplicates(N, K, D):
    codes = torch.zeros(K, D)
    codes[K // 2 :] = -0.0
    return torch.randn(N, D), codes


def outlier(N, K, D):
    codes = 1e-6 * torch.randn(K, D)
    codes[-1] = 1e6
    return torch.randn(N, D), codes


def not_finite(N, K, D):
    x, codes = torch.randn(N, D), torch.randn(K, D)
    x[:1, 0], x[-1:, -1] = NAN, INF
    codes[K // 2, 0], codes[0, -1] = NAN, -INF
    return x, codes


def unit(N, K, D):
    return tuple(F.normalize(torch.randn(n, D), dim=-1) for n in (N, K))


def shrunk(N, K, D):
    """Codes of lengths from 1 to denormal, and zeros, as averages leave the unused ones; rows of zeros."""
    x, codes = unit(N, K, D)
    codes = codes * 10.0 ** -torch.randint(0, 46, (K, 1))
    codes[::3], x[1::4] = 0, 0
    return x, codes


def opposite(N, K, D):
    x, codes = unit(N, K, D)
    codes[K // 2 :] = -codes[: K - K // 2].clone()
    return x, codes


def one_direction(N, K, D):
    """Codes that differ in length alone, and rows along them, against them and elsewhere."""
    x, codes = unit(N, K, D)
    x[::3], x[1::3] = codes[0], -codes[0]
    return x, codes[:1] * torch.rand(K, 1)


def near_unit(N, K, D):
    """Few directions, each with many codes 1e-6 apart, stored in half precision in part."""
    x, codes = unit(N, K, D)
    codes = codes[torch.randint(max(1, K // 20), (K,))] + 1e-6 * torch.randn(K, D)
    codes[K // 2 :] = codes[K // 2 :].half().float()
    return x, codes


# What makes float32 scores lie: ties, equal and almost equal codes, offsets, extreme and non-finite values.
DATA = {
    "gaussian": lambda N, K, D: (torch.randn(N, D), torch.randn(K, D)),
    "offset": lambda N, K, D: (1000 + 1e-3 * torch.randn(N, D), 1000 + 1e-3 * torch.randn(K, D)),
    "offset_rows": lambda N, K, D: (1000 + torch.randn(N, D), torch.randn(K, D)),
    "lattice": lambda N, K, D: (torch.randint(-2, 3, (N, D)).float(), torch.randint(-2, 3, (K, D)).float()),
    "midpoints": lambda N, K, D: (torch.zeros(N, D), torch.randint(0, 2, (K, D)) * 2.0 - 1),
    "duplicated": duplicated,
    "signed_zeros": signed_zero_duplicates,
    "nearly_equal": lambda N, K, D: (torch.randn(N, D), 1e-6 * torch.randn(K, D)),
    "one_ulp": lambda N, K, D: (torch.randn(N, D), 1 + 2.0**-23 * torch.randint(0, 2, (K, D))),
    "outlier": outlier,
    "huge": lambda N, K, D: (1e30 * torch.randn(N, D), 1e30 * torch.randn(K, D)),
    "large": lambda N, K, D: (1e18 * torch.randn(N, D), 1e18 * torch.randn(K, D)),
    "tiny": lambda N, K, D: (1e-30 * torch.randn(N, D), 1e-30 * torch.randn(K, D)),
    "subnormal": lambda N, K, D: (1e-40 * torch.randn(N, D), 1e-22 * torch.randn(K, D)),
    "not_finite": not_finite,
    "unit": unit,
    "shrunk": shrunk,
    "half_stored": lambda N, K, D: (unit(N, K, D)[0], unit(N, K, D)[1].half().float()),
    "opposite": opposite,
    "one_direction": one_direction,
    "near_unit": near_unit,
}
UNIT = ("unit", "shrunk", "half_stored", "opposite", "one_direction", "near_unit")
METRICS_AND_DATA = [("distance", data) for data in DATA if data not in UNIT] + [("product", data) for data in DATA]


def check(x, codebook, metric="distance"):
    found = nearest_codeword(x, codebook, metric=metric)
    indices, margin = reference.nearest_codeword(x, codebook, metric=metric)
    assert found.indices.dtype == torch.int64 and found.margin.dtype == torch.float32
    assert torch.equal(found.indices, indices)
    alone = nearest_codeword(x, codebook, metric=metric, with_margin=False)
    assert alone.margin is None and torch.equal(alone.indices, indices)
    assert torch.equal(found.margin == 0, margin == 0)  # zero for ties, and for ties only
    assert torch.equal(found.margin.isinf(), margin.isinf())
    finite = margin.isfinite()
    # float32 scores: an error of D + 6 roundings of ||x|| ||c|| + ||c||^2 / 2, after centring, doubled by the gap
    x, codebook = x.double().nan_to_num(0, 0, 0), codebook.double().nan_to_num(0, 0, 0)
    if metric == "product":
        size = x.norm(dim=-1) * codebook.norm(dim=-1).amax(-1, keepdim=True)
    else:
        centre = codebook.mean(-2, keepdim=True)
        size = ((x - centre).norm(dim=-1) + (codebook - centre).norm(dim=-1).amax(-1, keepdim=True)).square()
    bound = 4 * (x.shape[-1] + 6) * 2.0**-24 * size + 2.0**-24 * margin.double()
    assert ((found.margin.double() - margin.double()).abs() <= bound)[finite].all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("metric", "data"), METRICS_AND_DATA)
@pytest.mark.usefixtures("poison")
def test_equals_reference(metric, data, shape):
    check(*DATA[data](*shape), metric)


def test_a_product_is_largest_whatever_the_lengths_of_the_codes():
    codebook = torch.tensor([[0.0, 0], [1, 0], [1e-30, 1e-30], [0, 3], [-0.0, 0], [1, 0]])
    x = torch.tensor([[0.4, 0.1], [0.4, 0.2], [-1, -1e-3], [-1, -1], [0, 0], [INF, 0], [NAN, 0]])
    found = nearest_codeword(x, codebook, metric="product")
    assert found.indices.tolist() == [1, 3, 0, 0, 0, 0, 0]
    # ties of equal codes, of codes that all have the product 0, and of nothing
    torch.testing.assert_close(found.margin, torch.tensor([0, 0.2, 0, 0, 0, 0, 0]))
    # what is not finite has no product, not even an infinite one
    assert nearest_codeword(x[:1], torch.tensor([[INF, 0], [NAN, 0], [-1.0, 0]]), metric="product").indices.item() == 2


def test_rows_so_far_away_that_float64_distances_tie():
    # really the second code is nearer, by less than the definition's own rounding
    x, codebook = torch.tensor([[1e10]]), torch.tensor([[0.0], [1e-7]])
    assert nearest_codeword(x, codebook).indices.item() == 0


def test_codes_of_very_different_norms():
    # those of large norm stand last in the search: candidates do not come in the order of their indices
    for _ in range(300):
        x = torch.randn(91, 8) * 10.0 ** torch.randint(-30, 30, (91, 1))
        codebook = torch.randn(100, 8) * 10.0 ** torch.randint(-10, 10, (100, 1))
        indices = reference.nearest_codeword(x, codebook)[0]
        for with_margin in (True, False):
            assert torch.equal(nearest_codeword(x, codebook, with_margin=with_margin).indices, indices)


@pytest.mark.parametrize("data", ["unit", "near_unit", "opposite", "shrunk"])
def test_products_of_many_rows_by_random_lengths(data):
    for scale in (1e-20, 1e-3, 1.0, 1e15):
        x, codebook = DATA[data](300, 700, 24)
        check(x * scale, codebook * (1 + 0.01 * torch.randn(700, 1)), "product")
    for D in (2, 8, 9):
        check(torch.randn(91, D) * 10.0 ** torch.randint(-30, 30, (91, 1)), DATA[data](1, 300, D)[1], "product")


def near_duplicates(N, K, D, spread):
    centres = torch.randn(max(1, K // 30), D)
    return torch.randn(N, D), centres[torch.randint(len(centres), (K,))] + spread * torch.randn(K, D)


@pytest.mark.parametrize("spread", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("D", [3, 8, 24, 64])
@pytest.mark.parametrize("metric", ["distance", "product"])
def test_clusters_of_near_duplicate_codes(spread, D, metric):
    for rows in (1000, 30):
        check(*near_duplicates(rows, 600, D, spread), metric)
    x, codebook = near_duplicates(500, 600, D, spread)
    check(codebook[torch.randint(600, (500,))] + spread * torch.randn(500, D), codebook, metric)
    codebook[:200] = spread * torch.randn(200, D)  # collapsed, as dead codes are
    check(x, codebook, metric)


def test_cluster_whose_first_member_is_beyond_float32():
    # the distance of the first overflows, that of a member 4e14 nearer is the least
    reach = 1.8446743e19
    x = torch.tensor([[reach - 1e14]])
    cluster = torch.cat((torch.tensor([-4e14]), 4e14 + 2e12 * torch.arange(1, 20)))
    codebook = torch.cat((cluster, -torch.linspace(6e18, 9e18, 43), torch.tensor([2 * reach - 2e14])))[:, None]
    indices = reference.nearest_codeword(x, codebook)[0]
    assert torch.equal(nearest_codeword(x, codebook, with_margin=False).indices, indices)
    assert torch.equal(nearest_codeword(x, codebook).indices, indices)


@pytest.mark.parametrize(("codes", "dim", "large"), [(66, 4, 1e19), (1024, 4, 1e19), (66, 16, 3e38), (66, 4, 9e17)])
def test_margins_beside_codes_whose_scores_overflow(codes, dim, large):
    x, codebook = torch.randn(48, dim), torch.randn(codes, dim)
    codebook[1] = 0
    codebook[1, 0] = large
    if codes == 66:
        codebook[0] = -codebook[1]
    for rows in (x, 3 * x.abs()):
        found, (indices, margin) = nearest_codeword(rows, codebook), reference.nearest_codeword(rows, codebook)
        assert torch.equal(found.indices, indices)
        torch.testing.assert_close(found.margin, margin, rtol=1e-5, atol=0)


def test_score_that_overflows_half_way():
    # norms and final scores are below the largest float32, a partial sum of the nearest code's score is not
    a, b = 2.24e19 * torch.tensor([0.5, 0.866]), 2.24e19 * torch.tensor([0.866, 0.5])
    codebook, x = torch.stack((-b, b, -a, a)), 1.8e19 * torch.tensor([[-0.5, 0.866]])
    assert nearest_codeword(x, codebook).indices.item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("data", ["gaussian", "duplicated", "not_finite"])
@pytest.mark.usefixtures("poison")
def test_dtypes_and_heads(data, dtype):
    heads = [DATA[data](53, 37, 12) for _ in range(3)]
    x, codebook = (torch.stack(tensors).to(dtype) for tensors in zip(*heads, strict=True))
    check(x, codebook)
    check(x, codebook, "product")
    for h in range(3):
        assert torch.equal(nearest_codeword(x, codebook).indices[h], nearest_codeword(x[h], codebook[h]).indices)


def test_half_rows_are_compared_exactly_against_a_float32_codebook():
    x, codebook = torch.randn(200, 16).half(), torch.randn(50, 16)
    assert torch.equal(nearest_codeword(x, codebook).indices, reference.nearest_codeword(x, codebook)[0])


def test_float64_tells_apart_what_float32_cannot():
    x = torch.zeros(1, 4, dtype=torch.float64)
    codebook = torch.ones(2, 4, dtype=torch.float64)
    codebook[1, 2] -= 1e-12
    assert nearest_codeword(x, codebook).indices.item() == 1
    assert nearest_codeword(x.float(), codebook.float()).indices.item() == 0


def test_index_depends_on_the_row_alone():
    x, codebook = DATA["nearly_equal"](500, 90, 24)
    whole = nearest_codeword(x, codebook)
    for split in (1, 7, 96, 499):
        parts = [nearest_codeword(part, codebook) for part in x.split(split)]
        assert torch.equal(torch.cat([p.indices for p in parts]), whole.indices)
        assert torch.equal(torch.cat([p.margin for p in parts]), whole.margin)


def test_result_does_not_depend_on_the_number_of_threads():
    x, codebook = torch.randn(3, 700, 20), torch.randn(3, 130, 20)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(nearest_codeword(x, codebook))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.indices, results[0].indices) and torch.equal(result.margin, results[0].margin)


def test_strided_input():
    x, codebook = torch.randn(40, 30).t()[:, ::2], torch.randn(24, 20).t()[:, 4:]
    assert torch.equal(nearest_codeword(x, codebook).indices, nearest_codeword(x.clone(), codebook.clone()).indices)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 2), (2, 1)])
def test_vmap(in_dims):
    x, codebook = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    take = lambda t, dim, b: t if dim is None else t.select(dim, b)  # noqa: E731
    if in_dims[0] is None:
        x = x[0]
    if in_dims[1] is None:
        codebook = codebook[0]
    by_product = torch.vmap(partial(nearest_codeword, metric="product"), in_dims=in_dims)(x, codebook)
    batched = torch.vmap(nearest_codeword, in_dims=in_dims)(x, codebook)
    alone = torch.vmap(lambda x, c: nearest_codeword(x, c, with_margin=False).indices, in_dims=in_dims)(x, codebook)
    assert torch.equal(alone, batched.indices)
    for b in range(4):
        one = nearest_codeword(take(x, in_dims[0], b), take(codebook, in_dims[1], b))
        assert torch.equal(batched.indices[b], one.indices)
        one = nearest_codeword(take(x, in_dims[0], b), take(codebook, in_dims[1], b), metric="product")
        assert torch.equal(by_product.indices[b], one.indices) and torch.equal(by_product.margin[b], one.margin)
    nested = torch.vmap(torch.vmap(nearest_codeword, in_dims=(0, None)), in_dims=(0, 0))
    x, codebook = torch.randn(2, 3, 5, 6), torch.randn(2, 7, 6)
    expected = nearest_codeword(x.reshape(2, 15, 6), codebook).indices.view(2, 3, 5)
    assert torch.equal(nested(x, codebook).indices, expected)


def test_not_differentiable():
    x, codebook = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    assert not nearest_codeword(x, codebook).margin.requires_grad


def test_compiles_without_breaks_and_without_recompiling():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nearest_codeword, fullgraph=True, dynamic=True, backend=counter)
    codebook = torch.randn(9, 5)
    for N in (3, 8, 21):
        x = torch.randn(N, 5)
        assert torch.equal(compiled(x, codebook).indices, nearest_codeword(x, codebook).indices)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    arguments = (torch.randn(2, 6, 3, dtype=dtype), torch.randn(2, 4, 3, dtype=dtype))
    for more in ((), ("product",)):
        torch.library.opcheck(torch.ops.metarec_fast.nearest_codeword.default, arguments + more)
        torch.library.opcheck(torch.ops.metarec_fast.nearest_codeword_index.default, arguments + more)


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["gaussian", "duplicated", "offset", "lattice"])
def test_cuda_equals_cpu(data):
    pytest.importorskip("metarec_fast.kernels.nearest_codeword")
    x, codebook = DATA[data](501, 300, 48)
    assert torch.equal(nearest_codeword(x.cuda(), codebook.cuda()).indices.cpu(), nearest_codeword(x, codebook).indices)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.ones(2, 2)), TypeError, r"x must be a torch.Tensor, got list"),
        ((torch.ones(3, 2).int(), torch.ones(2, 2)), TypeError, "x must be float32 or .* got int32"),
        ((torch.ones(3), torch.ones(2, 2)), ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        ((torch.ones(3, 2), torch.ones(1, 2, 2)), ValueError, "codebook must have 2 dimensions"),
        ((torch.ones(3, 2), torch.ones(2, 5)), ValueError, r"codebook must be \[K, 2\] to match x, got \(2, 5\)"),
        ((torch.ones(4, 3, 2), torch.ones(3, 5, 2)), ValueError, r"codebook must be \[4, K, 2\] to match x"),
        ((torch.ones(3, 2), torch.ones(0, 2)), ValueError, "codebook must hold at least one code"),
        ((torch.ones(3, 2), torch.ones(2, 2, device="meta")), ValueError, "codebook must be on cpu, got meta"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        nearest_codeword(*arguments)


def test_backends():
    x, codebook = torch.randn(5, 3), torch.randn(4, 3)
    for backend in ("auto", "cpu", "reference"):
        assert torch.equal(
            nearest_codeword(x, codebook, backend=backend).indices, nearest_codeword(x, codebook).indices
        )
    with pytest.raises(RuntimeError, match="backend='triton' needs tensors on a CUDA device"):
        nearest_codeword(x, codebook, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        nearest_codeword(x, codebook, backend="fast")
    with pytest.raises(ValueError, match="metric must be 'distance' or 'product', got 'cosine'"):
        nearest_codeword(x, codebook, metric="cosine")
