"""Triton kernels of metarec_fast, installed as ``metarec_fast.kernels``. Imports torch and triton only."""

if __name__ != "metarec_fast.kernels":
    # From the repository root this folder would import as a second copy and compile every kernel twice.
    raise ImportError("import metarec_fast.kernels, not kernels")
