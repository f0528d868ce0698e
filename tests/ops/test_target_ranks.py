import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast import _C, reference
from metarec_fast.ops import target_ranks
from tests.examples import examples

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float64)
SHAPES = [
    (1, 1, 1), (2, 3, 0), (0, 5, 4), (33, 13, 1), (5, 24, 7), (70, 131, 16), (40, 300, 65), (9, 9000, 3), (2100, 40, 8),
    (40, 50, 700),
]  # fmt: skip


def csr(rows, dtype=torch.int64):
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return offsets, torch.tensor([i for row in rows for i in row], dtype=dtype)


def beginnings(items, most):
    """Some of the first items of each row, as CSR."""
    lengths = torch.randint(0, most + 1, (len(items),))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    return offsets, items[torch.arange(items.shape[1]) < lengths[:, None]]


def problem(B, V, D, *, seed=0, dtype=torch.float32, bias=True, seen=True, added=True):
    """Small integers, so that no sum rounds and ties are real; histories unordered, repeated, often with the target."""
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randint(-2, 3, shape).to(dtype)  # noqa: E731
    targets = torch.randint(V, (B,))
    arguments = {"h": draw(B, D), "table": draw(V, D), "targets": targets}
    if bias:
        arguments["bias"] = draw(V)
    if seen:
        items = torch.randint(V, (B, 20))
        items[:, 3:5] = torch.where(torch.rand(B, 2) < 0.5, targets[:, None], items[:, 3:5])
        arguments["seen"] = beginnings(items, 20)
    if added:
        most = min(V, 11)
        offsets, items = beginnings(torch.rand(B, V).topk(most).indices, most)
        cases = torch.arange(B).repeat_interleave(offsets.diff())
        items = (cases * V + items).sort().values % V
        arguments["added"] = offsets, items, draw(len(items))
    return arguments


def check(arguments, **options):
    actual = target_ranks(**arguments, **options)
    expected = reference.linear_target_ranks(**arguments)
    for name, ours, right in zip(actual._fields, actual, expected, strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, right), name
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poison")
def test_equals_reference(shape, dtype):
    for bits in (0, 1, 2, 4, 7):
        check(problem(*shape, dtype=dtype, bias=bool(bits & 1), seen=bool(bits & 2), added=bool(bits & 4)))


@examples(60, derandomize=False)
@given(
    B=st.integers(0, 70), V=st.integers(1, 150), D=st.integers(0, 40), seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES), bias=st.booleans(), seen=st.booleans(), added=st.booleans(),
)  # fmt: skip
def test_equals_reference_at_any_size(B, V, D, seed, dtype, bias, seen, added):
    actual = check(problem(B, V, D, seed=seed, dtype=dtype, bias=bias, seen=seen, added=added))
    assert not actual.nonfinite.any()


def plain(B=300, V=2000, D=64, dtype=torch.float32):
    """Scores that round, and a target tied with three items at other places of other tiles."""
    h, table, bias = torch.randn(B, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)
    targets = torch.randint(V // 4, (B,))
    return {"h": h, "table": table[: V // 4].repeat(4, 1), "bias": bias[: V // 4].repeat(4), "targets": targets}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 64, 257])
def test_same_rows_tie_to_the_bit_wherever_they_lie(D, dtype):
    arguments = plain(V=500, D=D, dtype=dtype)
    greater, equal, _ = target_ranks(**arguments)
    quarter = target_ranks(**arguments | {name: arguments[name][:125] for name in ("table", "bias")})
    assert torch.equal(greater, 4 * quarter.greater)
    assert torch.equal(equal, 4 * quarter.equal + 3)
    # taken back by their own scores, again to the bit
    everything = torch.arange(0, 300 * 500 + 1, 500), torch.arange(500).repeat(300)
    for counts in target_ranks(**arguments, seen=everything)[:2]:
        assert not counts.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_zero_and_of_more_change_what_they_should(dtype):
    arguments = plain(B=50, V=400, dtype=dtype)
    B, V = 50, 400
    offsets, items = torch.arange(0, B * V + 1, V), torch.arange(V).repeat(B)
    expected = target_ranks(**arguments)
    zero = target_ranks(**arguments, added=(offsets, items, torch.zeros(B * V, dtype=dtype)))
    assert torch.equal(zero.greater, expected.greater)
    assert torch.equal(zero.equal, expected.equal)
    up = torch.where(items == arguments["targets"].repeat_interleave(V), 1e3, 0.0).to(dtype)
    assert not any(counts.any() for counts in target_ranks(**arguments, added=(offsets, items, up)))


def test_close_to_float64():
    """Only candidates whose scores are within rounding of the target's may change sides."""
    arguments = plain(V=8000)
    arguments["table"] = arguments["table"] + torch.randn(8000, 64)
    double = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
    scores = reference.linear_scores(double["h"], double["table"], bias=double["bias"])
    own = scores.gather(1, arguments["targets"][:, None])
    greater, equal, _ = target_ranks(**arguments)
    error = 66 * 2**-24 * (double["h"].norm(dim=1)[:, None] * double["table"].norm(dim=1) + double["bias"].abs())
    error = error + error.gather(1, arguments["targets"][:, None])
    assert (greater >= (scores > own + error).sum(1)).all()
    assert (greater + equal <= (scores >= own - error).sum(1) - 1).all()


def hard_problems():
    """What a screen by integers could get wrong: (name, arguments), float32."""
    B, V, D = 200, 3000, 64
    torch.manual_seed(0)
    h, table, targets = torch.randn(B, D), torch.randn(V, D), torch.randint(V, (B,))
    near = table[:50].repeat(V // 50, 1) * (1 + 2**-20 * torch.randn(V, D))
    spike = torch.randn(V, D) * torch.where(torch.arange(D) == 5, 1e4, 1.0)
    zeros = h * (torch.arange(B) % 3 > 0)[:, None]
    term = torch.arange(B + 1), targets, torch.randn(B) * 10
    yield "normal", {"h": h, "table": table, "targets": targets}
    yield "bias", {"h": h, "table": table, "targets": targets, "bias": torch.randn(V)}
    yield "a bias that decides", {"h": h * 1e-3, "table": table, "targets": targets, "bias": torch.randn(V) * 100}
    yield "near ties", {"h": h, "table": near, "targets": targets, "bias": torch.ones(V)}
    yield "one element decides", {"h": h, "table": spike, "targets": targets}
    yield "rows of zeros", {"h": zeros, "table": table, "targets": targets, "bias": torch.randn(V).sort().values}
    yield "nothing but zeros", {"h": h * 0, "table": table * 0, "targets": targets}
    yield "norms apart", {"h": h, "table": table * torch.logspace(-4, 4, V)[:, None], "targets": targets}
    yield "tiny", {"h": h * 1e-22, "table": table * 1e-22, "targets": targets}
    yield "large", {"h": h * 1e15, "table": table * 1e15, "targets": targets}
    yield "target moved", {"h": h, "table": table, "targets": targets, "added": term}
    for D in (15, 16, 17, 33, 300, 4096, 4097):
        h, table = torch.randn(40, D), torch.randn(400, D).abs()
        yield f"{D} elements", {"h": h, "table": table, "targets": targets[:40] % 400, "bias": torch.randn(400)}


@pytest.mark.parametrize("name", [name for name, _ in hard_problems()])
def test_a_score_is_compared_as_if_it_were_computed(name):
    """Against the same call in which each item is its own catalogue: too few scores for tiles and screens."""
    arguments = dict(hard_problems())[name]
    actual = target_ranks(**arguments)
    h, table, targets = (arguments[x] for x in ("h", "table", "targets"))
    bias, added = arguments.get("bias"), arguments.get("added")
    V = len(table)
    for case in range(0, len(h), 23):
        # one row with terms of zero on every item: all are taken back and counted again by their own scores
        terms = torch.zeros(V)
        if added is not None:
            terms[targets[case]] = added[2][case]
        alone = target_ranks(
            h[case : case + 1], table, targets[case : case + 1], bias=bias,
            added=(torch.tensor([0, V]), torch.arange(V), terms),
        )  # fmt: skip
        assert [int(x) for x in alone] == [int(x[case]) for x in actual]


def test_threads_and_splits_do_not_show():
    arguments = plain() | {"seen": problem(300, 2000, 0)["seen"], "added": problem(300, 2000, 0)["added"]}
    offsets, items, terms = arguments["added"]
    arguments["added"] = offsets, items, torch.randn(len(terms))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = target_ranks(**arguments)
        torch.set_num_threads(2)
        together = target_ranks(**arguments)
    finally:
        torch.set_num_threads(before)
    parts = []
    for begin, end in ((0, 1), (1, 130), (130, 300)):
        part = {name: arguments[name][begin:end] for name in ("h", "targets")}
        for name in ("seen", "added"):
            offsets, *lists = arguments[name]
            first, last = offsets[begin], offsets[end]
            part[name] = offsets[begin : end + 1] - first, *(x[first:last] for x in lists)
        parts.append(target_ranks(**arguments | part))
    for whole, other, split in zip(alone, together, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, other)
        assert torch.equal(whole, torch.cat(split))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("D", [5, 64])
def test_scores_that_are_not_finite_are_counted(D, value, dtype):
    arguments = problem(70, 300, D, dtype=dtype, added=False)
    arguments["h"][3, 2] = value
    arguments["h"][4:, 0] = 1
    for item in (17, 290, int(arguments["targets"][9])):
        arguments["table"][item, 0] = value
    expected = reference.linear_target_ranks(**arguments)
    actual = target_ranks(**arguments)
    assert actual.nonfinite[3] > 0
    assert (actual.nonfinite[4:] == len({17, 290, int(arguments["targets"][9])})).all()
    assert torch.equal(actual.nonfinite, expected[2])
    sound = actual.nonfinite == 0
    assert torch.equal(actual.greater[sound], expected[0][sound])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["h", "table", "bias"])
def test_one_value_that_is_not_finite_does_not_pass_a_screen(where, value):
    arguments = plain()
    arguments[where].view(-1)[-3] = value
    bad = torch.zeros(300, 2000, dtype=torch.bool)
    bad[-1 if where == "h" else slice(None), {"h": slice(None), "table": -1, "bias": -3}[where]] = True
    assert torch.equal(target_ranks(**arguments).nonfinite, bad.sum(1))


@pytest.mark.parametrize("where", ["added", "the target's term"])
def test_terms_that_are_not_finite_are_counted(where):
    arguments = problem(20, 60, 5, seen=False)
    target = int(arguments["targets"][4])
    item = target if where != "added" else (target + 1) % 60
    arguments["added"] = torch.tensor([0] * 5 + [1] * 16), torch.tensor([item]), torch.tensor([float("inf")])
    assert target_ranks(**arguments).nonfinite.tolist() == [0] * 4 + [1] + [0] * 15


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_terms_that_are_not_finite_are_counted_of_seen_items_too(backend, value):
    h, table = torch.ones(2, 1), torch.full((4, 1), 3e38)
    table[0] = 1.0
    seen = csr([[2, 2, 0], [2]])
    added = (*csr([[0, 2], [1, 2]]), torch.tensor([value, value, 0.0, value]))
    ranks = target_ranks(h, table, torch.tensor([0, 3]), seen=seen, added=added, backend=backend)
    assert ranks.nonfinite.tolist() == [1 if value == 3e38 else 2, 1]


def test_overflow_is_counted_and_large_scores_are_not():
    h, table = torch.tensor([[1e19], [2e19]]), torch.tensor([[1e19], [3e19], [-3e19], [1.0]])
    assert target_ranks(h, table, torch.tensor([0, 3])).nonfinite.tolist() == [0, 2]
    # beyond the bound under which no score is looked at
    greater, equal, nonfinite = target_ranks(torch.full((2, 1), 1e19), torch.full((50, 1), 3e19), torch.tensor([0, 49]))
    assert (greater.tolist(), equal.tolist(), nonfinite.tolist()) == ([0, 0], [49, 49], [0, 0])


def test_views_and_items_of_32_bits():
    arguments = problem(40, 90, 12)
    expected = target_ranks(**arguments)
    offsets, items = arguments["seen"]
    arguments |= {"seen": (offsets, items.int()), "h": arguments["h"].T.contiguous().T}
    arguments["table"] = torch.cat((arguments["table"], torch.ones(90, 3)), 1)[:, :12]
    arguments["added"] = arguments["added"][0], arguments["added"][1].int(), arguments["added"][2]
    for a, b in zip(check(arguments), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    arguments = problem(7, 20, 6, dtype=dtype)
    tensors = (arguments["h"], arguments["table"], arguments["bias"], arguments["targets"])
    torch.library.opcheck(
        torch.ops.metarec_fast.target_ranks.default, (*tensors, *arguments["seen"], *arguments["added"])
    )
    torch.library.opcheck(torch.ops.metarec_fast.target_ranks.default, (*tensors[:2], None, tensors[3], *[None] * 5))


def test_compiled_and_not_differentiated():
    arguments = problem(7, 20, 6)
    compiled = torch.compile(target_ranks, fullgraph=True, backend="aot_eager")
    for ours, right in zip(compiled(**arguments), target_ranks(**arguments), strict=True):
        assert torch.equal(ours, right)
    arguments["h"].requires_grad_()
    assert not target_ranks(**arguments).greater.requires_grad


def test_explicit_backends(monkeypatch):
    arguments = problem(7, 20, 6)
    for backend in ("cpu", "reference"):
        check(arguments, backend=backend)
    monkeypatch.setattr(sys.modules[target_ranks.__module__], "_REFERENCE_SCORES", 3 * 20)  # of three cases at a time
    for case in (arguments, problem(7, 20, 6, seen=False, added=False), problem(0, 20, 6)):
        check(case, backend="reference")
    with pytest.raises(RuntimeError, match="backend='triton' needs tensors on a CUDA device"):
        target_ranks(**arguments, backend="triton")
    with pytest.raises(RuntimeError, match="target_ranks has no Triton kernel"):
        target_ranks(**problem(7, 20, 6, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": torch.tensor([0, 1, 2, 20, 4, 5, 6])},
            r"targets must lie in \[0, 20\), the rows of table, got 0 to",
        ),
        ({"seen": csr([[0], [-1], [], [], [], [], []])}, r"seen items must lie in \[0, 20\)"),
        ({"seen": (torch.zeros(8).long(), torch.zeros(2).long())}, "offsets must rise from 0 to the number of rows"),
        ({"added": (*csr([[0], [5, 5], [], [], [], [], []]), torch.zeros(3))}, "added items must rise within each"),
    ],
)
def test_other_backends_check_what_the_extension_checks(change, message):
    with pytest.raises(ValueError, match=message):
        target_ranks(**problem(7, 20, 6) | change, backend="reference")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.zeros(7, 6).bfloat16()}, TypeError, "h must be float32 or float64, got bfloat16"),
        ({"h": torch.zeros(7)}, ValueError, "h must have 2 dimensions"),
        ({"table": torch.zeros(20, 5)}, ValueError, r"table must be \[20, 6\], got \[20, 5\]"),
        ({"table": torch.zeros(20, 6).double()}, TypeError, "table must be float32, got float64"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must be \[20\], got \[19\]"),
        ({"targets": torch.zeros(7).int()}, TypeError, "targets must be int64, got int32"),
        ({"targets": torch.zeros(6).long()}, ValueError, r"targets must be \[7\], got \[6\]"),
        ({"targets": torch.tensor([0, 1, 2, 20, 4, 5, 6])}, ValueError, r"targets must lie in \[0, 20\).*got 20 at"),
        ({"seen": torch.zeros(8).long()}, TypeError, r"seen must be \(offsets, items\), got Tensor"),
        (
            {"seen": (torch.zeros(7).long(), torch.zeros(0).long())},
            ValueError,
            r"seen offsets must be \[8\], got \[7\]",
        ),
        (
            {"seen": (torch.zeros(8).long(), torch.zeros(2).long())},
            ValueError,
            "offsets must rise from 0 to the number",
        ),
        ({"seen": (torch.tensor([0, 1, 0, 1, 1, 1, 1, 1]), torch.zeros(1).long())}, ValueError, "offsets must rise"),
        ({"seen": csr([[0], [-1], [], [], [], [], []])}, ValueError, r"seen items must lie in \[0, 20\).*got -1 at"),
        ({"seen": csr([[0.0], [], [], [], [], [], []], torch.float32)}, TypeError, "seen items must be int64 or int32"),
        ({"added": csr([[0], [], [], [], [], [], []])}, TypeError, r"added must be \(offsets, items, terms\)"),
        (
            {"added": (*csr([[0], [5, 5], [], [], [], [], []]), torch.zeros(3))},
            ValueError,
            "added items must rise within each case, got 5 after 5 in case 1",
        ),
        (
            {"added": (*csr([[0], [], [], [], [], [], []]), torch.zeros(2))},
            ValueError,
            r"added terms must be \[1\], got \[2\]",
        ),
        ({"added": (*csr([[0], [], [], [], [], [], []]), torch.zeros(1).double())}, TypeError, "added terms must be"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        target_ranks(**problem(7, 20, 6) | change)


def test_memory_does_not_grow_with_the_scores(everything):
    """256 cases and a million items: the scores would take 1 GB, and a copy of the table 64 MB."""
    script = """
import resource, sys, torch
from metarec_fast.ops import target_ranks
B, V, D = 256, int(sys.argv[1]), 16
table, h = torch.empty(V, D).random_(5), torch.empty(B, D).random_(-2, 3)
targets, seen = torch.arange(B) * (V // 257), (torch.arange(B + 1) * 2, torch.arange(2 * B) * (V // 600))
target_ranks(h, table[:1000], targets % 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
greater, equal, nonfinite = target_ranks(h, table, targets, seen=seen)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert not nonfinite.any()
for case in (0, 255):
    scores = table @ h[case]
    scores[seen[1][2 * case : 2 * case + 2]] = -torch.inf
    own = table[targets[case]] @ h[case]
    assert greater[case] == (scores > own).sum() and equal[case] == int((scores == own).sum()) - (case != 0)
print(grown)  # kilobytes
"""
    items = 10**7 if everything else 10**6
    run = subprocess.run([sys.executable, "-c", script, str(items)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 32 * 1024  # kilobytes


def test_instruction_sets_that_fuse_give_the_same_counts():
    script = """
import hashlib
from metarec_fast.ops import target_ranks
from tests.ops.test_target_ranks import hard_problems
for name, arguments in hard_problems():
    counts = b"".join(count.numpy().tobytes() for count in target_ranks(**arguments))
    print(name, hashlib.sha256(counts).hexdigest())
"""
    digests = set()
    for isa in _C.supported_isas():
        if isa == "baseline":  # rounds products
            continue
        environment = os.environ | {"METAREC_FAST_ISA": isa}
        run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout)
    assert len(digests) <= 1, digests
