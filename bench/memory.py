"""Peak extra memory of a training step, ours and vector_quantize_pytorch's, from the kernel's own high-water mark.

    python -m bench memory [--gradient rotation straight_through]

Linux only. Each measurement is a process of its own: it makes the module and its input, takes one step on a few rows so
that threads and libraries are there, resets the high-water mark of the resident size (5 into /proc/self/clear_refs),
takes the step, and subtracts what was resident before. The extra memory includes the step's results: quantized rows,
indices, loss and the gradient of the rows. Every block above 64 KB is mapped and unmapped by itself
(MALLOC_MMAP_THRESHOLD_), so nothing freed before hides in the figure. Writes results/memory-<device>.md.

The limit for ours is 3 N D 4 bytes + 8 K D 4 bytes + 1 MiB; the last two terms are the O(K D) and what pages and
threads round up to.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.shapes import SHAPES  # noqa: E402

MODULES = ("metarec_fast", "vector_quantize_pytorch")
GRADIENTS = ("rotation", "straight_through")
MIB = 1 << 20


def status(field: str) -> int:
    """A size of this process from /proc/self/status, bytes."""
    return int(re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024


def peak_rise(run: Callable[[], Any]) -> int:
    """Bytes by which the resident size rises above what it is now while ``run`` runs."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    held = run()  # its result counts too
    peak = status("VmHWM")
    del held
    return peak - before


def limit(N: int, D: int, K: int) -> int:
    return 3 * N * D * 4 + 8 * K * D * 4 + MIB


def measure(module: str, gradient: str, N: int, D: int, K: int) -> int:
    """Bytes by which the resident size rises during a step; in this process, so only once."""
    import torch

    if module == "metarec_fast":
        from metarec_fast import FastVQ as Module
    else:
        from vector_quantize_pytorch import VectorQuantize as Module
    torch.manual_seed(0)
    vq = Module(D, K, rotation_trick=gradient == "rotation")
    x, g = torch.randn(1, N, D, requires_grad=True), torch.randn(1, N, D)

    def step(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized, indices, loss = vq(x)
        torch.autograd.backward((quantized, loss), (g, None))
        return quantized, indices, loss

    step(torch.randn(1, 256, D, requires_grad=True), torch.randn(1, 256, D))
    return peak_rise(lambda: step(x, g))


def measured(module: str, gradient: str, N: int, D: int, K: int) -> int:
    """`measure` in a fresh process. Raises RuntimeError with its output if it fails."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--worker", module, gradient, str(N), str(D), str(K)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradient", nargs="+", default=GRADIENTS, choices=GRADIENTS)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        module, gradient, *shape = args.worker
        print(measure(module, gradient, *map(int, shape)))
        return 0

    from bench.machine import RESULTS, commit, device_name, slug, versions

    lines = [
        "| gradient | N x D x K | 3 N D 4 bytes | limit | FastVQ | in 3 N D 4 | within | vector_quantize_pytorch |",
        "|---|---|--:|--:|--:|--:|---|--:|",
    ]
    within = True
    for gradient in args.gradient:
        for N, D, K, _ in SHAPES:
            ours, theirs = (measured(module, gradient, N, D, K) for module in MODULES)
            fits = ours <= limit(N, D, K)
            within &= fits
            sizes = [f"{size / MIB:.1f}" for size in (3 * N * D * 4, limit(N, D, K), ours)]
            lines.append(
                f"| {gradient} | {N} x {D} x {K} | {' | '.join(sizes)} | {ours / (3 * N * D * 4):.2f} | "
                f"{'yes' if fits else '**no**'} | {theirs / MIB:.1f} |"
            )
            print(lines[-1], flush=True)
    device = device_name("cpu")
    text = f"""# Peak extra memory of a training step

MiB, by `python -m bench memory` on {device}, {versions("vector-quantize-pytorch")}, commit {commit()}. The limit is
3 N D 4 bytes + 8 K D 4 bytes + 1 MiB; results of the step are included.

""" + "\n".join(lines)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"memory-{slug(device)}.md").write_text(text + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
