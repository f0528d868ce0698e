"""bench/exactness.py, reduced: every family of problems on every instruction set, and the check itself checked."""

import pytest
import torch

from bench.exactness import COUNTS, FAMILIES, Shape, check, plan, problem, public_operators, run_backend, totals
from metarec_fast.ops import backend_info, nearest_codeword, vq_commit
from metarec_fast.reference.nearest_codeword import METRICS

ROWS = 200_000
SUPPORTED = backend_info()["cpu"]["supported_isas"]


@pytest.mark.parametrize("isa", SUPPORTED)
def test_no_code_is_wrong(isa, everything):
    rows = (ROWS if everything else ROWS // 20) // len(SUPPORTED)
    found = run_backend(isa, list(FAMILIES), seed=7, rows=rows)
    findings = [finding for family in found.values() for finding in family["findings"]]
    assert not findings, "\n".join(findings)
    count = totals(found)
    assert set(found) == set(FAMILIES) and count["rows"] >= rows and count["problems"] > (250 if everything else 50)


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_are_what_they_claim(family):
    shapes = list(plan(family, 0, 3000, codes=(1, 5, 64), dims=(1, 8), dtypes=(torch.float32, torch.float16)))
    assert sum(shape.H * shape.N for _, shape, _ in shapes) >= 3000
    assert len({(shape.K, shape.D) for _, shape, _ in shapes}) == 6
    for seed, shape, dtype in shapes[:5]:
        x, codebook = problem(family, seed, shape, dtype)
        again, _ = problem(family, seed, shape, dtype)
        assert (
            x.shape == ((shape.H,) if shape.H > 1 else ()) + (shape.N, shape.D) and x.dtype == codebook.dtype == dtype
        )
        assert torch.equal(x.nan_to_num(7), again.nan_to_num(7))


def outcome(metric="distance", **changes):
    operators = public_operators()._replace(**changes)
    return check(*problem("gaussian", 3, Shape(2, 50, 30, 6)), operators, cuts=[20, 33], threads=(1, 1), metric=metric)


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_right_passes(metric):
    assert outcome(metric) == dict.fromkeys(COUNTS, 0) | {"rows": 100, "problems": 1}


def test_the_code_of_the_other_metric_is_wrong():
    assert outcome("product", lookup=lambda x, codebook, metric: nearest_codeword(x, codebook))["wrong"] > 10


def wrong_lookup(x, codebook, metric):
    indices, margin = nearest_codeword(x, codebook, metric=metric)
    if x.shape[-2] == 50:
        indices[1, 7] = (indices[1, 7] + 1) % 30
    return indices, margin


def with_margin_of_the_batch(x, codebook, metric):
    indices, margin = nearest_codeword(x, codebook, metric=metric)
    return indices, margin + 1e-3 * x.shape[-2]


def commit(x, codebook, weight, *, metric, flip=0.0, factor=1.0):
    quantized, indices, loss = vq_commit(x, codebook, row_weight=weight, metric=metric)
    quantized[0, :1] += flip
    return quantized, indices, loss * factor


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("changes", "caught"),
    [
        # the wrong row is not vq_commit's, nor that of the parts
        ({"lookup": wrong_lookup}, {"wrong": 1, "commit": 1, "codes": 1, "split": 1, "loss": 1}),
        ({"lookup": with_margin_of_the_batch}, {"split": 100}),
        ({"commit": lambda *a, **o: commit(*a, **o, flip=1e-6)}, {"codes": 1, "split": 2}),
        ({"commit": lambda *a, **o: commit(*a, **o, factor=1.001)}, {"loss": 1}),
    ],
)
def test_what_is_wrong_is_caught(changes, caught, metric):
    found = outcome(metric, **changes)
    first = found.pop("first", "")
    assert found == dict.fromkeys(COUNTS, 0) | {"rows": 100, "problems": 1} | caught
    assert caught.keys() == {"codes", "split"} or first
