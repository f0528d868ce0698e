"""The processor's float32 multiply-add peak on some threads, and what a copy moves.

python -m bench fma_peak
"""

import argparse

import torch

from metarec_fast.ops import backend_info
from metarec_fast.ops.peak import measured_peak


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    isa = backend_info()["cpu"]["isa"]
    for threads in range(1, torch.get_num_threads() + 1):
        peak = measured_peak(threads)
        print(f"{isa}, {threads} threads: {1e-9 * peak.flops:.0f} GFLOP/s, copy {1e-9 * peak.bytes:.1f} GB/s")


if __name__ == "__main__":
    main()
