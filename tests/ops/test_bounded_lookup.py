import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops import RowBounds, bounded_lookup_


def bounds(rows=6, codes=5, dim=3, heads=1):
    return RowBounds.empty(rows=rows, heads=heads, codes=codes, dim=dim, neighbours=3)


@pytest.mark.parametrize("shape", [(1, 9, 40, 3), (2, 33, 300, 8), (1, 20, 70, 65)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-2, 1.0])
def test_equals_reference(shape, spread, poison):
    H, V, K, D = shape
    state = RowBounds.empty(rows=V, heads=H, codes=K, dim=D, neighbours=8)
    x, codebook = torch.randn(H, V, D), torch.randn(H, K, D)
    for _ in range(8):
        ids = torch.randint(V, (V,))
        indices, work = bounded_lookup_(state, ids, x[:, ids], codebook)
        assert torch.equal(indices, reference.nearest_codeword(x[:, ids], codebook)[0])
        assert 0 <= work.proven <= H * V and work.searched * K <= work.distances
        x, codebook = x + spread * torch.randn_like(x), codebook + spread * torch.randn_like(codebook)


def test_work_is_counted():
    state, ids = bounds(), torch.arange(6)
    x, codebook = torch.randn(6, 3), 10 * torch.eye(5, 3).roll(1, 0) + torch.arange(5)[:, None]
    assert bounded_lookup_(state, ids, x, codebook)[1] == (6 * 5, 0, 6)
    # each row and each code is compared with its former self
    assert bounded_lookup_(state, ids, x, codebook)[1] == (6 + 5, 6, 0)
    # rows that are not finite: found out by that distance, then searched by nearest_codeword
    x[2] = float("nan")
    assert bounded_lookup_(state, ids, x, codebook)[1] == (6 + 5 + 5, 5, 1)
    # a codebook that is not finite: all of them are
    codebook[4, 0] = float("inf")
    assert bounded_lookup_(state, ids, x, codebook)[1] == (5 + 6 * 5, 0, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.arange(4)}, ValueError, r"ids must be \[6\] to match x, got \[4\]"),
        ({"ids": torch.arange(6).int()}, TypeError, "ids must be int64, got int32"),
        ({"ids": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, r"ids must have 1 dimensions, got shape \(6, 1\)"),
        ({"ids": torch.arange(1, 7)}, ValueError, r"ids must be in 0\.\.5, got 1\.\.6"),
        ({"ids": torch.arange(-1, 5)}, ValueError, r"ids must be in 0\.\.5, got -1\.\.4"),
        ({"ids": torch.arange(6, device="meta")}, ValueError, "ids must be on cpu, got meta"),
        ({"codebook": torch.randn(4, 3)}, ValueError, r"codebook must be \[5, 3\], got \[4, 3\]"),
        ({"codebook": torch.randn(5, 2)}, ValueError, "codebook must be .* to match x"),
        (
            {"x": torch.randn(2, 6, 3), "codebook": torch.randn(2, 5, 3)},
            ValueError,
            r"codebook must be \[5, 3\], got \[2, 5, 3\]",
        ),
        ({"x": torch.zeros(6, 3, dtype=torch.int64)}, TypeError, "x must be .* got int64"),
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"ids": torch.arange(6), "x": torch.randn(6, 3), "codebook": torch.randn(5, 3)} | change
    with pytest.raises(error, match=message):
        bounded_lookup_(bounds(), **arguments)
