#!/usr/bin/env bash
# Builds from source, tests and times the Triton kernels and the outer step on a machine with a CUDA card. No network.
#
#   [PYTHON=python3] [OUT=bench/results] bash bench/gpu.sh [--dry-run]
#
# Needs what PYTHON already has: torch, triton, numpy, pybind11, cmake, ninja, pytest. Peers run if they are importable.
# --dry-run needs no card: it builds, compiles every kernel for sm_90 and runs the benchmark's checks tiny on the CPU.
# Without a card and without --dry-run it stops with status 1 where the card is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
case "${1:-}" in
  "") ;;
  --dry-run) dry_run=true ;;
  *) echo "gpu.sh: unknown option $1; usage: [PYTHON=python3] [OUT=folder] bash bench/gpu.sh [--dry-run]" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
PATH="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
export PYTHONUNBUFFERED=1

echo "== versions"
"$PYTHON" - <<'PY'
import platform
from importlib.metadata import version

print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "pybind11", "pytest", "setuptools"):
    print(name, version(name))
PY
cmake --version | head -n 1
echo "ninja $(ninja --version)"

echo "== build"
"$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index --editable .
"$PYTHON" -c 'from metarec_fast.ops import backend_info; print(backend_info())'

if $dry_run; then
  echo "== every kernel compiled for sm_90"
  "$PYTHON" -m pytest -q -s tests/kernels/test_ahead_of_time.py -k "90-"
  echo "== the benchmark, tiny, on the CPU"
  "$PYTHON" bench/gpu_kernels.py --dry-run
  echo "gpu.sh: dry run done; the tests marked gpu and the timings need a CUDA card"
  exit 0
fi

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: built, but torch finds no CUDA card and the rest needs one (--dry-run checks what does not)" >&2
  exit 1
fi

echo "== tests marked gpu"
# only their files: others import packages that a GPU machine may lack
mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
"$PYTHON" -m pytest -q -m gpu "${files[@]}"

echo "== benchmark"
"$PYTHON" bench/gpu_kernels.py --out "$OUT"
