"""Peak extra memory of an outer step whose target has 57,289 items, from the kernel's own high-water mark.

    python -m bench meta_memory

Linux only; measured as bench/memory.py does, each order in a process of its own, after a step of as many positions
over a smaller table. What was resident before the step holds the parameters, and the kernels that oneDNN makes for each
number of rows and keeps, up to 1,024 of them (about 14 MB for the five batches of a step at order 2). The gradients
that the optimizer applies are counted apart, as they are the step's result: a table's gradient for each domain, and the
shared one. Exits with 1 if a step takes more than 64 MB beside its result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.memory import peak_rise  # noqa: E402

LIMIT = 64e6
ORDERS = ("1", "2")


def measure(order: str) -> dict[str, float]:
    """Bytes by which the resident size rises during a step, and those of its gradients."""
    import torch

    from bench import bench_meta
    from metarec_fast.config import MetaConfig
    from metarec_fast.meta import Source, outer_step

    torch.set_num_threads(2)
    meta = MetaConfig(similarity_decay=0.0, order=int(order))

    def world(batch_size: int) -> tuple:
        model, shared, private, batches, names = bench_meta.world(4, batch_size=batch_size)
        return model, shared, [Source(n, private[n], [batches[n]]) for n in names[:-1]], private["beauty"], batches

    def step(model, shared, sources, target, batches) -> object:
        return outer_step(model.loss, shared, sources, target, batches["beauty"], config=meta)

    step(*world(128))  # threads, libraries, autograd, and what oneDNN keeps for these numbers of rows
    bench_meta.SHAPES["beauty"] = bench_meta.LRUREC_BEAUTY
    measured = world(128)
    results: list = []
    rise = peak_rise(lambda: results.append(step(*measured)))
    found = results[0]
    grads = [found.shared_grad, found.target_grad, *found.source_grads.values()]
    return {"rise": rise, "grads": sum(g.nbytes for part in grads for g in part.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=ORDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker)))
        return 0
    within = True
    for order in ORDERS:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        run = subprocess.run(
            [sys.executable, __file__, "--worker", order],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout.splitlines()[-1])
        beside = found["rise"] - found["grads"]
        within &= beside <= LIMIT
        print(f"order {order}: {beside / 1e6:.1f} MB beside {found['grads'] / 1e6:.1f} MB of gradients", flush=True)
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
