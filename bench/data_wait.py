"""How long training steps wait for data that a background thread makes: a share of their time.

python -m bench data_wait [--steps 60]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.bench_meta import SHAPES, sequences  # noqa: E402
from bench.machine import RESULTS, commit, device_name, slug, versions  # noqa: E402
from metarec_fast.config import MetaConfig, ModelConfig  # noqa: E402
from metarec_fast.meta import Source, outer_step  # noqa: E402
from metarec_fast.models.recommender import Recommender  # noqa: E402
from metarec_fast.sampling import Mixture, Prefetch, Sampler  # noqa: E402

BATCH, LENGTH = 128, 50


def measure(title: str, mixture: Mixture, step, *, steps: int) -> str:
    """A row of the table: the share of the time that ``step(batches)`` waited, and what making in place would take."""
    with Prefetch(mixture.batches) as prefetch:
        for _ in range(steps):
            step(next(prefetch))
        share, seconds = prefetch.wait_share, prefetch.waited_s + prefetch.used_s
    begin = time.perf_counter()
    for i in range(steps):
        mixture.batches(i)
    making = (time.perf_counter() - begin) / steps
    row = f"| {title} | {1e3 * seconds / (steps - 1):.1f} | {1e3 * making:.3f} | {share:.4%} |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    names = list(SHAPES)
    data = {name: sequences(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    torch.manual_seed(0)
    model = Recommender(ModelConfig(dropout=0.0), {name: SHAPES[name][1] for name in names})
    model.init_codebook(names, seed=0)
    shared = model.shared_parameters()

    def samplers(chosen: list[str], **options: int) -> dict[str, Sampler]:
        common = {"batch_size": BATCH, "max_length": LENGTH, **options}
        return {name: Sampler(data[name], stream=i, **common) for i, name in enumerate(chosen)}

    def single(batches):
        name, batch = batches[0]
        model.loss(shared, model.private_parameters(name), batch).backward()

    def meta(batches):
        sources = [Source(name, model.private_parameters(name), [batch]) for name, batch in batches[:-1]]
        private = model.private_parameters(names[-1])
        outer_step(model.loss, shared, sources, private, batches[-1][1], config=MetaConfig())

    rows = [
        measure("beauty, full softmax", Mixture(samplers(names[-1:])), single, steps=steps),
        measure(
            "beauty, 512 shared negatives", Mixture(samplers(names[-1:], shared_negatives=512)), single, steps=steps
        ),
        measure("outer step, 4 sources and beauty", Mixture(samplers(names)), meta, steps=max(steps // 4, 2)),
    ]
    device = device_name("cpu")
    text = f"""# Share of a training step spent waiting for data

By `python -m bench data_wait` on {device}, {torch.get_num_threads()} threads, {versions()}, commit {commit()}.
{BATCH} windows of at most {LENGTH} positions of each domain; batches come from `Prefetch`, two ahead; the first is not
counted, as nothing could have hidden it.

| step | ms a step | ms to make its data in place | waited |
|---|--:|--:|--:|
""" + "\n".join(rows)
    (RESULTS / f"data-wait-{slug(device)}.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
