"""The roofline of a first-order outer step, and the fraction of it that bench_meta's world reaches.

    python -m bench meta_roofline [--threads 1]

The roofline is what no arrangement can leave out: the multiply-adds of the losses (logits, and the gradients of states
and table) and of the encoder's products (forward and two gradients), at the processor's measured peak; the distances
to all codes; and an exponential a logit, as the eight multiply-adds that range reduction and a polynomial of float32's
precision take. Time is that of the process on all its threads over their number, so that a busy machine does not count
against the step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bench_meta import SHAPES, world
from metarec_fast.config import MetaConfig
from metarec_fast.meta import Source, outer_step
from metarec_fast.ops.peak import measured_peak

EXPONENTIAL = 8  # multiply-adds


def least(run: Callable[[], object], *, rounds: int) -> float:
    """Fewest seconds of processor time of a call."""
    seconds = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    threads = torch.get_num_threads()
    model, shared, private, batches, names = world(4)
    *sources, target = names
    passes = [*sources, *[target] * len(sources)]  # each source's own loss, and the target's at each adaptation

    D, K = model.config.dim, model.config.codebook_size
    weights = sum(p.numel() for name, p in shared.items() if name.startswith("encoder") and p.dim() == 2)
    rows = {name: len(batch.items) for name, batch in batches.items()}
    logits = sum(rows[name] * SHAPES[name][1] for name in passes)
    encoder = 3 * weights * sum(rows[name] for name in passes)
    distances = K * D * sum(rows[name] for name in passes)
    multiply_adds = 3 * D * logits + encoder + distances

    peak = measured_peak(1).flops / 2  # multiply-adds a second
    roofline = (multiply_adds + EXPONENTIAL * logits) / peak

    given = [Source(n, private[n], [batches[n]]) for n in sources]
    config = MetaConfig(similarity_decay=0.0)

    def step() -> object:
        return outer_step(model.loss, shared, given, private[target], batches[target], config=config)

    step()
    taken = least(step, rounds=10)
    print(f"losses      {6e-9 * D * logits:6.1f} GFLOP, {1e-6 * logits:.0f} million exponentials")
    print(f"encoder     {2e-9 * encoder:6.1f} GFLOP, distances to codes {2e-9 * distances:.1f} GFLOP")
    print(f"processor   {2e-9 * peak:6.0f} GFLOP/s a thread")
    print(f"roofline    {1e3 * roofline / threads:6.0f} ms on {threads} thread(s)")
    print(f"outer step  {1e3 * taken / threads:6.0f} ms, {100 * roofline / taken:.0f} % of the roofline")


if __name__ == "__main__":
    main()
