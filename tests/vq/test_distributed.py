"""Two ranks on one machine: every rank must hold the same codebook, and the one that all rows together give."""

import functools
import warnings

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from metarec_fast.vq import FastVQ
from metarec_fast.vq.sampling import draw_rows

CASES = {
    "average": {},
    "cosine_heads": {"use_cosine_sim": True, "heads": 2, "separate_codebook_per_head": True},
    "dead_codes": {"threshold_ema_dead_code": 3.0},
    "kmeans": {"kmeans_init": True, "kmeans_iters": 5},
    "affine": {"affine_param": True, "sync_affine_param": True},
    "in_place_optimizer": {
        "in_place_codebook_optimizer": functools.partial(torch.optim.SGD, lr=0.5),
        "learnable_codebook": True,
        "ema_update": False,
    },
    "stochastic": {"stochastic_sample_codes": True},
}
RANKS = 2


def batches(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    # ranks hold different numbers of rows, and one of them none at all in the last step
    return [torch.randn(1, sizes[rank], 8, generator=generator) for sizes in ((30, 50), (40, 20), (0, 60))]


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    modules = {}
    for name, options in CASES.items():
        torch.manual_seed(0)
        modules[name] = FastVQ(8, 20, **options)  # built before the process group exists
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.manual_seed(100 + rank)
    states = {}
    for name, module in modules.items():
        for x in batches(rank):
            module(x)
        states[name] = module.state_dict()
    rows = torch.arange(50.0).view(1, 50, 1) + 50 * rank
    valid = torch.rand(1, 50) < 0.2
    states["draw"] = (rows[valid], *draw_rows(rows, valid, torch.ones(1, 40, dtype=torch.bool), sync=True))
    unsynced = FastVQ(8, 20, sync_codebook=False)
    unsynced(batches(rank)[0])
    states["unsynced"] = unsynced.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_though_built_before_the_process_group(states, name):
    """VectorQuantize asks once, at construction, whether it is distributed, and then never syncs."""
    torch.testing.assert_close(states[0][name], states[1][name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["average", "cosine_heads", "affine"])
def test_two_ranks_are_one_with_all_rows(states, name):
    torch.manual_seed(0)
    alone = FastVQ(8, 20, **CASES[name])
    for parts in zip(*(batches(rank) for rank in range(RANKS)), strict=True):
        alone(torch.cat(parts, 1))
    torch.testing.assert_close(states[0][name], dict(alone.state_dict()))


def test_dead_codes_are_replaced_by_rows_of_both_ranks(states):
    codes = states[0]["dead_codes"]["_codebook.embed"][0]
    origins = [rank for rank in range(RANKS) for x in batches(rank) if (codes[:, None] == x[0]).all(-1).any()]
    assert set(origins) == {1}  # rank 0 had no rows in the last step
    assert (states[0]["dead_codes"]["_codebook.cluster_size"] >= 3).all()


def test_kmeans_counts_the_rows_of_both_ranks(states):
    assert states[0]["kmeans"]["_codebook.initted"]
    first = sum(batches(rank)[0].shape[1] for rank in range(RANKS))
    cluster_size = torch.tensor(float(first))
    for step in (1, 2):
        cluster_size.lerp_(torch.tensor(float(sum(batches(rank)[step].shape[1] for rank in range(RANKS)))), 0.2)
    torch.testing.assert_close(states[0]["kmeans"]["_codebook.cluster_size"].sum(), cluster_size)


def test_draws_over_ranks_are_distinct_rows_that_every_rank_sees(states):
    valid = torch.cat([s["draw"][0] for s in states]).flatten().tolist()
    _, drawn, distinct = states[0]["draw"]
    assert torch.equal(drawn, states[1]["draw"][1]) and torch.equal(distinct, states[1]["draw"][2])
    assert sorted(drawn[distinct].flatten().tolist()) == sorted(valid)  # fewer rows than places: each is taken once


def test_sync_codebook_false_keeps_ranks_apart(states):
    assert not torch.equal(states[0]["unsynced"]["_codebook.embed"], states[1]["unsynced"]["_codebook.embed"])
