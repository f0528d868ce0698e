import sys

import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops.exact_costs import exact_costs
from metarec_fast.vq import verify
from tests.ops.test_nearest_codeword import DATA, METRICS_AND_DATA

module = sys.modules["metarec_fast.vq.verify"]  # the package's attribute of this name is the function
INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1, 1), (7, 5, 3), (60, 130, 8), (33, 31, 17), (40, 70, 100), (0, 4, 3)]


def distances(x, codebook):
    return (x.double().unsqueeze(-2) - codebook.double().unsqueeze(-3)).square().sum(-1)


@pytest.fixture
def refined(monkeypatch):
    """How many distances were summed as the definition does."""
    pairs = []

    def counting(x, codebook, metric):
        pairs.append(len(x))
        return exact_costs(x, codebook, metric)

    monkeypatch.setattr(module, "exact_costs", counting)
    return lambda: sum(pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("metric", "data"), METRICS_AND_DATA)
def test_accepts_what_the_reference_gives_and_nothing_else(metric, data, shape):
    x, codebook = DATA[data](*shape)
    expected, _ = reference.nearest_codeword(x, codebook, metric=metric)
    assert verify(x, codebook, expected, metric=metric)
    for step in (1, len(codebook) // 2):
        given = (expected + step) % len(codebook)
        found = verify(x, codebook, given, metric=metric)
        wrong = given != expected
        assert found.ok == (not wrong.any()) and found.wrong == wrong.sum() and found.checked == len(x)
        assert torch.equal(found.rows, wrong.nonzero()[:, 0]) and torch.equal(found.expected, expected[wrong])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("data", ["gaussian", "duplicated", "not_finite", "lattice"])
def test_dtypes_and_heads(data, dtype):
    x, codebook = (torch.stack(t).to(dtype) for t in zip(*(DATA[data](23, 37, 12) for _ in range(3)), strict=True))
    given, _ = reference.nearest_codeword(x, codebook)
    assert verify(x, codebook, given) and verify(x, codebook, given.int())
    assert not verify(x[1], codebook[1], given[0])
    expected = given[[1, 2, 2], [4, 0, 20]]
    given[[1, 2, 2], [4, 0, 20]] = 37
    found = verify(x, codebook, given)
    assert not found and found.checked == 69 and found.rows.tolist() == [[1, 4], [2, 0], [2, 20]]
    assert torch.equal(found.expected, expected)


@pytest.mark.parametrize("metric", ["distance", "product"])
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e100, 1e150, 1e170, 1e300])
def test_float64_beyond_float32(scale, metric):
    x, codebook = (scale * t.double() for t in DATA["gaussian"](50, 40, 6))
    given, _ = reference.nearest_codeword(x, codebook, metric=metric)
    assert verify(x, codebook, given, metric=metric)
    assert verify(x, codebook, (given + 1) % 40, metric=metric).wrong == 50


def test_excess_of_a_product_is_how_much_smaller_it_is():
    x, codebook = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.25, 0], [0, 0], [0.75, 1]])
    found = verify(x, codebook, torch.tensor([0, 1]), metric="product")
    assert (found.rows.tolist(), found.expected.tolist(), found.excess.tolist()) == ([0, 1], [2, 0], [0.5, 0])
    with pytest.raises(ValueError, match="metric must be 'distance' or 'product', got 'cosine'"):
        verify(x, codebook, torch.tensor([0, 1]), metric="cosine")


def test_one_code_left_whose_distance_overflows():
    x, codebook = torch.full((1, 2), 1e200, dtype=torch.float64), torch.tensor([[NAN, 0], [0, 0]]).double()
    assert reference.nearest_codeword(x, codebook)[0].tolist() == [0]
    assert verify(x, codebook, torch.tensor([0])) and not verify(x, codebook, torch.tensor([1]))


def test_the_second_nearest_is_wrong_by_its_excess():
    x, codebook = torch.randn(500, 16), torch.randn(64, 16)
    least = distances(x, codebook).topk(2, largest=False)
    given = least.indices[:, 0].clone()
    rows = torch.tensor([0, 17, 499])
    given[rows] = least.indices[rows, 1]
    found = verify(x, codebook, given)
    assert not found.ok and not found and found.wrong == 3 and torch.equal(found.rows, rows)
    assert torch.equal(found.expected, least.indices[rows, 0])
    torch.testing.assert_close(found.excess, (least.values[:, 1] - least.values[:, 0])[rows])


def test_a_second_nearest_that_only_float64_can_tell():
    # squared distances 1 and 1 + 2^-46: equal in float32 however they are computed
    codebook = torch.tensor([[1.0, 2.0**-23], [1.0, 0.0]])
    found = verify(torch.zeros(1, 2), codebook, torch.tensor([0]))
    assert found.expected.tolist() == [1] and found.excess.tolist() == [2.0**-46]
    assert verify(torch.zeros(1, 2), codebook, torch.tensor([1]))


@pytest.mark.parametrize("equal", [True, False], ids=["equal codes", "other codes at the same distance"])
def test_the_higher_index_at_a_tie_is_wrong(equal):
    codebook = torch.tensor([[5.0, 5], [1, 0], [9, 9], [1, 0] if equal else [0, 1], [1, -0.0]])
    x = torch.zeros(3, 2)
    assert verify(x, codebook, torch.tensor([1, 1, 1]))
    found = verify(x, codebook, torch.tensor([1, 3, 4]))
    assert found.rows.tolist() == [1, 2] and found.expected.tolist() == [1, 1] and found.excess.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_indices_of_any_integer_dtype(dtype):
    x, codebook = torch.randn(9, 4), torch.randn(64, 4)
    given, _ = reference.nearest_codeword(x, codebook)
    assert verify(x, codebook, given.to(dtype)) and verify(x, codebook, (given + 1).to(dtype)).wrong == 9


@pytest.mark.parametrize("index", [-1, 64, 2**40, -(2**63)])
def test_an_index_out_of_range_is_wrong(index):
    x, codebook = torch.randn(9, 4), torch.randn(64, 4)
    given, _ = reference.nearest_codeword(x, codebook)
    given[5] = index
    found = verify(x, codebook, given)
    assert found.rows.tolist() == [5] and found.excess.tolist() == [INF]


def test_rows_and_codes_that_are_not_finite():
    x, codebook = torch.randn(4, 3), torch.randn(6, 3)
    x[1, 2], codebook[0, 1], codebook[4, 0] = NAN, INF, NAN
    given, _ = reference.nearest_codeword(x, codebook)
    assert given[1] == 0 and verify(x, codebook, given)
    given[1:3] = 4
    found = verify(x, codebook, given)
    # every code is infinitely far from the row of NaN, a code of NaN from the other
    assert found.rows.tolist() == [1, 2] and found.excess.tolist() == [0, INF]
    codebook[:5] = INF
    assert verify(x, codebook, torch.tensor([5, 0, 5, 5])) and verify(x, codebook, torch.full((4,), 5)).wrong == 1
    assert verify(x, codebook.fill_(NAN), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("elements", [1, 50, 1000])
def test_chunks_do_not_matter(monkeypatch, elements):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", elements)
    for data in ("gaussian", "lattice", "midpoints", "not_finite"):
        x, codebook = DATA[data](60, 40, 9)
        expected, _ = reference.nearest_codeword(x, codebook)
        assert verify(x, codebook, expected)
        assert verify(x, codebook, (expected + 1) % 40).wrong == 60


@pytest.mark.parametrize("data", ["gaussian", "offset", "duplicated", "signed_zeros", "nearly_equal", "outlier"])
def test_few_distances_need_the_definition(data, refined):
    x, codebook = DATA[data](2000, 256, 32)
    given, _ = reference.nearest_codeword(x, codebook)
    assert verify(x, codebook, given)
    # 512,000 pairs; codes that differ by 1e-6 still differ by far more than float64 rounds
    assert refined() <= 40


def test_ties_do_need_it(refined):
    x, codebook = torch.zeros(3, 4), torch.eye(4)
    assert verify(x, codebook, torch.zeros(3, dtype=torch.int64)) and refined() == 12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": [0, 1]}, TypeError, "indices must be a torch.Tensor, got list"),
        (
            {"indices": torch.ones(11)},
            TypeError,
            "indices must be int64 or int32 or .* uint8, got float32",
        ),
        ({"indices": torch.ones(10).long()}, ValueError, r"indices must be \[11\] to match x, got \(10,\)"),
        ({"indices": torch.ones(1, 11).long()}, ValueError, "indices must have 1 dimensions"),
        ({"codebook": torch.ones(6, 3)}, ValueError, r"codebook must be \[K, 4\] to match x, got \(6, 3\)"),
        ({"codebook": torch.ones(0, 4)}, ValueError, "codebook must hold at least one code"),
        ({"x": torch.ones(11, 4).long()}, TypeError, "x must be float32 or .* got int64"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"x": torch.randn(11, 4), "codebook": torch.randn(6, 4), "indices": torch.zeros(11).long()}
    with pytest.raises(error, match=message):
        verify(**arguments | change)
