"""The processor's float32 multiply-add peak on some threads, and what a copy moves.

python bench/fma_peak.py
"""

import torch

from metarec_fast.ops import backend_info
from metarec_fast.ops.peak import measured_peak


def main() -> None:
    isa = backend_info()["cpu"]["isa"]
    for threads in range(1, torch.get_num_threads() + 1):
        peak = measured_peak(threads)
        print(f"{isa}, {threads} threads: {1e-9 * peak.flops:.0f} GFLOP/s, copy {1e-9 * peak.bytes:.1f} GB/s")


if __name__ == "__main__":
    main()
