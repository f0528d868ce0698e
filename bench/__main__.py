"""Runs benchmarks, and writes the pages' figures from their results.

    python -m bench                      this list
    python -m bench NAME --help          the options of one
    python -m bench ratios [-k WORDS]    ours against peers: bench_*.py, into bench/results/<device>.csv
    python -m bench pages [--check]      tables and docs/speed.svg from bench/results

Results are checked before they are timed, and timed in interleaved pairs (`bench.ratio`).
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {  # a module of bench, and what it measures
    "ratios": "times as fast as peers: lookup, FastVQ, residual VQ, sampler, encoders, losses, ranks, outer step",
    "summary": "the ratios of this device, with their geometric means and goals",
    "pages": "the tables of README and docs, and docs/speed.svg, from the results",
    "exactness": "wrong codes among millions of random and adversarial rows, on every instruction set",
    "memory": "peak extra memory of a FastVQ training step, against vector_quantize_pytorch",
    "meta_memory": "peak extra memory of an outer step with a large catalogue",
    "meta_roofline": "an outer step against the least time of its operations",
    "scaling": "time and memory of an outer step as sources, items, length and batch grow",
    "compile_time": "what torch.compile of the encoder costs and gives",
    "data_wait": "the share of training steps spent waiting for data",
    "import_rate": "rows a second and memory of an import larger than memory",
    "launches": "operators that an outer step launches on a GPU, counted without one",
    "fma_peak": "the processor's multiply-add peak and copy bandwidth",
    "gpu_kernels": "Triton kernels and outer step on a card (bench/gpu.sh builds and tests first)",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__ + "\n" + "\n".join(f"  {name:<14} {what}" for name, what in BENCHMARKS.items()))
        return 0
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}", file=sys.stderr)
        return 2
    if name == "ratios":
        import pytest

        return int(pytest.main([str(ROOT / "bench"), "--benchmark-only", *rest]))
    sys.argv = [f"python -m bench {name}", *rest]
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
