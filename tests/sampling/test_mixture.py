from collections import Counter

import numpy as np
import pytest
import torch

from metarec_fast.data import Sequences
from metarec_fast.sampling import Mixture, Sampler
from metarec_fast.sampling.mixture import BLOCK, quotas

USERS = {"a": 40, "b": 400, "c": 90, "target": 30}


def samplers(**options):
    made = {}
    for stream, (name, users) in enumerate(USERS.items()):
        offsets = np.arange(users + 1) * 5
        items = np.random.default_rng(stream).integers(0, 60, offsets[-1])
        options = {"batch_size": 16, "max_length": 4, "negatives": 1, **options}
        made[name] = Sampler(Sequences(offsets, items, 60), stream=stream, **options)
    return made


def same(a, b):
    fields = ("items", "targets", "offsets", "users", "negatives", "logq")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_every_domain_once():
    made = samplers()
    mixture = Mixture(made, always=("target",))
    for step in (0, 3, 1000):
        batches = mixture.batches(step)
        assert [name for name, _ in batches] == ["a", "b", "c", "target"]
        assert all(same(batch, made[name].batch(step)) for name, batch in batches)


def test_several_batches_of_each_domain():
    made = samplers()
    mixture = Mixture(made, each=2, always=("target",))
    assert mixture.schedule(3) == [(name, k) for name in "abc" for k in (6, 7)] + [("target", 3)]
    buffers = mixture.buffers()
    for (name, batch), (_, k) in zip(mixture.batches(3, buffers=buffers), mixture.schedule(3), strict=True):
        assert same(batch, made[name].batch(k))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_draws_follow_size_to_the_beta_and_leave_epochs_complete(beta):
    mixture = Mixture(samplers(), draws=2, always=("target",), beta=beta)
    steps = BLOCK  # two blocks of draws
    drawn = [name for step in range(steps) for name, _ in mixture.schedule(step)]
    counts = Counter(drawn)
    assert counts.pop("target") == steps
    sizes = np.array([USERS[n] for n in "abc"], float) ** beta
    expected = sizes / sizes.sum() * 2 * steps
    for name, wanted in zip("abc", expected, strict=True):
        assert abs(counts[name] - wanted) <= 2 * (1 + 3 * wanted / BLOCK)  # one draw to a block and rounding
    schedule = [entry for step in range(steps) for entry in mixture.schedule(step)]
    taken = {n: sorted(own for name, own in schedule if name == n) for n in "abc"}
    assert all(own == list(range(len(own))) for own in taken.values())  # each of its batches once, none left out


def test_a_step_depends_on_nothing_before_it():
    mixture, fresh = (Mixture(samplers(), draws=3, seed=5) for _ in range(2))
    steps = [9, 0, 12345, 2**40, 9]
    first = [mixture.batches(step) for step in steps]
    for step, batches in reversed(list(zip(steps, first, strict=True))):
        again = fresh.batches(step)
        assert [n for n, _ in batches] == [n for n, _ in again]
        assert all(same(a, b) for (_, a), (_, b) in zip(batches, again, strict=True))
    assert [n for n, _ in first[0]] != [n for n, _ in first[1]] or not same(first[0][0][1], first[1][0][1])
    assert any(Mixture(samplers(), draws=3, seed=6).schedule(s) != mixture.schedule(s) for s in range(5))


@pytest.mark.parametrize("draws", [None, 4])
def test_buffers_hold_any_step(draws):
    mixture = Mixture(samplers(), draws=draws)
    buffers = mixture.buffers()
    for step in range(40):
        for (name, a), (other, b) in zip(mixture.batches(step, buffers=buffers), mixture.batches(step), strict=True):
            assert name == other
            assert same(a, b)
            assert a.items.untyped_storage().data_ptr() == buffers.windows.data_ptr()


def test_buffers_hold_the_windows_of_one_domain_and_the_negatives_of_another():
    data = Sequences(np.arange(41) * 5, np.zeros(200, np.int64), 60)
    made = {
        "windows": Sampler(data, batch_size=16),
        "negatives": Sampler(data, batch_size=4, shared_negatives=900, stream=1),
    }
    mixture = Mixture(made, draws=1)
    buffers = mixture.buffers()
    shown = {mixture.batches(step, buffers=buffers)[0][0] for step in range(40)}
    assert shown == set(made)


@pytest.mark.parametrize("sizes", [[1], [1, 10**9], [5] * 1024, [3, 1, 4, 1, 5]])
def test_quotas(sizes):
    counts = quotas(sizes, beta=0.7)
    assert counts.sum() == BLOCK
    assert counts.min() >= 1
    weights = np.array(sizes, float) ** 0.7
    assert np.abs(counts - 1 - weights / weights.sum() * (BLOCK - len(sizes))).max() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"always": ("x",)}, "always must name samplers, got 'x'; samplers are a, b, c, target"),
        ({"draws": 0}, "draws must be in"),
        ({"draws": 1, "always": tuple(USERS)}, "draws=1 needs between 1 and 1024 domains to draw from, got 0"),
        ({"each": 0}, "each must be in"),
        ({"each": 2, "draws": 3}, "each must be 1 where draws are given, got each=2 and draws=3"),
        ({"beta": float("nan")}, "beta must be finite, got nan"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(samplers(), **options)
    with pytest.raises(ValueError, match="samplers must hold at least one domain, got none"):
        Mixture({})
    with pytest.raises(ValueError, match="step must be in"):
        Mixture(samplers()).batches(-1)
