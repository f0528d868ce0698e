"""Rows brought up to date at once against the steps taken one after the other."""

import pytest
import torch

from metarec_fast import reference
from metarec_fast.ops.missed_steps import Past, missed_steps_, series


def problem(V, shape, *, dtype, steps=500, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999)):
    """Rows last touched at any of the steps, their averages, and the past of all steps."""
    p, m = (torch.randn(V, *shape, dtype=dtype) for _ in range(2))
    # from far below eps to far above it
    scale = 10 ** torch.empty(V, *shape, dtype=dtype).uniform_(-14, 0)
    past = Past.empty(betas, dtype, step=0, capacity=steps)
    for _ in range(steps):
        past.record(lr=lr, weight_decay=weight_decay)
    last = torch.randint(0, steps + 1, (V,))
    last[:3] = torch.tensor([0, 1, steps])
    m[0] = scale[0] = 0
    return p, m * scale, scale.square(), last, past


def run_reference(p, m, v, last, past, *, eps, lr=1e-2, weight_decay=0.1):
    lrs = torch.full((past.step,), lr, dtype=torch.float64)
    tensors = [p.double().clone(), m.double().clone(), v.double().clone()]
    reference.missed_steps_(*tensors, last.clone(), lrs, betas=past.betas, eps=eps, weight_decay=weight_decay)
    return tensors


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.98), (0.8, 0.9999), (0.5, 0.9)])
@pytest.mark.parametrize("shape", [(64,), (70,), (3,), (), (2, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
def test_equals_the_steps_one_by_one(shape, betas, dtype, rtol):
    p, m, v, last, past = problem(200, shape, dtype=dtype, betas=betas)
    want = run_reference(p, m, v, last, past, eps=1e-8)
    missed_steps_(p, m, v, last, past, eps=1e-8)
    assert (last == 500).all()
    # a move is up to a hundred times as large as what is left of p: rounding is of the largest
    size = float(want[0].abs().max())
    torch.testing.assert_close(p.double(), want[0], rtol=0, atol=rtol * size)
    for got, expected in ((m, want[1]), (v, want[2])):
        torch.testing.assert_close(got.double(), expected, rtol=10 * rtol, atol=1e-30)


def test_only_the_rows_requested_move():
    p, m, v, last, past = problem(50, (8,), dtype=torch.float64)
    before, ids = [x.clone() for x in (p, m, v, last)], torch.tensor([7, 3, 20])
    whole = [x.clone() for x in (p, m, v, last)]
    missed_steps_(*whole, past, eps=1e-8)
    missed_steps_(p, m, v, last, past, eps=1e-8, ids=ids)
    others = torch.ones(50, dtype=torch.bool).index_fill_(0, ids, False)
    for got, old, new in zip((p, m, v, last), before, whole, strict=True):
        assert torch.equal(got[others], old[others]) and torch.equal(got[ids], new[ids])
    missed_steps_(p[:0], m[:0], v[:0], last[:0], past, eps=1e-8)


def test_results_do_not_depend_on_threads():
    given, results = problem(5000, (64,), dtype=torch.float32), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tensors = [x.clone() for x in given[:4]]
        missed_steps_(*tensors, given[4], eps=1e-8)
        results.append(tensors)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_series_is_short_and_starts_early():
    single, double = (series((0.9, 0.999), dtype) for dtype in (torch.float32, torch.float64))
    assert (single.terms, double.terms) == (10, 18)
    assert single.window < 250 and double.window < 450
    assert single.start < 100 and double.start < 300
    assert series((0.9, 0.95), torch.float32).start is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"p": torch.zeros(4, 2, dtype=torch.float16)}, TypeError, "p must be float32 or float64"),
        ({"exp_avg": torch.zeros(4, 3)}, ValueError, "exp_avg must be contiguous and"),
        ({"exp_avg_sq": torch.zeros(4, 4)[:, ::2]}, ValueError, "exp_avg_sq must be contiguous"),
        ({"last": torch.zeros(3, dtype=torch.int64)}, ValueError, "last must be contiguous and"),
        ({"last": torch.tensor([0, 0, 6, 0])}, ValueError, r"last must lie in \[0, 5\], got 6 of row 2"),
        ({"last": torch.tensor([0, -1, 0, 0])}, ValueError, "got -1 of row 1"),
        ({"ids": torch.tensor([4])}, ValueError, r"ids must lie in \[0, 4\), got 4"),
        ({"ids": torch.tensor([0.0])}, TypeError, "ids must be int64"),
    ],
    ids=str,
)
def test_arguments_are_checked(change, error, message):
    past = Past.empty((0.9, 0.999), torch.float32, step=0, capacity=5)
    for _ in range(5):
        past.record(lr=0.1, weight_decay=0.0)
    given = {name: torch.zeros(4, 2) for name in ("p", "exp_avg", "exp_avg_sq")}
    with pytest.raises(error, match=message):
        missed_steps_(**given | {"last": torch.zeros(4, dtype=torch.int64)} | change, past=past, eps=1e-8)
