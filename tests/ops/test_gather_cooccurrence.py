import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast import _C, reference
from metarec_fast.ops.gather_cooccurrence import CooccurrenceGraph, gather_cooccurrence
from tests.examples import examples


def packed(rows):
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return offsets, np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])


def random_graph(seed, V, R, share=0.3):
    """A third of the rows and columns are empty, as most items of a catalogue are in some relation."""
    rng = np.random.default_rng(seed)
    there = rng.random((V, V)) < share
    there[rng.random(V) < 0.3] = False
    there[:, rng.random(V) < 0.3] = False
    rows, items = np.nonzero(there)
    values = rng.standard_normal((len(items), R)).astype(np.float32)
    return np.searchsorted(rows, np.arange(V + 1)), items.astype(np.int32), values


def random_histories(seed, V, count, longest):
    rng = np.random.default_rng(seed)
    return packed([rng.integers(V, size=rng.integers(0, longest + 1)) for _ in range(count)])


def assert_equals_reference(graph, histories, ages):
    got = gather_cooccurrence(CooccurrenceGraph(*graph), *histories, ages=ages)
    expected = reference.gather_cooccurrence(graph, *histories, ages=ages)
    for tensor, array in zip(got[:2], expected[:2], strict=True):
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert got[2].dtype == torch.float32 and got[2].shape == expected[2].shape
    # sums of at most 20 products near 1, in float32 here and in float64 there
    np.testing.assert_allclose(got[2].numpy(), expected[2], rtol=1e-5, atol=1e-5)
    return got


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("R", [1, 3, 12])
@pytest.mark.parametrize("ages", [(0, 1), (0, 1, 2, 5, 20), (0, 3, 7)], ids=str)
def test_equals_reference(R, ages):
    """Histories of up to 30 events: longer than any of the ages; nothing of the outputs is left unwritten."""
    for seed in range(3):
        histories = random_histories(seed, 23, 40, 30)
        assert (np.diff(histories[0]) == 0).any() and (np.diff(histories[0]) > 20).any()
        offsets, candidates, features = assert_equals_reference(random_graph(seed, 23, R), histories, ages)
        assert len(candidates) == len(features) == offsets[-1] > 40
        assert set(features[:, -1].tolist()) == {0.0, 1.0}


@st.composite
def problems(draw):
    V, R = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(st.integers(0, V - 1), max_size=6), max_size=5))
    ages = (0, *sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=3))))
    return random_graph(draw(st.integers(0, 99)), V, R, share=0.6), packed(rows), ages


@given(problems())
@examples(150)
def test_equals_reference_in_every_corner(problem):
    assert_equals_reference(*problem)


@pytest.mark.usefixtures("poison")
def test_by_hand():
    graph = CooccurrenceGraph(
        np.array([0, 2, 3, 3, 4]), np.array([1, 2, 2, 1], np.int32), np.array([[1], [2], [4], [8]], np.float32)
    )
    # an empty history; 0 spoke last, before it 1 and 3; 2 speaks for nothing; 1 is too old to speak, and yet was there
    offsets, candidates, features = gather_cooccurrence(
        graph, *packed([[], [3, 1, 0], [2], [1, 2, 2, 3]]), ages=(0, 1, 3)
    )
    assert offsets.tolist() == [0, 0, 2, 2, 3]
    assert candidates.tolist() == [1, 2, 1]
    assert features.tolist() == [[1, 4, 1], [2, 2, 0], [8, 0, 1]]


def test_no_query_and_nothing_known():
    graph = CooccurrenceGraph(np.zeros(6, np.int64), np.zeros(0, np.int32), np.zeros((0, 2), np.float32))
    assert graph.num_items == 5 and graph.relations == 2
    for rows in ([], [[]], [[1, 4], []]):
        offsets, candidates, features = gather_cooccurrence(graph, *packed(rows), ages=(0, 2))
        assert offsets.tolist() == [0] * (len(rows) + 1)
        assert candidates.shape == (0,) and features.shape == (0, 3)


def test_tensors_and_a_pickled_graph_give_the_same():
    graph = random_graph(0, 15, 2)
    offsets, items = random_histories(0, 15, 9, 12)
    first = CooccurrenceGraph(*graph)
    want = gather_cooccurrence(first, offsets, items, ages=(0, 1, 9))
    again = pickle.loads(pickle.dumps(first))
    got = gather_cooccurrence(again, torch.from_numpy(offsets), torch.from_numpy(items), ages=(0, 1, 9))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_same_bits_for_any_number_of_threads():
    """Sizes from which both passes run in parallel."""
    graph, histories = CooccurrenceGraph(*random_graph(0, 60, 12)), random_histories(1, 60, 800, 30)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _C.max_threads() == threads
            found[threads] = gather_cooccurrence(graph, *histories, ages=(0, 1, 2, 5, 20))
    finally:
        torch.set_num_threads(before)
    assert histories[0][-1] > 4096 and found[1][2].numel() > 2**20
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))


GRAPH = (np.array([0, 1, 3]), np.array([1, 0, 1], np.int32), np.ones((3, 2), np.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": np.array([0, 1, 3], np.int32)}, TypeError, "offsets must be int64, got int32"),
        ({"offsets": np.array([], np.int64)}, ValueError, "offsets must be"),
        ({"offsets": np.array([0, 3, 1])}, ValueError, "offsets must rise"),
        ({"offsets": np.array([0, 1, 4])}, ValueError, "offsets must rise"),
        ({"items": np.array([1, 0, 1])}, TypeError, "graph items must be int32, got int64"),
        ({"items": [1, 0, 1]}, TypeError, "graph items must be a numpy array or a torch.Tensor, got list"),
        (
            {"items": np.array([1, 0, 2], np.int32)},
            ValueError,
            r"graph items must lie in \[0, 2\).* got 2 at",
        ),
        ({"items": np.array([-1, 0, 1], np.int32)}, ValueError, r"graph items must lie in .* got -1 at position 0"),
        (
            {"values": np.ones((3, 2))},
            TypeError,
            r"graph values must be a float32 .* got float64 \(3, 2\)",
        ),
        ({"values": np.ones(3, np.float32)}, TypeError, r"graph values must be .* got float32 \(3,\)"),
        ({"values": torch.ones(3, 2)}, TypeError, "graph values must be .* got Tensor"),
        ({"values": np.ones((2, 2), np.float32)}, ValueError, r"graph values must .* each of the 3 entries.* \(2, 2\)"),
        ({"values": np.ones((2, 3), np.float32).T}, ValueError, "graph values must be contiguous"),
    ],
    ids=str,
)
def test_a_bad_graph(change, error, message):
    with pytest.raises(error, match=message):
        CooccurrenceGraph(**{"offsets": GRAPH[0], "items": GRAPH[1], "values": GRAPH[2], **change})


def test_more_items_than_ids_of_int32_are_refused_not_wrapped(tmp_path):
    """Offsets in a file of holes: they are refused before they are read."""
    with open(tmp_path / "offsets", "wb") as file:
        file.truncate(8 * (2**31 + 2))
    offsets = np.memmap(tmp_path / "offsets", np.int64, mode="r")
    with pytest.raises(ValueError, match="graph offsets must be of at most 2147483648 items, got 2147483649"):
        CooccurrenceGraph(offsets, np.array([2**31]).astype(np.int32), np.ones((1, 2), np.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": np.array([0, 2], np.int32)}, TypeError, "offsets must be int64, got int32"),
        ({"offsets": np.array([1, 2])}, ValueError, "offsets must rise"),
        ({"offsets": np.array([0, 9])}, ValueError, "offsets must rise"),
        ({"items": np.array([0, 1])}, TypeError, "^items must be int32, got int64"),
        ({"items": np.array([0, 2], np.int32)}, ValueError, r"^items must lie in \[0, 2\).* got 2 at position 1"),
        ({"items": np.array([0, -3], np.int32)}, ValueError, "^items must lie in .* got -3 at position 1"),
        ({"ages": ()}, ValueError, r"ages must rise from 0 and name one group at least, got \(\)"),
        ({"ages": (0,)}, ValueError, r"ages must rise .* got \(0,\)"),
        ({"ages": (1, 2)}, ValueError, r"ages must rise .* got \(1, 2\)"),
        ({"ages": (0, 2, 2)}, ValueError, r"ages must rise .* got \(0, 2, 2\)"),
    ],
    ids=str,
)
def test_bad_histories(change, error, message):
    arguments = {"offsets": np.array([0, 2]), "items": np.array([0, 1], np.int32), "ages": (0, 1), **change}
    with pytest.raises(error, match=message):
        gather_cooccurrence(CooccurrenceGraph(*GRAPH), **arguments)
