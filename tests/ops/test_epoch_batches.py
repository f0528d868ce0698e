import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metarec_fast.data.domain import Sequences
from metarec_fast.ops.epoch_batches import BatchBuffers, EpochBatches, draw_batches
from metarec_fast.ops.sample_negatives import popularity_table, seen_items
from metarec_fast.reference.batches import epoch_batch
from metarec_fast.sampling.sampler import Sampler
from tests.examples import examples


@st.composite
def problems(draw):
    V = draw(st.integers(4, 30))
    users = draw(st.lists(st.lists(st.integers(0, V - 3), max_size=14), min_size=1, max_size=9))
    offsets = np.concatenate(([0], np.cumsum([len(u) for u in users]))).astype(np.int64)
    items = np.array([i for u in users for i in u], draw(st.sampled_from([np.int32, np.int64])))
    options = {
        "batch_size": draw(st.integers(1, 6)),
        "max_length": draw(st.integers(1, 6)),
        "window": draw(st.sampled_from(["last", "sliding", "crop"])),
        "part": draw(st.sampled_from(["whole", "support", "query"])),
        "query_share": draw(st.sampled_from([0.01, 0.3, 0.5, 0.9])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "stream": draw(st.integers(0, 2**64 - 1)),
        "world_size": draw(st.integers(1, 4)),
    }
    options["rank"] = draw(st.integers(0, options["world_size"] - 1))
    if options["window"] == "sliding":
        options["stride"] = draw(st.integers(1, options["max_length"]))
    options |= draw(
        st.sampled_from(
            [
                {},
                {"negatives": 1},
                {"negatives": 3},
                {"shared_negatives": 5},
                {"in_batch": True},
                {"in_batch": True, "shared_negatives": 4},
            ]
        )
    )
    distribution = draw(st.sampled_from(["uniform", "mixed"]))
    last = draw(st.booleans())
    step = draw(st.one_of(st.integers(0, 20), st.integers(0, 2**40)))
    return Sequences(offsets, items, V), options, distribution, last, step, draw(st.booleans())


@given(problems())
@examples(400)
def test_a_batch_has_the_bits_of_the_reference(problem):
    data, options, distribution, last, step, sorted_copy = problem
    try:
        sampler = Sampler(
            data,
            targets="last" if last else "every",
            distribution=distribution,
            uniform_share=0.25,
            sorted_copy=sorted_copy,
            **options,
        )
    except ValueError as error:
        assert "sequences hold no window" in str(error)
        return
    batch = sampler.batch(step)
    weights = None if sampler.table is None else sampler.table.weights
    if options["part"] == "query":  # draws apart from the support of the same rows
        options = {**options, "stream": options["stream"] ^ 2**63, "order_stream": options["stream"]}
    users, offsets, items, targets, negatives, logq = epoch_batch(
        data.offsets, data.items, num_items=data.num_items, step=step, last_target=last, weights=weights, **options
    )
    for got, expected in (
        (batch.users, users),
        (batch.offsets, offsets),
        (batch.items, items),
        (batch.targets, targets),
    ):
        assert got.dtype == torch.int64
        np.testing.assert_array_equal(got.numpy(), expected)
    if not len(negatives) and batch.negatives is None:
        return
    np.testing.assert_array_equal(batch.negatives.numpy().ravel(), negatives)
    np.testing.assert_allclose(batch.logq.numpy().ravel(), logq, rtol=3e-7, atol=2e-7)
    K = options.get("negatives", 0)
    assert batch.negatives.shape == batch.logq.shape == ((len(targets), K) if K else (len(negatives),))


def sequences():
    offsets = np.cumsum([0, 3, 0, 1, 20, 9, 2, 0])
    return offsets, np.random.default_rng(0).integers(0, 40, offsets[-1])


STARTS = np.cumsum([0, 1, 0, 0, 1, 1, 1, 0])


def bound(**options):
    return EpochBatches(*sequences(), STARTS, **{"num_items": 40, "batch_size": 3, "max_length": 4, **options})


@pytest.mark.usefixtures("poison")
def test_several_domains_are_drawn_as_each_alone():
    table = popularity_table(np.arange(40))
    domains = [
        bound(),
        bound(negatives=2, seed=1),
        bound(shared_negatives=7, table=table, seed=2),
        bound(negatives=2, table=table, last_target=True),
        bound(target_shares=np.full(40, 1 / 40)),
    ]
    steps = [0, 5, 2**47, 1, 3]
    for chosen in (range(5), (1, 3)):
        together = draw_batches([domains[i] for i in chosen], [steps[i] for i in chosen])
        for i, batch in zip(chosen, together, strict=True):
            for a, b in zip(batch, draw_batches([domains[i]], [steps[i]])[0], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_seen_items_of_two_kinds_give_the_same_negatives():
    offsets, items = sequences()
    for table in (None, popularity_table(np.arange(40) + 1)):
        kept = seen_items(offsets, items, num_items=40, table=table)
        a, b = (draw_batches([bound(negatives=5, seen=seen, table=table)], [4])[0] for seen in (kept, None))
        assert torch.equal(a[4], b[4])
        assert torch.equal(a[5], b[5])


def memory(windows=100, negatives=100, dtype=torch.int64):
    return BatchBuffers(torch.zeros(windows, dtype=dtype), torch.zeros(negatives, dtype=dtype), torch.zeros(negatives))


def test_buffers_are_written_and_shown():
    domain, buffers = bound(negatives=3), memory()
    fresh, shown = draw_batches([domain], [6])[0], draw_batches([domain], [6], buffers=buffers)[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh, shown, strict=True))
    assert shown[0].data_ptr() == buffers.windows.data_ptr()
    assert shown[5].data_ptr() == buffers.logq.data_ptr()


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        (memory(windows=5), ValueError, r"buffers.windows must hold at least \d+ elements, got 5"),
        (memory(negatives=1), ValueError, r"buffers.negatives must hold at least \d+ elements, got 1"),
        (memory(dtype=torch.int32), TypeError, "buffers.windows must be a contiguous torch.int64"),
    ],
)
def test_bad_buffers(buffers, error, message):
    with pytest.raises(error, match=message):
        draw_batches([bound(negatives=1)], [0], buffers=buffers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"world_size": 0}, "world_size must be in"),
        ({"batch_size": 0}, "batch_size must be in"),
        ({"num_items": 0}, "num_items must be in"),
        (
            {"negatives": 1, "shared_negatives": 3},
            r"negatives=1 excludes shared_negatives=3 and target_shares \(absent\)",
        ),
        ({"negatives": 1, "target_shares": np.ones(40)}, r"shared_negatives=0 and target_shares \(given\)"),
        ({"begins": np.zeros(3, np.int64)}, "begins must have 7 elements, got 3"),
        ({"target_shares": np.ones(39)}, "target_shares must have 40 elements, got 39"),
        ({"table": popularity_table(np.ones(4, np.int64))}, "table must be over num_items=40 items, got one over 4"),
        (
            {"seen": seen_items(sequences()[0][:3], sequences()[1], num_items=40)},
            "seen must hold 7 users and 40 items with the given table, got 2 users",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bound(**options)


def test_bad_starts_and_steps():
    for starts, message in (
        (STARTS[1:], "starts must have 8 elements, got 7"),
        (STARTS[::-1].copy(), "starts must rise from 0"),
        (np.zeros(8, np.int64), "starts must hold at least one window, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            EpochBatches(*sequences(), starts, num_items=40, batch_size=1, max_length=4)
    for step in (-1, 2**48):
        with pytest.raises(ValueError, match=r"step must be in \[0, 2\*\*48\), got"):
            draw_batches([bound()], [step])
    with pytest.raises(ValueError, match=r"step must be in \[0, 281474976710656\), got"):
        draw_batches([bound()], [2**64])
    assert draw_batches([], []) == []
    with pytest.raises(ValueError, match=r"steps must be one to a domain \(1\), got 2"):
        draw_batches([bound()], [0, 1])


def test_an_empty_window_has_no_last_target():
    offsets, items = np.array([0, 3, 3]), np.arange(3)
    for starts, user in (([0, 0, 1], 1), ([0, 2, 2], 0)):
        domain = EpochBatches(
            offsets,
            items,
            np.array(starts),
            num_items=3,
            batch_size=2,
            max_length=2,
            window="sliding",
            last_target=True,
        )
        with pytest.raises(ValueError, match=f"got an empty one of user {user}"):
            draw_batches([domain], [0])


def test_users_and_items_are_checked_when_they_are_read():
    outside = bound(begins=np.zeros(7, np.int64), ends=np.full(7, 36))
    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of items"):
        draw_batches([outside], [0])
    for options in ({"negatives": 1}, {"target_shares": np.full(5, 0.2)}):
        with pytest.raises(ValueError, match=r"items must be in \[0, 5\)"):
            draw_batches([bound(num_items=5, **options)], [0])
    offsets, items = np.array([0, 3]), np.array([0, 1, 2])
    with pytest.raises(ValueError, match=r"row 0 has seen every item that could be drawn \(3 of 3\)"):
        starts = np.array([0, 1])
        draw_batches([EpochBatches(offsets, items, starts, num_items=3, batch_size=1, max_length=2, negatives=1)], [0])
