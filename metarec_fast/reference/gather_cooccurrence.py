"""Definition of the co-occurrence for candidates: what items of a history have been seen together with."""

from __future__ import annotations

import numpy as np


def gather_cooccurrence(
    graph: tuple[np.ndarray, np.ndarray, np.ndarray], offsets: np.ndarray, items: np.ndarray, *, ages: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Same contract as ``metarec_fast.ops.gather_cooccurrence``, one case after the other; sums in float64."""
    graph_offsets, graph_items, values = graph
    R, width = values.shape[1], (len(ages) - 1) * values.shape[1] + 1
    packed, candidates, features = [0], [], []
    for b in range(len(offsets) - 1):
        history = items[offsets[b] : offsets[b + 1]][::-1]  # newest first
        rows: dict[int, np.ndarray] = {}
        for g in range(len(ages) - 1):
            group = history[ages[g] : ages[g + 1]]
            for item in group:
                for e in range(graph_offsets[item], graph_offsets[item + 1]):
                    row = rows.setdefault(int(graph_items[e]), np.zeros(width))
                    row[g * R : (g + 1) * R] += values[e].astype(np.float64) / len(group)
        for item in set(history.tolist()) & rows.keys():
            rows[item][-1] = 1
        candidates += sorted(rows)
        features += [rows[item] for item in sorted(rows)]
        packed.append(len(candidates))
    stacked = np.stack(features) if features else np.zeros((0, width))
    return np.array(packed, np.int64), np.array(candidates, np.int64), stacked.astype(np.float32)
