import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops import vq_statistics

SHAPES = [((), 7, 5, 3), ((), 1500, 3, 8), ((3,), 333, 31, 17), ((2,), 50, 90, 70), ((), 1, 1, 1), ((2,), 0, 4, 3)]


def problem(heads=(), N=40, K=6, D=4, dtype=torch.float32):
    return torch.randn(*heads, N, D).to(dtype), torch.randint(-1, K, (*heads, N)), K


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.usefixtures("poison")
def test_equals_reference(shape, dtype, weighted):
    x, indices, K = problem(*shape, dtype=dtype)
    weight = torch.rand(shape[1]) if weighted else None
    found = vq_statistics(x, indices, K, row_weight=weight)
    counts, sums = reference.vq_statistics(x, indices, K, row_weight=weight)
    assert found.counts.dtype == sums.dtype and found.sums.shape == sums.shape
    if not weighted:
        assert torch.equal(found.counts, counts)
    torch.testing.assert_close(found.counts, counts)
    torch.testing.assert_close(found.sums, sums, rtol=1e-5, atol=1e-5)  # another order of float32 additions


def test_masked_and_broken_rows_are_left_out():
    x, indices, K = problem(N=6)
    indices = torch.tensor([0, 1, 1, -1, 2, 2])
    x[2, 1], x[3], x[4, 3] = float("nan"), float("nan"), -float("inf")
    counts, sums = vq_statistics(x, indices, K)
    assert counts.tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(sums[:3], x[[0, 1, 5]]) and not sums[3:].any()


def test_weights_are_multiplicities():
    x, indices, K = problem()
    count = torch.randint(0, 4, (40,))
    repeated = vq_statistics(x.repeat_interleave(count, 0), indices.repeat_interleave(count), K)
    weighted = vq_statistics(x, indices, K, row_weight=count.float())
    torch.testing.assert_close(weighted, repeated)
    mask = count > 1
    masked = vq_statistics(x, indices, K, row_weight=mask)
    torch.testing.assert_close(masked, vq_statistics(x[mask], indices[mask], K))


def test_result_does_not_depend_on_the_number_of_threads():
    x, indices, K = problem((2,), 5000, 3, 33)  # several groups of rows for each code
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(vq_statistics(x, indices, K, row_weight=x[0, :, 0]))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.counts, results[0].counts) and torch.equal(result.sums, results[0].sums)


def test_sums_of_many_rows_stay_accurate():
    x = torch.full((200_000, 1), 0.1)
    (sums,) = vq_statistics(x, torch.zeros(200_000, dtype=torch.int64), 1).sums
    torch.testing.assert_close(sums.double(), 200_000 * x[0].double(), rtol=2e-5, atol=0)


def test_vmap_equals_a_loop():
    x, indices, K = problem((3,))
    weight = torch.rand(3, 40)
    batched = torch.vmap(lambda x, i, w: vq_statistics(x, i, K, row_weight=w))(x, indices, weight)
    for b in range(3):
        one = vq_statistics(x[b], indices[b], K, row_weight=weight[b])
        assert torch.equal(batched.counts[b], one.counts) and torch.equal(batched.sums[b], one.sums)
    shared = torch.vmap(lambda i: vq_statistics(x[0], i, K))(indices)
    assert torch.equal(shared.sums[2], vq_statistics(x[0], indices[2], K).sums)


def test_compiles_without_breaks():
    x, indices, K = problem()
    compiled = torch.compile(vq_statistics, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, indices, K), vq_statistics(x, indices, K))


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted):
    x, indices, K = problem((2,))
    weight = torch.rand(2, 40) if weighted else None
    torch.library.opcheck(torch.ops.metarec_fast.vq_statistics.default, (x, indices, K, weight))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.full((40,), 6)}, ValueError, r"indices must be in -1\.\.5, got 6"),
        ({"indices": torch.full((40,), -2)}, ValueError, r"indices must be in -1\.\.5, got -2"),
        ({"indices": torch.zeros(39, dtype=torch.int64)}, ValueError, r"indices must be \(40,\) to match x"),
        ({"indices": torch.zeros(40, dtype=torch.int32)}, TypeError, "indices must be int64, got int32"),
        ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1, got 0"),
        ({"row_weight": torch.ones(3)}, ValueError, r"row_weight must be \[40\] to match x"),
    ],
)
def test_bad_arguments(change, error, message):
    x, indices, K = problem()
    with pytest.raises(error, match=message):
        vq_statistics(**{"x": x, "indices": indices, "codebook_size": K, **change})
