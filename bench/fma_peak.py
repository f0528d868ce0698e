"""The processor's float32 multiply-add peak on some threads, by a loop that g++ compiles when it is asked for.

python bench/fma_peak.py
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = {"avx512": ("-mavx512f", "-DBENCH_BYTES=64"), "avx2": ("-mavx2", "-mfma", "-DBENCH_BYTES=32")}


def compiled(isa: str) -> Callable[[int, int], None]:
    """``run(multiply_adds, threads)``, which does that many float32 multiply-adds, shared by the threads.

    isa: the widest instruction set to use; those beyond AVX-512 and AVX2 have their vectors. Raises KeyError for
    others and CalledProcessError if g++ fails.
    """
    flags = FLAGS["avx512" if isa.startswith("avx512") else isa]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        command = ["g++", "-std=c++17", "-O2", "-ffp-contract=fast", "-shared", "-fPIC", *flags]
        command += [str(SOURCE), "-o", str(library)]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.fma_peak.argtypes, loaded.fma_peak.restype = (ctypes.c_long,), ctypes.c_float
    loaded.multiply_adds_per_step.restype = ctypes.c_long
    per_step = loaded.multiply_adds_per_step()

    def run(multiply_adds: int, threads: int) -> None:
        steps = -(-multiply_adds // (per_step * threads))
        if threads == 1:
            loaded.fma_peak(steps)
            return
        with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter
            list(pool.map(loaded.fma_peak, [steps] * threads))

    return run


def main() -> None:
    sys.path.insert(0, str(SOURCE.parents[1]))
    import torch

    from metarec_fast.ops import backend_info

    isa, count = backend_info()["cpu"]["isa"], 4_000_000_000
    run = compiled(isa)
    for threads in range(1, torch.get_num_threads() + 1):
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            run(count, threads)
            seconds.append(time.perf_counter() - begin)
        print(f"{isa}, {threads} threads: {2e-9 * count / min(seconds):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
