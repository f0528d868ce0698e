import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast import _C
from metarec_fast.data.domain import Sequences
from metarec_fast.sampling.batch import BatchShape
from metarec_fast.sampling.sampler import PackedBatch, Sampler
from tests.examples import examples


def make(lengths, num_items=500, dtype=np.int32, seed=0):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Sequences(offsets, np.random.default_rng(seed).integers(0, num_items, offsets[-1]).astype(dtype), num_items)


def geometric(users=300, num_items=500, dtype=np.int32):
    return make(np.random.default_rng(1).geometric(1 / 9, users) - 1, num_items, dtype)


def same(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("items", "targets", "offsets", "users", "negatives", "logq")]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("window", ["last", "sliding", "crop"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_an_epoch_shows_every_window_once(window, batch_size):
    data = geometric(60)
    sampler = Sampler(data, batch_size=batch_size, max_length=6, window=window, seed=3)
    for epoch in (0, 2):
        first = epoch * sampler.steps_per_epoch
        batches = [sampler.batch(first + i) for i in range(sampler.steps_per_epoch)]
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert sum(len(b) for b in batches) == sampler.num_windows
        users = torch.cat([b.users for b in batches])
        if window == "sliding":
            assert users.unique().tolist() == np.flatnonzero(data.lengths >= 2).tolist()
            # disjoint windows: the targets of an epoch are all events but each user's first, once each
            expected = [i for u in range(len(data)) for i in data[u][1:].tolist()]
            assert sorted(torch.cat([b.targets for b in batches]).tolist()) == sorted(expected)
        else:
            assert users.sort().values.tolist() == np.flatnonzero(data.lengths >= 2).tolist()


@pytest.mark.parametrize("window", ["last", "sliding", "crop"])
def test_windows_are_stretches_of_their_users(window):
    data = geometric(dtype=np.int64)
    sampler = Sampler(data, batch_size=50, max_length=5, window=window, stride=2 if window == "sliding" else None)
    for step in range(sampler.steps_per_epoch):
        batch = sampler.batch(step)
        assert {x.dtype for x in (batch.items, batch.targets, batch.offsets, batch.users)} == {torch.int64}
        for b, user in enumerate(batch.users.tolist()):
            row = slice(batch.offsets[b], batch.offsets[b + 1])
            inputs, targets = batch.items[row].tolist(), batch.targets[row].tolist()
            events = data[user].tolist()
            stretches = [events[i : i + len(inputs) + 1] for i in range(len(events) - len(inputs))]
            assert [*inputs, targets[-1]] in stretches
            assert inputs[1:] == targets[:-1]
            if window != "sliding":
                assert len(inputs) == min(5, len(events) - 1)
            if window == "last":
                assert targets[-1] == events[-1]


def test_epochs_differ_and_so_do_seeds_and_streams():
    data = geometric()
    orders = {
        tuple(Sampler(data, batch_size=300, seed=seed, stream=stream).batch(step).users.tolist())
        for seed, stream, step in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0))
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"negatives": 2}, {"negatives": 1, "distribution": "popularity"}, {"shared_negatives": 9}, {"window": "crop"}],
    ids=str,
)
def test_a_batch_does_not_depend_on_earlier_ones(options):
    data = geometric()
    used, fresh = (Sampler(data, batch_size=32, max_length=4, seed=6, **options) for _ in range(2))
    steps = [5, 0, 3, 5, 100, 12345678901]
    batches = [used.batch(step) for step in steps]
    assert all(same(batch, fresh.batch(step)) for step, batch in reversed(list(zip(steps, batches, strict=True))))
    assert not same(batches[0], batches[1])


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_negatives_of_every_position_are_unseen_and_logq_is_theirs(distribution):
    data = geometric(num_items=60)
    sampler = Sampler(data, batch_size=100, max_length=5, negatives=3, distribution=distribution, alpha=0.5)
    p = np.sqrt(np.bincount(data.items, minlength=60)) if distribution == "popularity" else np.ones(60)
    for step in range(sampler.steps_per_epoch):
        batch = sampler.batch(step)
        assert batch.negatives.shape == batch.logq.shape == (len(batch.items), 3)
        for b, user in enumerate(batch.users.tolist()):
            row = slice(batch.offsets[b], batch.offsets[b + 1])
            drawn, logq = batch.negatives[row].numpy(), batch.logq[row].double().numpy()
            assert not np.isin(drawn, data[user]).any()
            unseen = p.copy()
            unseen[data[user]] = 0
            np.testing.assert_allclose(np.exp(logq), unseen[drawn] / unseen.sum(), rtol=3e-6)


@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def test_shared_negatives(distribution):
    data = geometric()
    sampler = Sampler(data, batch_size=10, shared_negatives=256, distribution=distribution, alpha=1.0)
    batch, other = sampler.batch(3), sampler.batch(4)
    assert batch.negatives.shape == batch.logq.shape == (256,)
    assert not torch.equal(batch.negatives, other.negatives)
    p = (
        np.bincount(data.items, minlength=500) / len(data.items)
        if distribution == "popularity"
        else np.full(500, 0.002)
    )
    np.testing.assert_allclose(np.exp(batch.logq.double().numpy()), p[batch.negatives], rtol=3e-6)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20), seed=st.integers(0, 2**64 - 1))
@examples(25)
def test_small_random_domains(lengths, seed):
    data = make(lengths, num_items=12)
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="sequences hold no window"):
            Sampler(data, batch_size=3)
        return
    sampler = Sampler(data, batch_size=3, max_length=4, window="sliding", stride=1, negatives=1, seed=seed)
    batches = [sampler.batch(i) for i in range(sampler.steps_per_epoch)]
    shown = sorted(
        (u, tuple(b.items[b.offsets[i] : b.offsets[i + 1]].tolist()))
        for b in batches
        for i, u in enumerate(b.users.tolist())
    )
    expected = sorted(
        (u, tuple(data[u][max(end - 4, 0) : end].tolist()))
        for u in range(len(data))
        for end in range(min(4, len(data[u]) - 1), len(data[u]))
        if end > 0
    )
    assert shown == expected


def test_memory_mapped_sequences_are_read_in_place(tmp_path):
    data = geometric()
    np.save(tmp_path / "offsets.npy", data.offsets)
    np.save(tmp_path / "items.npy", data.items)
    mapped = Sequences(
        np.load(tmp_path / "offsets.npy", mmap_mode="r"), np.load(tmp_path / "items.npy", mmap_mode="r"), 500
    )
    options = {"batch_size": 20, "negatives": 1, "distribution": "popularity", "window": "crop", "max_length": 3}
    assert same(Sampler(mapped, **options).batch(4), Sampler(data, **options).batch(4))


def test_item_width_does_not_show():
    batches = [Sampler(geometric(dtype=dtype), batch_size=50, negatives=2).batch(1) for dtype in (np.int32, np.int64)]
    assert same(*batches)


def test_ids_beyond_two_to_the_31():
    V = 2**31 + 1000
    offsets = np.array([0, 3, 5])
    data = Sequences(offsets, np.array([V - 1, 2**24 + 1, 2**31 + 1, 5, V - 2]), V)
    batch = Sampler(data, batch_size=2, negatives=500).batch(0)
    rows = dict(zip(batch.users.tolist(), zip(batch.offsets[:-1], batch.offsets[1:], strict=True), strict=True))
    assert batch.items[slice(*rows[0])].tolist() == [V - 1, 2**24 + 1]
    assert batch.targets[slice(*rows[1])].tolist() == [V - 2]
    assert batch.negatives.min() >= 0
    assert 2**30 < batch.negatives.max() < V


def test_batch_moves_and_prints():
    sampler = Sampler(geometric(), batch_size=4)
    batch = sampler.batch(0)
    moved = batch.to("meta")
    assert moved.items.device.type == "meta"
    assert moved.negatives is None
    assert len(moved) == 4
    assert f"{sampler.num_windows} windows, batch_size=4" in repr(sampler)


OPTIONS = [
    {},
    {"negatives": 2},
    {"negatives": 2, "targets": "last", "window": "crop"},
    {"negatives": 1, "distribution": "popularity", "window": "sliding", "stride": 2},
    {"negatives": 1, "distribution": "mixed", "part": "query", "query_share": 0.7},
    {"shared_negatives": 9},
    {"in_batch": True, "shared_negatives": 5, "distribution": "mixed"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_put_together_are_the_whole_batch(options, world_size):
    data = geometric(60)
    common = {"batch_size": 14, "max_length": 4, "seed": 3, **options}
    whole = Sampler(data, **common)
    ranks = [Sampler(data, rank=r, world_size=world_size, **common) for r in range(world_size)]
    each = "negatives" in options
    for step in (0, 2, whole.steps_per_epoch - 1, 1234):
        expected, parts = whole.batch(step), [rank.batch(step) for rank in ranks]
        rows = [len(part) for part in parts]
        assert max(rows) - min(rows) <= 1
        lengths = torch.cat([part.offsets.diff() for part in parts])
        joined = PackedBatch(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("items", "targets")),
            torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))),
            torch.cat([part.users for part in parts]),
            torch.cat([part.negatives for part in parts]) if each else parts[0].negatives,
            torch.cat([part.logq for part in parts]) if each else parts[0].logq,
        )
        assert same(joined, expected)
        if not each:  # what the batch shares, every rank has
            assert all(p.negatives is None or torch.equal(p.negatives, expected.negatives) for p in parts)


def test_more_ranks_than_rows():
    data = make([3] * 5)
    parts = [Sampler(data, batch_size=4, rank=r, world_size=7).batch(0) for r in range(7)]
    assert sum(len(part) for part in parts) == 4
    assert all(part.offsets.tolist() == [0, 2][: len(part) + 1] for part in parts)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_resumes_at_any_step(options):
    def run(first, last):
        sampler = Sampler(geometric(40), batch_size=16, max_length=4, seed=8, **options)
        return [sampler.batch(step) for step in range(first, last)]

    straight = run(0, 9)
    for stop in range(9):
        assert all(same(a, b) for a, b in zip(run(stop, 9), straight[stop:], strict=True))


def test_in_batch_negatives_are_the_targets_and_logq_is_their_mixture():
    data = geometric(200, num_items=40)
    sampler = Sampler(data, batch_size=16, max_length=3, in_batch=True, shared_negatives=8, distribution="mixed")
    batches = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    share = np.bincount(torch.cat([b.targets for b in batches]), minlength=40)
    share = share / share.sum()  # of one epoch, counted
    q = sampler.table.weights / (40 * 2**32)
    for batch in batches:
        M = len(batch.targets)
        assert torch.equal(batch.negatives[:M], batch.targets)
        assert len(batch.negatives) == M + 8
        expected = (M * share + 8 * q)[batch.negatives] / (M + 8)
        np.testing.assert_allclose(np.exp(batch.logq.double().numpy()), expected, rtol=3e-6)


def test_crops_show_items_as_often_as_logq_says():
    sampler = Sampler(make([9, 4, 30, 2], num_items=50), batch_size=4, max_length=3, window="crop", in_batch=True)
    counts = np.zeros(50)
    for step in range(5000):
        batch = sampler.batch(step)
        counts += np.bincount(batch.targets, minlength=50)
    total = counts.sum()
    for item, logq in zip(batch.negatives.tolist(), batch.logq.tolist(), strict=True):
        mean = total * math.exp(logq)
        assert abs(counts[item] - mean) < 5 * math.sqrt(mean)


def test_last_targets_have_negatives_of_their_own():
    data = geometric()
    last, every = (Sampler(data, batch_size=20, max_length=4, negatives=3, targets=t) for t in ("last", "every"))
    batch, full = last.batch(2), every.batch(2)
    assert torch.equal(batch.items, full.items)
    assert torch.equal(batch.targets, full.targets[full.offsets[1:] - 1])
    assert batch.negatives.shape == batch.logq.shape == (20, 3)
    for user, drawn in zip(batch.users.tolist(), batch.negatives.numpy(), strict=True):
        assert not np.isin(drawn, data[user]).any()
    with pytest.raises(ValueError, match="padded_to needs a target at every position"):
        batch.padded(4)


def test_only_the_users_requested():
    data = geometric()
    chosen = np.array([3, 5, 7, 11, 250])
    sampler = Sampler(data, batch_size=2, users=chosen)
    shown = torch.cat([sampler.batch(step).users for step in range(sampler.steps_per_epoch)])
    assert sorted(shown.tolist()) == [u for u in chosen if len(data[u]) >= 2]


@pytest.mark.parametrize("windows", [30, 37])
@pytest.mark.parametrize("negatives", [{}, {"negatives": 2}, {"shared_negatives": 9}], ids=str)
def test_padded_batches_have_one_size_and_the_packed_positions_first(negatives, windows):
    batch = Sampler(geometric(), batch_size=30, max_length=6, **negatives).batch(1)
    T, B = len(batch.items), len(batch)
    shape = BatchShape(windows, positions=T + 20, length=6)
    padded = batch.padded_to(shape)
    assert torch.equal(padded.offsets[: B + 1], batch.offsets)
    assert len(padded.offsets) == shape.segments + 1
    lengths = padded.offsets.diff()[B:]
    assert (lengths >= 0).all() and (lengths <= 6).all() and lengths.sum() == 20
    assert torch.equal(padded.valid, torch.arange(T + 20) < T)
    assert torch.equal(padded.items[:T], batch.items) and (padded.items[T:] == 0).all()
    assert torch.equal(padded.targets[:T], batch.targets) and (padded.targets[T:] == -100).all()
    for name in ("negatives", "logq"):
        ours, given = getattr(padded, name), getattr(batch, name)
        if given is None or given.dim() == 1:
            assert ours is given
        else:
            assert torch.equal(ours[:T], given) and (ours[T:] == 0).all() and len(ours) == T + 20
    exactly = batch.padded_to(BatchShape(B, T, 6))
    assert exactly.valid.all() and (exactly.offsets[B:] == T).all()


def test_padding_names_what_is_too_many():
    batch = Sampler(geometric(), batch_size=30, max_length=6).batch(1)
    for shape in (BatchShape(30, 29, 6), BatchShape(29, 500, 6)):
        with pytest.raises(ValueError, match=rf"at most {shape.positions} positions in {shape.windows} windows"):
            batch.padded_to(shape)
    with pytest.raises(ValueError, match="padded_to needs a target at every position"):
        Sampler(geometric(), batch_size=30, max_length=6, targets="last").batch(1).padded_to(BatchShape(30, 500, 6))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_hold_the_packed_ones(side):
    batch = Sampler(geometric(), batch_size=30, max_length=6, negatives=2).batch(1)
    padded = batch.padded(6, side=side, fill=-1)
    for name in ("items", "targets", "negatives", "logq"):  # rows and positions keep their order
        assert torch.equal(getattr(padded, name)[padded.valid], getattr(batch, name))
    assert (padded.items[~padded.valid] == -1).all()
    assert padded.valid[:, -1 if side == "left" else 0].all()
    assert torch.equal(padded.valid.sum(1), batch.offsets.diff())
    newest = batch.padded(2, side=side, fill=-1)
    assert torch.equal(newest.valid.sum(1), batch.offsets.diff().clamp(max=2))
    last = newest.valid.sum(1) - 1 if side == "right" else torch.ones(30, dtype=torch.int64)
    assert torch.equal(newest.targets[torch.arange(30), last], batch.targets[batch.offsets[1:] - 1])
    shared = Sampler(geometric(), batch_size=3, shared_negatives=4).batch(0)
    assert torch.equal(shared.padded(50).negatives, shared.negatives)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_buffers_hold_any_batch(options):
    sampler = Sampler(geometric(100), batch_size=8, max_length=5, world_size=3, rank=1, **options)
    buffers = sampler.buffers()
    for step in range(2 * sampler.steps_per_epoch):
        batch = sampler.batch(step, buffers=buffers)
        assert same(batch, sampler.batch(step))
        assert batch.items.untyped_storage().data_ptr() == buffers.windows.data_ptr()


def digest() -> str:
    """Of batches large enough to run on several threads."""
    data = make(np.random.default_rng(2).geometric(1 / 40, 3000), num_items=2000)
    total = hashlib.sha256()
    for options in (
        {"negatives": 3},
        {"negatives": 2, "distribution": "popularity", "window": "crop"},
        {"shared_negatives": 20_000, "window": "sliding", "stride": 9},
        {"in_batch": True, "distribution": "mixed", "targets": "last"},
        {"negatives": 40, "sorted_copy": False, "part": "support", "world_size": 2, "rank": 1},
    ):
        sampler = Sampler(data, batch_size=4500, max_length=60, seed=11, stream=3, **options)
        for step in (0, 7):
            batch = sampler.batch(step)
            for x in (batch.items, batch.targets, batch.offsets, batch.users, batch.negatives, batch.logq):
                total.update(x.numpy().tobytes())
    return total.hexdigest()


def test_same_bytes_for_every_instruction_set_and_number_of_threads():
    run = (
        "import importlib.util, sys, torch\n"
        "spec = importlib.util.spec_from_file_location('t', sys.argv[1])\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "for n in (1, 2):\n"
        "    torch.set_num_threads(n); print(t._C.active_isa(), n, t.digest())\n"
    )
    lines = []
    for isa in _C.supported_isas():
        environment = {**os.environ, "METAREC_FAST_ISA": isa, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, "-c", run, __file__], env=environment, capture_output=True, text=True, check=True
        )
        lines += [line.split() for line in done.stdout.splitlines()]
    assert [(isa, int(n)) for isa, n, _ in lines] == [(isa, n) for isa in _C.supported_isas() for n in (1, 2)]
    assert {digest for *_, digest in lines} == {digest()}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({}, {"negatives": -1}, "negatives must be at least 0, got -1"),
        ({}, {"negatives": 1, "shared_negatives": 2}, "negatives=1 excludes shared_negatives=2"),
        ({}, {"distribution": "zipf"}, "distribution must be one of"),
        ({}, {"window": "all"}, "window must be one of"),
        ({}, {"targets": "all"}, "targets must be one of every, last, got 'all'"),
        ({}, {"part": "half"}, "part must be one of whole, support, query, got 'half'"),
        ({}, {"part": "query", "query_share": 0.0}, r"query_share must be in \(0, 1\), got 0.0"),
        ({}, {"negatives": 1, "in_batch": True}, "negatives=1 excludes shared_negatives=0 and in_batch=True"),
        ({}, {"rank": 1}, r"rank must be in \[0, 1\), got 1"),
        ({}, {"users": np.array([2])}, r"users must be in \[0, 2\), got 2 to 2"),
        ({}, {"users": np.array([0])}, "sequences hold no window"),
        ({}, {"negatives": 1, "distribution": "mixed", "uniform_share": 1.0}, r"uniform_share must be in \(0, 1\)"),
        ({}, {"stride": 3}, "stride belongs to window='sliding'"),
        ({}, {"max_length": 0}, "max_length must be in"),
        ({"items": np.array([0, 1, 2, 5, 1], np.int32)}, {}, r"items must be in \[0, 5\), got 0 to 5"),
        ({"items": np.array([0, -1, 2, 3, 1], np.int32)}, {}, r"items must be in \[0, 5\), got -1 to 3"),
        ({"offsets": np.array([0, 4, 3, 5])}, {}, "offsets must rise"),
        ({"offsets": np.array([0, 2, 3, 6])}, {}, "offsets must rise"),
        ({"offsets": np.array([1, 2, 3, 5])}, {}, "offsets must rise"),
        ({"offsets": np.array([0, 1, 1, 1]), "items": np.array([1])}, {}, "sequences hold no window"),
        ({"num_items": 4}, {"negatives": 1}, "1 users have seen every item that could be drawn, the first is user 1"),
    ],
)
def test_bad_arguments(change, options, message):
    fields = {
        "offsets": np.array([0, 1, 5]),
        "items": np.array([0, 1, 2, 3, 0], np.int32),
        "num_items": 5,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        Sampler(Sequences(**fields), **{"batch_size": 2, **options})


def test_a_negative_step():
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*48\), got -1"):
        Sampler(geometric(), batch_size=4).batch(-1)


def test_arguments_of_other_types():
    data = geometric()
    for options in ({"batch_size": 1.5}, {"negatives": "2"}, {"shared_negatives": 1.0}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be an integer, got"):
            Sampler(data, **{"batch_size": 4, **options})
    for step in (1.5, "2"):
        with pytest.raises(TypeError, match="step must be an integer, got"):
            Sampler(data, batch_size=4).batch(step)
    with pytest.raises(TypeError, match=r"offsets must be a numpy array or a torch\.Tensor, got list"):
        Sampler(Sequences(data.offsets.tolist(), data.items, 500), batch_size=4)
    with pytest.raises(ValueError, match="sequences hold no window: every one of users has fewer than two events"):
        Sampler(data, batch_size=4, users=[])
    with pytest.raises(ValueError, match="length must be in"):
        Sampler(data, batch_size=4).batch(0).padded(-1)


def test_sequences_may_be_tensors():
    data = geometric()
    tensors = Sequences(torch.from_numpy(data.offsets), torch.from_numpy(data.items), 500)
    assert same(*(Sampler(d, batch_size=20, negatives=2).batch(1) for d in (data, tensors)))
