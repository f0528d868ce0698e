"""Ranks by counting against what evaluations usually do: one product over the catalogue, then topk or argsort.

The shape is that of amazon14_beauty: 22,363 users and 12,101 items; a history of 8 items is left out for each user.
Argsort takes so long that it ranks an eighth of the users, in both halves of its comparison.
"""

import pytest
import torch

from metarec_fast.ops import target_ranks

USERS, V, D, SEEN = 22_363, 12_101, 64, 8
CHUNK = 256  # cases whose scores the baselines keep, in one buffer: faster than 64, 128, 512 and 1024


class Problem:
    def __init__(self, users: int) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        self.h, self.table = draw(users, D), draw(V, D)
        self.targets = torch.randint(V, (users,), generator=generator)
        self.items = torch.randint(V, (users, SEEN), generator=generator)
        self.items[self.items == self.targets[:, None]] = (self.targets[0] + 1) % V
        self.offsets = torch.arange(users + 1) * SEEN

    def ours(self) -> torch.Tensor:
        return target_ranks(self.h, self.table, self.targets, seen=(self.offsets, self.items.view(-1))).greater

    def chunks(self):
        scores = torch.empty(CHUNK, V)
        for begin in range(0, len(self.h), CHUNK):
            part = slice(begin, begin + CHUNK)
            out = torch.mm(self.h[part], self.table.T, out=scores[: len(self.h[part])])
            yield out.scatter_(1, self.items[part], float("-inf")), self.targets[part, None]

    def by_topk(self, k: int = 10) -> torch.Tensor:
        hits = [scores.topk(k).indices == target for scores, target in self.chunks()]
        return torch.cat([torch.where(hit.any(1), hit.int().argmax(1), k) for hit in hits])

    def by_argsort(self) -> torch.Tensor:
        hits = [scores.argsort(1, descending=True) == target for scores, target in self.chunks()]
        return torch.cat([hit.int().argmax(1) for hit in hits])


def same_ranks(a, b):
    # The products round differently by their shape: one case in a hundred may trade places with a neighbour.
    assert (a - b).abs().max() <= 1
    assert (a != b).float().mean() <= 0.01


def same_top_10(a, b):
    same_ranks(a.clamp_max(10), b)


@pytest.mark.parametrize(
    ("users", "baseline", "against", "check", "rounds"),
    [
        (USERS, Problem.by_topk, "torch matmul + topk(10)", same_top_10, 15),
        (USERS // 8, Problem.by_argsort, "torch matmul + argsort", same_ranks, 5),
    ],
    ids=("topk", "argsort"),
)
def bench_target_ranks(compare, users, baseline, against, check, rounds):
    problem = Problem(users)
    compare(
        problem.ours,
        lambda: baseline(problem),
        subject="target_ranks",
        shape=f"{users}x{V}x{D}",
        against=against,
        check=check,
        rounds=rounds,
    )
