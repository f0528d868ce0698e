"""Two and four ranks on one machine: every rank must hold the same codebook, the one that all rows together give."""

import contextlib
import functools
import time
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from metarec_fast.vq import FastResidualVQ, FastVQ
from metarec_fast.vq.parts.sampling import draw_rows

K = 20
CASES = {
    "average": {},
    "cosine_heads": {"use_cosine_sim": True, "heads": 2, "separate_codebook_per_head": True},
    "projection": {"codebook_dim": 4},
    "residual": {"levels": 3},
    "residual_shared": {"levels": 3, "shared_codebook": True},
    "residual_dropout": {"levels": 6, "quantize_dropout": True},
    "dead_codes": {"threshold_ema_dead_code": 3.0},
    "residual_dead_codes": {"levels": 2, "threshold_ema_dead_code": 3.0, "shared_codebook": True},
    "kmeans": {"kmeans_init": True, "kmeans_iters": 5},
    "kmeans_residual": {"kmeans_init": True, "kmeans_iters": 5, "levels": 2},
    "affine": {"affine_param": True, "sync_affine_param": True},
    "in_place_optimizer": {
        "in_place_codebook_optimizer": functools.partial(torch.optim.SGD, lr=0.5),
        "learnable_codebook": True,
        "ema_update": False,
    },
    "stochastic": {"stochastic_sample_codes": True},
}
# as many rows as codes: k-means initialisation must take each row once, whatever it draws
KMEANS_ROWS = {"all": {2: (8, 12), 4: (5, 4, 8, 3)}, "empty": {2: (0, 20), 4: (0, 9, 0, 11)}}
DETERMINED = ["average", "cosine_heads", "projection", "residual", "residual_shared", "affine"]
# summed over ranks in a training step: the statistics of each level, packed; for a draw of rows, numbers and rows
COLLECTIVES = {
    "average": 1,
    "cosine_heads": 1,
    "projection": 1,
    "residual": 3,
    "residual_shared": 3,
    "dead_codes": 3,
}
KMEANS_COLLECTIVES = 1 + 2 + 5  # number of rows, a draw, iterations


def build(name):
    torch.manual_seed(0)
    options = dict(CASES[name])
    if levels := options.pop("levels", None):
        return FastResidualVQ(dim=8, num_quantizers=levels, codebook_size=K, **options)
    return FastVQ(8, K, **options)


def batches(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    # ranks hold different numbers of rows, and one of them none at all in the last step
    return [torch.randn(1, size, 8, generator=generator) for size in (30 + 5 * rank, 40 - 8 * rank, 30 * rank)]


def kmeans_batch(which, world, rank):
    rows = torch.randn(1, K, 8, generator=torch.Generator().manual_seed(7))
    return rows.split(KMEANS_ROWS[which][world], 1)[rank]


def trained(name):
    module = build(name)
    for layer in getattr(module, "layers", [module]):
        codebook = layer._codebook
        codebook.embed.copy_(torch.randn(1, K, 8, generator=torch.Generator().manual_seed(3)))
        codebook.embed_avg.copy_(codebook.embed * 5), codebook.cluster_size.fill_(5), codebook.initted.fill_(True)
    return module.state_dict()


@contextlib.contextmanager
def counted():
    """Counts the calls of every collective."""
    calls, kept = [], {}
    for name in ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter", "barrier"):
        kept[name] = getattr(dist, name)
        setattr(dist, name, lambda *args, f=kept[name], **kwargs: (calls.append(1), f(*args, **kwargs))[1])
    yield calls
    for name, function in kept.items():
        setattr(dist, name, function)


def work(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    modules = {name: build(name) for name in CASES}  # built before the process group exists
    inits = {which: build("kmeans") for which in KMEANS_ROWS}
    # a rank that waits for another in vain fails after this time
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    torch.manual_seed(100 + rank)
    states, calls, dropped, reported = {}, {}, [], {}
    for name, module in modules.items():
        calls[name] = []
        for x in batches(rank):
            with counted() as count:
                indices = module(x.requires_grad_())[1]
            calls[name].append(len(count))
            if name == "residual_dropout" and indices.numel():
                dropped.append((indices[0, 0] < 0).tolist())
        states[name] = {key: value.clone() for key, value in module.state_dict().items()}  # eval moves averages too
        with counted() as count:
            module.eval()(x)
        calls[name].append(len(count))
    for which, module in inits.items():
        with counted() as count:
            module(kmeans_batch(which, world, rank), freeze_codebook=True)
        calls[f"start_{which}"] = len(count)
        states[f"start_{which}"] = module.state_dict()
    # one rank alone has loaded a checkpoint: the last one, then the first
    for source in (world - 1, 0):
        for name in ("kmeans", "kmeans_residual"):
            module, key = build(name), f"mixed_{name}_{source}"
            if rank == source:
                module.load_state_dict(trained(name))
            calls[key] = []
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for x in batches(rank)[:2]:
                    with counted() as count:
                        module(x)
                    calls[key].append(len(count))
            states[key] = module.state_dict()
            reported[key] = [str(warning.message) for warning in caught]
    rows = torch.arange(50.0).view(1, 50, 1) + 50 * rank
    valid = torch.rand(1, 50) < 0.15
    states["draw"] = (rows[valid], *draw_rows(rows, valid, torch.ones(1, 60, dtype=torch.bool), sync=True))
    unsynced = FastVQ(8, K, sync_codebook=False)
    unsynced(batches(rank)[0])
    states["unsynced"] = unsynced.state_dict()
    torch.save({"states": states, "calls": calls, "dropped": dropped, "reported": reported}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.spawn(work, (request.param, str(folder)), request.param, join=False)
    end = time.monotonic() + 120
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.terminate()
            pytest.fail("ranks wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", [*CASES, *(f"start_{which}" for which in KMEANS_ROWS)])
def test_ranks_agree_though_built_before_the_process_group(ranks, name):
    """VectorQuantize asks once, at construction, whether it is distributed, and then never syncs."""
    for other in ranks[1:]:
        torch.testing.assert_close(other["states"][name], ranks[0]["states"][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", DETERMINED)
def test_ranks_are_one_with_all_rows(ranks, name):
    alone = build(name)
    for parts in zip(*(batches(rank) for rank in range(len(ranks))), strict=True):
        alone(torch.cat(parts, 1))
    torch.testing.assert_close(ranks[0]["states"][name], dict(alone.state_dict()))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_statistics_are_one_reduction(ranks, name):
    for rank in ranks:
        assert rank["calls"][name] == [COLLECTIVES[name]] * 3 + [0]


def test_collectives_of_the_kmeans_step_and_after(ranks):
    for rank in ranks:
        assert rank["calls"]["kmeans"] == [KMEANS_COLLECTIVES + 1, 1, 1, 0]
        assert {rank["calls"][f"start_{which}"] for which in KMEANS_ROWS} == {KMEANS_COLLECTIVES}


@pytest.mark.parametrize("name", ["kmeans", "kmeans_residual"])
def test_a_rank_that_has_codes_gives_them_to_those_that_have_none(ranks, name):
    """As where all had loaded them, and no rank waits for another or sums what another does not."""
    levels = 2 if name == "kmeans_residual" else 1
    alone = build(name)
    alone.load_state_dict(trained(name))
    for parts in zip(*([b[:2] for b in map(batches, range(len(ranks)))]), strict=True):
        alone(torch.cat(parts, 1))
    for source in (len(ranks) - 1, 0):
        for number, rank in enumerate(ranks):
            torch.testing.assert_close(rank["states"][f"mixed_{name}_{source}"], dict(alone.state_dict()))
            # whether they agree, the codes, and the statistics; then the statistics alone
            assert rank["calls"][f"mixed_{name}_{source}"] == [3 * levels, levels]
            messages = rank["reported"][f"mixed_{name}_{source}"]
            assert len(messages) == (0 if number == source else levels)
            assert all(f"rank {number} has no codes yet" in m and f"rank {source} has" in m for m in messages)


@pytest.mark.parametrize("which", KMEANS_ROWS)
def test_kmeans_initialises_from_the_rows_of_all_ranks(ranks, which):
    """As many rows as codes: as on one process with all rows, each row is a code. Also with ranks that have none."""
    state = ranks[0]["states"][f"start_{which}"]
    alone = build("kmeans")
    alone(torch.randn(1, K, 8, generator=torch.Generator().manual_seed(7)), freeze_codebook=True)
    assert state["_codebook.initted"]
    for name in ("embed", "cluster_size", "embed_avg"):
        actual, expected = (s[f"_codebook.{name}"].view(K, -1) for s in (state, alone.state_dict()))
        orders = [s["_codebook.embed"][0, :, 0].argsort() for s in (state, alone.state_dict())]
        torch.testing.assert_close(actual[orders[0]], expected[orders[1]])


def test_kmeans_counts_the_rows_of_all_ranks(ranks):
    sizes = [sum(batches(rank)[step].shape[1] for rank in range(len(ranks))) for step in range(3)]
    cluster_size = float(sizes[0])
    for size in sizes:  # the first batch initialises the codes, and then moves them as any other
        cluster_size += 0.2 * (size - cluster_size)
    total = ranks[0]["states"]["kmeans"]["_codebook.cluster_size"].sum()
    torch.testing.assert_close(total, torch.tensor(cluster_size))


def test_dead_codes_are_replaced_by_rows_of_all_ranks_that_have_rows(ranks):
    state = ranks[0]["states"]["dead_codes"]
    codes = state["_codebook.embed"][0]
    last = [batches(rank)[-1][0] for rank in range(len(ranks))]
    origins = {rank for rank, x in enumerate(last) if (codes[:, None] == x).all(-1).any()}
    assert origins and 0 not in origins  # rank 0 had no rows in the last step
    assert (state["_codebook.cluster_size"] >= 3).all()


def test_draws_over_ranks_are_distinct_rows_that_every_rank_sees(ranks):
    draws = [rank["states"]["draw"] for rank in ranks]
    valid = torch.cat([draw[0] for draw in draws]).flatten().tolist()
    _, drawn, distinct = draws[0]
    for _, other, other_distinct in draws[1:]:
        assert torch.equal(drawn, other) and torch.equal(distinct, other_distinct)
    assert len(valid) < 60
    assert sorted(drawn[distinct].flatten().tolist()) == sorted(valid)  # fewer rows than places: each is taken once


def test_ranks_drop_the_same_levels(ranks):
    dropped = [rank["dropped"] for rank in ranks]
    for other in dropped[1:]:
        assert other[: len(dropped[0])] == dropped[0]  # rank 0 had no rows in the last step
    assert len(dropped[0]) == 2


def test_sync_codebook_false_keeps_ranks_apart(ranks):
    states = [rank["states"]["unsynced"]["_codebook.embed"] for rank in ranks]
    assert not torch.equal(states[0], states[1])
