from itertools import pairwise

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast.models.lru import LRUEncoder
from metarec_fast.models.sasrec import SASRecEncoder
from tests.examples import representative

LENGTHS = (3, 1, 7, 0, 4)


def encoder(name, dtype=torch.float64, layers=2):
    if name == "lru":
        return LRUEncoder(8, layers=layers, dropout=0.0).to(dtype)
    return SASRecEncoder(8, layers=layers, heads=2, dropout=0.0, max_length=7).to(dtype)


def packed(lengths=LENGTHS, dtype=torch.float64):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), 8, dtype=dtype), offsets


@pytest.mark.parametrize("name", ["lru", "sasrec"])
def test_packed_rows_equal_each_sequence_alone(name):
    model, (x, offsets) = encoder(name), packed()
    together = model(x, offsets)
    for begin, end in pairwise(offsets.tolist()):
        if end > begin:
            alone = model(x[begin:end], torch.tensor([0, end - begin]))
            torch.testing.assert_close(together[begin:end], alone)


@pytest.mark.parametrize("name", ["lru", "sasrec"])
def test_causal(name):
    model, (x, offsets) = encoder(name), packed((6,))
    before = model(x, offsets)
    changed = x.clone()
    changed[4] += torch.randn(8, dtype=x.dtype)
    after = model(changed, offsets)
    torch.testing.assert_close(after[:4], before[:4])
    assert (after[4:] - before[4:]).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("name", ["lru", "sasrec"])
def test_gradients_to_second_order(name):
    model, (x, offsets) = encoder(name), packed((3, 2))
    torch.autograd.gradgradcheck(lambda x: model(x, offsets), (x.requires_grad_(),))


@pytest.mark.parametrize("name", ["lru", "sasrec"])
def test_empty_batch(name):
    model = encoder(name)
    assert model(torch.zeros(0, 8, dtype=torch.float64), torch.tensor([0])).shape == (0, 8)


def test_sasrec_refuses_longer_segments():
    x, offsets = packed((8,))
    with pytest.raises(ValueError, match="at most max_length = 7 rows, got one with 8"):
        encoder("sasrec")(x, offsets)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got dim 8 and heads 3"):
        SASRecEncoder(8, layers=1, heads=3, dropout=0.0, max_length=7)


def test_lru_eigenvalues_start_on_the_ring():
    layer = LRUEncoder(32, layers=1, dropout=0.0).layers[0][0]
    modulus = torch.exp(-torch.exp(layer.log_decay))
    assert modulus.min() >= 0.8 and modulus.max() <= 0.99


@pytest.mark.parametrize("name", representative(["lru", "sasrec"], ["sasrec"]))
def test_compiled_equals_eager_and_does_not_recompile_for_each_length(name):
    counter = CompileCounterWithBackend("aot_eager")
    model = encoder(name, torch.float32, layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for lengths in ((3, 1, 5), (2, 5, 3, 2)):
        x, offsets = packed(lengths, torch.float32)
        results = []
        for run in (model, compiled):
            y = run(x, offsets)
            weighted = (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum()
            grads = torch.autograd.grad(weighted, list(model.parameters()))
            results.append((y, grads))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0


@pytest.mark.slow  # inductor's C++ compiler takes the time, so the forward pass alone
@pytest.mark.parametrize("name", ["lru", "sasrec"])
def test_inductor_equals_eager(name):
    model = encoder(name, torch.float32, layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for lengths in ((3, 1, 5), (2, 5, 3, 2)):
            x, offsets = packed(lengths, torch.float32)
            torch.testing.assert_close(compiled(x, offsets), model(x, offsets), rtol=1e-4, atol=1e-5)
