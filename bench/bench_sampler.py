"""The sampler against what people write: a Python function for each user, a DataLoader, NumPy over whole batches.

A step: 128 windows of up to 50 positions of each of five domains as large as 5-core Amazon toys, video games, health,
clothing and beauty, one negative a position that the user has not seen. Peers draw users with replacement.
"""

import itertools

import numpy as np
import pytest
import torch

from bench.bench_meta import SHAPES, sequences
from bench.peers.numpy_sampler import NumpySampler
from bench.peers.python_sampler import UserWindows, python_loop_sampler
from metarec_fast.data import Sequences
from metarec_fast.ops.sample_negatives import popularity_table, sample_unseen, seen_items
from metarec_fast.sampling import Mixture, Sampler

BATCH, LENGTH = 128, 50


@pytest.fixture(scope="module")
def domains():
    return {name: sequences(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}


def mixture(domains):
    options = {"batch_size": BATCH, "max_length": LENGTH, "negatives": 1}
    return Mixture({n: Sampler(d, stream=i, **options) for i, (n, d) in enumerate(domains.items())})


def check_windows(data, users, windows):
    """windows: (items, targets, negatives) of each user."""
    for u, (items, targets, negatives) in zip(users, windows, strict=True):
        history = data[u]
        count = min(LENGTH, len(history) - 1)
        assert np.array_equal(items, history[-count - 1 : -1]) and np.array_equal(targets, history[-count:])
        assert len(negatives) == count and not np.isin(negatives, history).any()
        assert negatives.min() >= 0 and negatives.max() < data.num_items


def check_packed(data, users, offsets, *parts):
    check_windows(data, users, list(zip(*(np.split(np.asarray(p).ravel(), offsets[1:-1]) for p in parts), strict=True)))


def check_padded(data, users, parts, valid):
    check_windows(data, users, [tuple(p[b][valid[b]] for p in parts) for b in range(len(users))])


def public_loop(domains):
    rng = np.random.RandomState(0)
    lists = {n: [(d[u] + 1).tolist() for u in range(len(d))] for n, d in domains.items()}
    options = {"batch_size": BATCH, "max_length": LENGTH, "rng": rng}
    return (
        lambda: [python_loop_sampler(lists[n], num_items=d.num_items, **options) for n, d in domains.items()],
        lambda d, b: check_padded(d, b[0], [p - 1 for p in b[1:]], b[2] > 0),
    )


def public_loader(domains):
    rng = np.random.RandomState(0)
    loaders = []
    for d in domains.values():
        lists = [(d[u] + 1).tolist() for u in range(len(d))]
        windows = UserWindows(lists, num_items=d.num_items, max_length=LENGTH, rng=rng)
        loader = torch.utils.data.DataLoader(windows, batch_size=BATCH, shuffle=True, drop_last=True)
        loaders.append(itertools.chain.from_iterable(itertools.repeat(loader)))
    return (
        lambda: [next(loader) for loader in loaders],
        lambda d, b: check_padded(d, b[0].numpy(), [p.numpy() - 1 for p in b[1:]], b[2].numpy() > 0),
    )


def numpy_samplers(domains):
    rng = np.random.default_rng(0)
    return [
        NumpySampler(d.offsets, d.items, num_items=d.num_items, max_length=LENGTH, rng=rng) for d in domains.values()
    ]


def numpy_padded(domains):
    samplers = numpy_samplers(domains)
    return (
        lambda: [s.padded(BATCH) for s in samplers],
        lambda d, b: check_padded(d, b[0], b[1:4], b[4]),
    )


def numpy_packed(domains):
    samplers = numpy_samplers(domains)
    return lambda: [s.packed(BATCH) for s in samplers], lambda d, b: check_packed(d, *b)


PEERS = {
    "Python function for each user": public_loop,
    "DataLoader over users": public_loader,
    "NumPy, padded": numpy_padded,
    "NumPy, packed": numpy_packed,
}


@pytest.mark.parametrize("peer", PEERS)
def bench_step(compare, domains, peer):
    ours, steps = mixture(domains), itertools.count()
    theirs, check_theirs = PEERS[peer](domains)

    def check(mine, others):
        for (_, b), other, data in zip(mine, others, domains.values(), strict=True):
            check_packed(data, b.users.tolist(), b.offsets.numpy(), b.items, b.targets, b.negatives)
            check_theirs(data, other)

    compare(
        lambda: ours.batches(next(steps)),
        theirs,
        subject="a step's batches, one exact negative",
        shape=f"5 domains x {BATCH} x {LENGTH}",
        against=peer,
        dtype="int64",
        check=check,
    )


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("distribution", ["uniform", "popularity"])
def bench_negatives(compare, distribution):
    V, B, L, K = 10**6, 1024, 50, 4
    rng = np.random.default_rng(0)
    offsets = np.concatenate(([0], np.cumsum(4 + rng.geometric(1 / 30, 5000))))
    items = rng.integers(0, V, offsets[-1]).astype(np.int32)
    weights = 1 / np.arange(1, V + 1) ** 0.6
    table = popularity_table((1e6 * weights).astype(np.int64) + 1, alpha=1.0) if distribution == "popularity" else None
    seen = seen_items(offsets, items, num_items=V, table=table)
    rows, segments, steps = rng.permutation(5000)[:B], np.arange(B + 1) * L, itertools.count()
    p = torch.from_numpy(weights)

    def check(ours, theirs):
        drawn = ours[0].numpy().reshape(B, -1)
        for b in range(0, B, 17):
            user = rows[b]
            assert not np.isin(drawn[b], items[offsets[user] : offsets[user + 1]]).any()
        assert ours[0].shape == (B * L, K) and theirs.numel() == B * L * K and int(theirs.max()) < V

    compare(
        lambda: sample_unseen(seen, rows, count=K, segments=segments, step=next(steps)),
        (lambda: torch.randint(V, (B * L * K,)))
        if table is None
        else (lambda: torch.multinomial(p, B * L * K, replacement=True)),
        subject=f"{B * L * K} {distribution} negatives, none seen by its user",
        shape=f"V={V}",
        against=f"torch.{'randint' if table is None else 'multinomial'}, nothing rejected",
        dtype="int64",
        check=check,
    )


@pytest.mark.usefixtures("one_thread")
def bench_windows(compare):
    rng = np.random.default_rng(0)
    offsets = np.arange(20_001) * 60
    data = Sequences(offsets, rng.integers(0, 12_000, offsets[-1]).astype(np.int32), 12_000)
    ours, steps = Sampler(data, batch_size=1024, max_length=LENGTH), itertools.count()
    theirs = NumpySampler(offsets, data.items, num_items=12_000, max_length=LENGTH, rng=rng)
    theirs._unseen = lambda users: users  # windows alone

    def check(mine, others):
        expected = np.concatenate([data[u][-LENGTH:] for u in mine.users])
        assert np.array_equal(mine.targets, expected)
        assert np.array_equal(others[3], np.concatenate([data[u][-LENGTH:] for u in others[0]]))

    compare(
        lambda: ours.batch(next(steps)),
        lambda: theirs.packed(1024),
        subject="1024 windows, shuffled users",
        shape=f"1024 x {LENGTH}",
        against="NumPy, packed",
        dtype="int64",
        check=check,
    )
