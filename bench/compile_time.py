"""What compiling the encoder costs and gives: seconds to the first step, graphs over ten lengths, time of a step.

    python -m bench compile_time [--threads 1] [--rounds 15]

Each encoder in a process of its own with an empty compile cache. A step is forward and backward of the encoder alone,
64 wide, two layers, windows of up to 50 positions; then of a whole training step of one domain of beauty's size (codes,
cross-entropy over 12,101 items). Compiled and eager agree before anything is timed. Writes
results/compile-<device>.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

WINDOWS = (128, 16, 32, 48, 64, 80, 96, 112, 144, 160)  # ten batches, so ten packed lengths
COLUMNS = ("encoder", "first step, s", "graphs", "encoder, ms", "eager/compiled", "whole step, ms", "eager/compiled")


def measure(encoder: str, *, rounds: int) -> dict[str, object]:
    import torch
    from torch._dynamo.utils import counters

    from bench import bench_meta
    from bench.ratio import interleaved
    from metarec_fast.config import ModelConfig
    from metarec_fast.models.recommender import Recommender
    from metarec_fast.sampling.sampler import Sampler

    domain = bench_meta.sequences(*bench_meta.SHAPES["beauty"], seed=0)
    batches = [Sampler(domain, batch_size=n).batch(0) for n in WINDOWS]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Recommender(ModelConfig(dropout=0.0, encoder=encoder), {"beauty": domain.num_items})
        model.init_codebook(["beauty"], seed=0)
        models.append(model)
    eager, compiled = models
    compiled.compile_encoder()

    def encode(model, batch) -> list[torch.Tensor]:
        x, by_y = torch.randn(2, len(batch.items), 64, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        y = model.shared.encoder(x, batch.offsets)
        return [y, *torch.autograd.grad(y, [x, *model.shared.encoder.parameters()], by_y)]

    def train(model, batch) -> list[torch.Tensor]:
        value = model.loss(model.shared_parameters(), model.private_parameters("beauty"), batch)
        return [value, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]

    begin = time.perf_counter()
    encode(compiled, batches[0])
    first = time.perf_counter() - begin
    for batch in batches:
        for one, other in zip(encode(eager, batch), encode(compiled, batch), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * float(one.abs().max()))
    graphs = counters["stats"]["unique_graphs"]
    ratios = [
        interleaved(lambda run=run: run(compiled, batches[0]), lambda run=run: run(eager, batches[0]), rounds=rounds)
        for run in (encode, train)
    ]
    found = {"encoder": encoder, "first": first, "graphs": graphs, "positions": [len(b.items) for b in batches]}
    return found | {"ratios": [r._asdict() for r in ratios]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one", choices=("lru", "sasrec"), help="measure this encoder here and print JSON")
    options = parser.parse_args()
    import torch

    from bench.machine import RESULTS, commit, machine, slug, versions

    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(measure(options.one, rounds=options.rounds)))
        return
    lines = [f"|{'|'.join(COLUMNS)}|", f"|---|{'--:|' * (len(COLUMNS) - 1)}"]
    for encoder in ("lru", "sasrec"):
        with tempfile.TemporaryDirectory() as cache:
            given = f"--threads {options.threads} --rounds {options.rounds} --one {encoder}".split()
            run = subprocess.run(
                [sys.executable, __file__, *given],
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        found = json.loads(run.stdout.splitlines()[-1])
        cells = [encoder, f"{found['first']:.1f}", str(found["graphs"])]
        for r in found["ratios"]:
            cells += [f"{r['fast_ms']:.1f}", f"{r['ratio']:.2f} ({r['p5']:.2f}-{r['p95']:.2f})"]
        lines.append(f"|{'|'.join(cells)}|")
        print(lines[-1], flush=True)
    about = machine("cpu")
    first, *others = found["positions"]
    conditions = (
        f"{about['device']}, {about['isa']}, {about['threads']} thread(s), float32, {versions()}, commit {commit()}. "
        f"Times of a compiled step at {first} positions, forward and backward, interleaved with an eager one, median "
        f"and 5-95 % of {options.rounds} rounds; graphs over ten lengths of {min(others)} to {max(others)} positions, "
        "compiled with dynamic=True and an empty cache. First step: compiling forward and backward, the compiler's "
        "imports too."
    )
    path = RESULTS / f"compile-{slug(about['device'])}.md"
    path.write_text("\n".join(["# Compiling the encoder", "", conditions, "", *lines, ""]), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
