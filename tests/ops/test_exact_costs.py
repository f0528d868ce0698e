import pytest
import torch

from metarec_fast.ops.exact_costs import exact_costs
from metarec_fast.reference.nearest_codeword import costs


@pytest.mark.parametrize("metric", ["distance", "product"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bits_of_the_definition(metric, dtype):
    x, codebook = torch.randn(2, 5, 9).to(dtype), torch.randn(2, 7, 9).to(dtype)
    x[0, 1, 3], codebook[1, 2, 0], codebook[0, 4, 8] = float("nan"), float("inf"), -float("inf")
    before = x.clone(), codebook.clone()
    got = exact_costs(x, codebook, metric)
    assert got.dtype == torch.float64
    assert torch.equal(got, costs(x, codebook, metric))
    assert got.isinf().any() and got.isfinite().any()
    for now, then in zip((x, codebook), before, strict=True):  # the sums are formed in place, not in the arguments
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
