"""Ranks by counting against what evaluations usually do: one product over the catalogue, then topk or argsort.

The shape is that of a mid-sized domain, 22,363 users and 12,101 items; of its cases four batches are ranked.
"""

import pytest
import torch

from metarec_fast.evaluation import target_ranks

USERS, V, D, BATCH, BATCHES = 22_363, 12_101, 64, 256, 4


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (USERS,), generator=generator).sort().values  # the order in which `evaluate` goes
    begins = [i * (USERS // BATCHES) for i in range(BATCHES)]
    return table, [(torch.randn(BATCH, D, generator=generator), targets[b : b + BATCH]) for b in begins]


def ours(batches):
    table, cases = batches
    return torch.cat([target_ranks(lambda b, e, h=h: h @ table[b:e].T, num_items=V, targets=t)[0] for h, t in cases])


def by_topk(batches, k=20):
    table, cases = batches
    hits = [(h @ table.T).topk(k).indices == t[:, None] for h, t in cases]
    return torch.cat([torch.where(hit.any(1), hit.int().argmax(1), k) for hit in hits])


def by_argsort(batches):
    table, cases = batches
    orders = [(h @ table.T).argsort(1, descending=True) for h, t in cases]
    return torch.cat([(order == t[:, None]).int().argmax(1) for order, (_, t) in zip(orders, cases, strict=True)])


def same_ranks(a, b):
    # The products round differently by their shape: one case in a hundred may trade places with a neighbour.
    assert (a - b).abs().max() <= 1
    assert (a != b).float().mean() <= 0.01


def same_top_20(a, b):
    same_ranks(a.clamp_max(20), b)


@pytest.mark.parametrize(
    ("baseline", "against", "check", "rounds"),
    [(by_topk, "torch matmul + topk(20)", same_top_20, 15), (by_argsort, "torch matmul + argsort", same_ranks, 5)],
    ids=("topk", "argsort"),
)
def bench_target_ranks(compare, batches, baseline, against, check, rounds):
    compare(
        lambda: ours(batches),
        lambda: baseline(batches),
        subject="target_ranks",
        shape=f"{BATCHES}x{BATCH}x{V}x{D}",
        against=against,
        check=check,
        rounds=rounds,
    )
