"""Runs tests over the extension that ``make sanitize`` built, with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitized/run.py [--every-isa] [pytest arguments]

Runs on this processor's best instruction set, or on each one. Without tests among the arguments: what reaches every
kernel, and the sampler. Each run begins with overruns.py, which fails unless the sanitizers are there and stop the
process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = (
    "tests/ops/test_bounded_lookup.py",
    "tests/ops/test_epoch_order.py",
    "tests/ops/test_gather_cooccurrence.py",
    "tests/ops/test_linear_cross_entropy.py::test_loss_and_gradients_match_float64",
    "tests/ops/test_linear_scan.py::test_matches_reference",
    "tests/ops/test_memory_safety.py",
    "tests/ops/test_missed_steps.py",
    "tests/ops/test_nearest_codeword.py::test_equals_reference",
    "tests/ops/test_sample_negatives.py",
    "tests/ops/test_target_ranks.py",
    "tests/ops/test_vq_backward.py",
    "tests/ops/test_vq_commit.py::test_equals_reference",
    "tests/ops/test_vq_statistics.py::test_equals_reference",
)
COMPILED_ONCE = (
    "tests/sampling/test_sampler.py",
    "tests/ops/test_epoch_batches.py",
    "tests/ops/test_pack_windows.py",
    "tests/ops/test_pad_packed.py",
    "tests/ops/test_philox.py",
)


def library(name: str) -> str:
    return subprocess.run(
        [os.environ.get("CXX", "g++"), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def environment() -> dict[str, str]:
    """Of a process that can load the extension: the sanitizer must come before everything, and before it throws
    an exception it must know the C++ library, which Python itself does not load."""
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave things to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }


def main(arguments: list[str]) -> int:
    every_isa = "--every-isa" in arguments
    options = [a for a in arguments if a.startswith("-") and a != "--every-isa"]
    tests = [a for a in arguments if not a.startswith("-")]
    sanitized = environment()
    ask = "from metarec_fast import _C; print(_C.__file__, *_C.supported_isas(), sep=chr(10))"
    where, *isas = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, env=sanitized, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    assert Path(where).parent == ROOT / "build/sanitize", where
    for isa in isas if every_isa else isas[-1:]:
        once = COMPILED_ONCE if isa == isas[-1] else ()
        # without -s, pytest would hold back what a sanitizer says before it ends the process
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        command += [*options, str(HERE / "overruns.py"), *(tests or (*KERNELS, *once))]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env={**sanitized, "METAREC_FAST_ISA": isa})
        print(f"sanitize: {isa}, {time.perf_counter() - begin:.0f} s", flush=True)
        if done.returncode:
            print(f"sanitize: failed on {isa}, status {done.returncode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
