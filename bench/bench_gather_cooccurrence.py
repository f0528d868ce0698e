"""gather_cooccurrence against the same sums as products of sparse matrices, one for each relation and group of ages."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from metarec_fast.cooccurrence.features import AGES, cooccurrence_graph
from metarec_fast.data import Sequences, synthetic
from metarec_fast.ops import gather_cooccurrence


def products(graph, offsets, items):
    """What the operator gives, by torch's sparse products: candidates' cells b V + v, and their sums."""
    V, B, rows = graph.num_items, len(offsets) - 1, np.repeat(np.arange(graph.num_items), np.diff(graph.offsets))
    cells = torch.from_numpy(np.stack((rows, graph.items.astype(np.int64))))
    relations = [
        torch.sparse_coo_tensor(
            cells, torch.from_numpy(graph.values[:, r].copy()), (V, V), check_invariants=False
        ).coalesce()
        for r in range(graph.relations)
    ]
    lengths = np.diff(offsets)
    case = np.repeat(np.arange(B), lengths)
    age = np.repeat(offsets[1:], lengths) - 1 - np.arange(len(items))
    groups = []
    for first, last in pairwise(AGES):
        kept = (age >= first) & (age < last)
        share = 1 / np.maximum(np.bincount(case[kept], minlength=B), 1)
        entries = torch.from_numpy(np.stack((case[kept], items[kept].astype(np.int64))))
        values = torch.from_numpy(share[case[kept]].astype(np.float32))
        groups.append(torch.sparse_coo_tensor(entries, values, (B, V), check_invariants=False).coalesce())

    def run():
        parts = [torch.sparse.mm(h, m).coalesce() for h in groups for m in relations]
        keys = [p.indices()[0] * V + p.indices()[1] for p in parts]
        union = torch.cat(keys).unique()
        out = torch.zeros(len(union), len(parts))
        for column, (key, part) in enumerate(zip(keys, parts, strict=True)):
            out[torch.searchsorted(union, key), column] = part.values()
        return union, out

    return run


@pytest.mark.parametrize("B", [16, 128])
def bench_gather_cooccurrence(compare, B):
    domain = synthetic(source_users=3_000, source_items=10_000, target_users=1_000, target_items=500).sources[0]
    train = domain.sequences
    graph = cooccurrence_graph(train)
    users = np.random.default_rng(0).choice(len(train), B, replace=False)
    taken = np.minimum(train.lengths[users], AGES[-1])
    offsets = np.concatenate(([0], np.cumsum(taken)))
    at = np.repeat(train.offsets[1:][users] - taken - offsets[:-1], taken) + np.arange(offsets[-1])
    histories = Sequences(offsets, train.items[at].astype(np.int32), train.num_items)

    def fast():
        packed, candidates, features = gather_cooccurrence(graph, histories.offsets, histories.items, ages=AGES)
        case = torch.arange(B).repeat_interleave(packed.diff())
        return case * graph.num_items + candidates, features[:, :-1]

    def same(ours, theirs):
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)

    compare(
        fast,
        products(graph, histories.offsets, histories.items),
        subject="co-occurrence of candidates",
        shape=f"{B} histories, {len(graph.items)} pairs x {graph.relations} relations",
        against="torch.sparse products",
        check=same,
        rounds=7,
    )
