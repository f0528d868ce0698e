import copy

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from metarec_fast import reference
from metarec_fast.ops import bounded_lookup, nearest_codeword
from metarec_fast.vq import CodebookAssignments
from tests.examples import examples

INF, NAN = float("inf"), float("nan")


@pytest.fixture
def no_pause(monkeypatch):
    """Bounds are used, however often they fail."""
    monkeypatch.setattr(bounded_lookup, "_LONGEST_PAUSE", 0)


def slow(x, c, step):
    x += 0.02 * torch.randn_like(x)
    c += 0.01 * torch.randn_like(c)


def still(x, c, step):
    pass


def rows_only(x, c, step):
    x += 0.05 * torch.randn_like(x)


def codes_only(x, c, step):
    c += 0.02 * torch.randn_like(c)


def dead_codes(x, c, step):
    """As dead-code replacement does: one code a step becomes a row."""
    slow(x, c, step)
    h, k = step % len(c), 7 * step % c.shape[1]
    c[h, k] = x[h, 3 * step % x.shape[1]]


def half_of_the_codes_jump(x, c, step):
    slow(x, c, step)
    c[:, : c.shape[1] // 2] = torch.randn_like(c[:, : c.shape[1] // 2])


def rows_jump(x, c, step):
    slow(x, c, step)
    x[:, step % 5 :: 5] = 3 * torch.randn_like(x[:, step % 5 :: 5])


def new_codebook(x, c, step):
    c.copy_(torch.randn_like(c))


def back_and_forth(x, c, step):
    c.add_(0.3 if step % 2 else -0.3)


def permuted_codes(x, c, step):
    c.copy_(c[:, torch.randperm(c.shape[1])])


def ulps(x, c, step):
    """One float at a time: rows on the bisectors see their nearest codes change within rounding."""
    c.copy_(torch.nextafter(c, torch.where(torch.rand_like(c) < 0.5, INF, -INF)))


def lattice(x, c, step):
    for t in (x, c):
        t.copy_((t + torch.randint(-1, 2, t.shape) * (torch.rand(t.shape) < 0.1)).round().clamp(-3, 3))


def not_finite_rows(x, c, step):
    slow(x.nan_to_num_(0, 0, 0), c, step)
    x[:, step % x.shape[1], 0] = (NAN, INF, -INF)[step % 3]
    x[:, (step + 3) % x.shape[1]] = NAN


def not_finite_codes(x, c, step):
    slow(x, c.nan_to_num_(0, 0, 0), step)
    if step % 3:
        c[:, step % c.shape[1], -1] = (NAN, INF)[step % 2]


DRIFTS = [
    slow,
    still,
    rows_only,
    codes_only,
    dead_codes,
    half_of_the_codes_jump,
    rows_jump,
    new_codebook,
    back_and_forth,
    permuted_codes,
    ulps,
    lattice,
    not_finite_rows,
    not_finite_codes,
]


def gaussian(H, V, K, D):
    return torch.randn(H, V, D), torch.randn(H, K, D)


def duplicated(H, V, K, D):
    x, c = gaussian(H, V, K, D)
    c[:, K // 2 :] = c[:, : K - K // 2].clone()
    return x, c


def all_equal(H, V, K, D):
    return torch.randn(H, V, D), torch.zeros(H, K, D)


def midpoints(H, V, K, D):
    """Rows exactly between two codes, and on codes."""
    c = (8 * torch.randn(H, K, D)).round() / 8
    a, b = torch.randint(K, (2, V))
    return (c[:, a] + c[:, b]) / 2, c


def permuted_offsets(H, V, K, D):
    """All codes are equally far from a row; only the order of their squares, and so the rounding of sums, differs."""
    offset = 2.0**-20 * torch.randn(D)
    codes = torch.stack([offset[torch.randperm(D)] for _ in range(H * K)]).view(H, K, D)
    return torch.randn(H, V, 1).repeat(1, 1, D), codes


SCENES = {
    "permuted_offsets": permuted_offsets,
    "gaussian": gaussian,
    "duplicated": duplicated,
    "all_equal": all_equal,
    "midpoints": midpoints,
    "clustered": lambda H, V, K, D: (
        10 * torch.randn(H, 1, D).repeat(1, V, 1) + torch.randn(H, V, D),
        torch.randn(H, K, D),
    ),
}
SCALES = {
    "unit": (1.0, 0.0),
    "offset": (1e-3, 1e3),
    "huge": (1e37, 0.0),
    "tiny": (1e-30, 0.0),
    "subnormal": (1e-43, 0.0),
}


def check(assignments, ids, x, c, *, by_definition=False):
    """Look up, and compare with the full search, or with the reference as well."""
    before = assignments.stats
    got = assignments.lookup(ids, x, c)
    assert got.dtype == torch.int64 and got.shape == x.shape[:-1]
    assert torch.equal(got, nearest_codeword(x, c).indices)
    if by_definition:
        assert torch.equal(got, reference.nearest_codeword(x, c)[0])
    took = [b - a for a, b in zip(before, assignments.stats, strict=True)]
    rows, proven, searched, evaluations, full = took
    assert rows == got.numel() and full == rows * assignments.codebook_size
    assert 0 <= proven <= rows and searched >= 0
    assert evaluations >= min(rows, full) and evaluations >= searched * assignments.codebook_size
    return got


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("drift", DRIFTS, ids=lambda d: d.__name__)
def test_codes_are_those_of_a_full_search_at_every_step(drift, scene, no_pause):
    H, V, K, D = 2, 60, 40, 9
    x, c = SCENES[scene](H, V, K, D)
    assignments = CodebookAssignments(V, K, D, num_codebooks=H, neighbours=5)
    for step in range(25):
        ids = torch.randperm(V)[: 1 + 13 * step % V]
        check(assignments, ids, x[:, ids], c, by_definition=step % 6 == 5)
        drift(x, c, step)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("drift", [slow, ulps, dead_codes, lattice], ids=lambda d: d.__name__)
def test_codes_at_every_scale(drift, scale, no_pause):
    factor, offset = SCALES[scale]
    H, V, K, D = 1, 50, 30, 5
    x, c = gaussian(H, V, K, D)
    assignments = CodebookAssignments(V, K, D, neighbours=6)
    for step in range(20):
        ids = torch.randperm(V)[:40]
        check(assignments, ids, (x[:, ids] * factor + offset), c * factor + offset, by_definition=step % 6 == 5)
        drift(x, c, step)


@pytest.mark.parametrize("neighbours", [1, 2, 7, 500])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 4, 2, 1), (1, 70, 300, 33), (2, 50, 65, 16), (5, 20, 8, 3)], ids=str
)
def test_shapes_and_lengths_of_the_list(shape, neighbours, poison, no_pause):
    H, V, K, D = shape
    x, c = gaussian(H, V, K, D)
    assignments = CodebookAssignments(V, K, D, num_codebooks=H, neighbours=neighbours)
    for step in range(12):
        ids = torch.randint(V, (2 * V,))  # a row may come twice
        check(assignments, ids, x[:, ids], c, by_definition=step == 11)
        (dead_codes if step % 3 else slow)(x, c, step)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_rows(threads):
    torch.set_num_threads(threads)  # the fixture of these tests takes it back
    H, V, K, D = 2, 900, 50, 4
    x, c = gaussian(H, V, K, D)
    assignments = CodebookAssignments(V, K, D, num_codebooks=H)
    for step in range(6):
        ids = torch.cat([torch.randperm(V), torch.randint(V, (300,))])
        check(assignments, ids, x[:, ids], c)
        slow(x, c, step)
    assert assignments.stats.searched < assignments.stats.rows / 3


@examples(60, derandomize=False, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_walk_over_a_small_lattice(no_pause, data):
    """Ties, equal codes and one-ulp differences in any order."""
    V, K, D = 4, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    values = st.sampled_from([-1.0, 0.0, -0.0, 1.0, 1 + 2**-23, 1 - 2**-24, 1e-38, 3e38, 1000.0])
    assignments = CodebookAssignments(V, K, D, neighbours=data.draw(st.integers(1, K)))
    x, c = torch.zeros(V, D), torch.zeros(K, D)
    for _ in range(data.draw(st.integers(1, 8))):
        for t in (x, c):
            for _ in range(data.draw(st.integers(0, 3))):
                t[data.draw(st.integers(0, len(t) - 1)), data.draw(st.integers(0, D - 1))] = data.draw(values)
        ids = torch.tensor(data.draw(st.lists(st.integers(0, V - 1), max_size=5)), dtype=torch.int64)
        check(assignments, ids, x[ids], c, by_definition=True)


def test_a_row_may_differ_from_its_repeat():
    x, c = torch.randn(6, 3), torch.randn(9, 3)
    assignments = CodebookAssignments(4, 9, 3)
    for _ in range(3):
        check(assignments, torch.tensor([2, 2, 0, 2, 0, 3]), x, c)


def test_a_crossed_bisector_is_seen_at_once():
    # the row walks from one code to another in steps of one part in 10^4, and from there back
    c = torch.tensor([[-1.0, 0.3], [1.0, 0.3], [0.0, 5.0]])
    assignments = CodebookAssignments(1, 3, 2, neighbours=2)
    for position in torch.cat([torch.linspace(-2e-4, 2e-4, 9), torch.linspace(1, -1, 41)]):
        check(assignments, torch.tensor([0]), torch.tensor([[position, 0.0]]), c, by_definition=True)


def spend(drift, steps=40, neighbours=16):
    H, V, K, D = 1, 200, 256, 8
    c = 3 * torch.randn(H, K, D)
    x = c[:, torch.randint(K, (V,))] + 0.5 * torch.randn(H, V, D)
    assignments = CodebookAssignments(V, K, D, neighbours=neighbours)
    stats = []
    for step in range(steps):
        check(assignments, torch.arange(V), x, c)
        stats.append(assignments.stats)
        drift(x, c, step)
    return stats


def test_nothing_moves_nothing_is_searched():
    first, *_, last = spend(still, steps=5)
    rows = last.rows - first.rows
    assert first.searched == first.rows and first.evaluations == first.full_evaluations
    assert last.searched == first.searched
    # one distance a row, to find that it has not moved, and one a code
    assert last.proven - first.proven == rows
    assert last.evaluations - first.evaluations == rows + 4 * 256


def test_slow_drift_is_nearly_free():
    first, *_, last = spend(slow)
    assert last.full_evaluations - first.full_evaluations > 20 * (last.evaluations - first.evaluations)
    assert last.proven - first.proven > 0.3 * (last.rows - first.rows)
    assert last.searched - first.searched < 0.05 * (last.rows - first.rows)


def test_a_code_that_jumps_costs_a_comparison_not_a_search():
    first, *_, last = spend(dead_codes, steps=15)
    assert last.searched - first.searched < 0.1 * (last.rows - first.rows)
    assert last.full_evaluations - first.full_evaluations > 8 * (last.evaluations - first.evaluations)


def test_one_code_that_jumps_at_every_step():
    H, V, K, D = 3, 40, 16, 4
    x, c = gaussian(H, V, K, D)
    assignments = CodebookAssignments(V, K, D, num_codebooks=H)
    for step in range(3 * K):
        check(assignments, torch.arange(V)[step % 2 :: 2], x[:, step % 2 :: 2], c)
        c[:, 5 + step % 2] = torch.randn(D)
    assert assignments.stats.searched < assignments.stats.rows / 4
    # its jumps replace each other in what is remembered
    assert assignments._bounds.recent_count.tolist() == [2] * H


def test_bounds_that_never_help_are_given_up_for_a_while():
    stats = spend(new_codebook, steps=40)
    # the list and the former self of each row on top of the search at some steps, the codes' former selves at all
    assert stats[-1].evaluations <= 1.03 * stats[-1].full_evaluations + 40 * 256
    own = [i for i in range(1, 40) if stats[i].evaluations - stats[i - 1].evaluations > 200 * 256 + 256]
    assert own == [1, 3, 6, 11, 20, 37]  # pauses of 1, 2, 4, 8, 16


def test_bounds_are_taken_up_again():
    def first_wild_then_slow(x, c, step):
        (new_codebook if step < 10 else slow)(x, c, step)

    stats = spend(first_wild_then_slow, steps=60)
    late = [b - a for a, b in zip(stats[30], stats[-1], strict=True)]
    assert late[2] < 0.1 * late[0] and late[3] < 0.15 * late[4]


def test_more_than_the_list_can_hold_are_equal():
    x, c = torch.randn(20, 4), torch.zeros(30, 4)
    assignments = CodebookAssignments(20, 30, 4, neighbours=3)
    for _ in range(3):
        assert (check(assignments, torch.arange(20), x, c) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, c = torch.randn(30, 4).to(dtype), torch.randn(20, 4).to(dtype)
    assignments = CodebookAssignments(30, 20, 4)
    for _ in range(3):
        check(assignments, torch.arange(30), x, c, by_definition=True)
    searched = assignments.stats.searched
    assert searched == (90 if dtype == torch.float64 else 30)


def test_inputs_may_be_views_and_need_no_gradient():
    x, c = torch.randn(4, 30, requires_grad=True).T, torch.randn(4, 20, requires_grad=True).T
    assignments = CodebookAssignments(30, 20, 4)
    for _ in range(2):
        ids = torch.arange(60)[::2] // 2
        assert not check(assignments, ids, x, c).requires_grad


def test_no_rows_and_no_lookup():
    assignments = CodebookAssignments(3, 5, 2)
    assert assignments.stats == (0, 0, 0, 0, 0)
    got = assignments.lookup(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), torch.randn(5, 2))
    assert got.shape == (0,) and assignments.stats.rows == 0


def test_reset_forgets():
    x, c = torch.randn(30, 4), torch.randn(20, 4)
    assignments = CodebookAssignments(30, 20, 4)
    check(assignments, torch.arange(30), x, c)
    assignments.reset()
    assert assignments.stats.rows == 0
    check(assignments, torch.arange(30), x, c)
    assert assignments.stats.searched == 30


def test_a_copy_goes_its_own_way():
    x, c = torch.randn(30, 4), torch.randn(20, 4)
    assignments = CodebookAssignments(30, 20, 4)
    check(assignments, torch.arange(30), x, c)
    other = copy.deepcopy(assignments)
    check(other, torch.arange(30), torch.randn(30, 4), torch.randn(20, 4))
    before = assignments.stats
    check(assignments, torch.arange(30), x, c)
    assert assignments.stats.proven - before.proven == 30


@pytest.mark.parametrize("name", ["num_rows", "codebook_size", "dim", "num_codebooks", "neighbours"])
def test_sizes_below_one_are_refused(name):
    sizes = {"num_rows": 3, "codebook_size": 4, "dim": 2, "num_codebooks": 1, "neighbours": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        CodebookAssignments(**sizes)
