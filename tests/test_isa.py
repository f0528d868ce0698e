"""Every instruction set gives the same codes, and none leaks its instructions into shared code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metarec_fast import _C

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    "avx512_vnni": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}
CORE = (
    "tests/ops/test_bounded_lookup.py::test_equals_reference",
    "tests/ops/test_gather_cooccurrence.py::test_equals_reference",
    "tests/ops/test_nearest_codeword.py::test_equals_reference",
    "tests/ops/test_nearest_codeword.py::test_dtypes_and_heads",
    "tests/ops/test_vq_commit.py::test_equals_reference",
    "tests/ops/test_vq_statistics.py::test_equals_reference",
    "tests/ops/test_linear_scan.py::test_matches_reference",
    "tests/ops/test_target_ranks.py::test_equals_reference",
    "tests/ops/test_target_ranks.py::test_same_rows_tie_to_the_bit_wherever_they_lie",
    "tests/ops/test_target_ranks.py::test_a_score_is_compared_as_if_it_were_computed",
    "tests/ops/test_target_ranks.py::test_close_to_float64",
    "tests/ops/test_target_ranks.py::test_scores_that_are_not_finite_are_counted",
    "tests/ops/test_target_ranks.py::test_threads_and_splits_do_not_show",
)


def python(*arguments, isa):
    environment = {**os.environ, "METAREC_FAST_ISA": isa}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", FLAGS)
def test_core_operators_equal_the_reference(isa):
    if isa not in _C.supported_isas():
        pytest.skip(f"this processor does not support {isa}")
    if isa == _C.active_isa():
        pytest.skip(f"the run around this one uses {isa}")
    which = python("-c", "from metarec_fast import _C; print(_C.active_isa())", isa=isa)
    assert which.stdout.strip() == isa, which.stderr
    run = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *CORE, isa=isa)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 150


def test_unknown_instruction_set_is_named():
    run = python("-c", "from metarec_fast import _C; _C.active_isa()", isa="sse9")
    assert run.returncode != 0
    assert "METAREC_FAST_ISA must be one of {" in run.stderr and "got 'sse9'" in run.stderr


def kernel_files():
    lists = (ROOT / "CMakeLists.txt").read_text()
    return re.search(r"set\(KERNELS\s+([^)]*)\)", lists)[1].split()


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
@pytest.mark.skipif("avx2" not in _C.supported_isas(), reason="needs an x86-64 compiler target")
def test_kernel_files_share_no_code_between_instruction_sets(tmp_path):
    # The linker may take a weak symbol (of a std template or an inline function) from any object file: AVX code would
    # then run on processors without it. Without optimization nothing is hidden by inlining.
    leaked = []
    for source in kernel_files():
        compiled = tmp_path / f"{Path(source).stem}.o"
        command = ["g++", "-std=c++17", "-O0", "-fopenmp", "-w", *FLAGS["avx2"]]
        command += ["-DMETAREC_ISA=avx2", "-DMETAREC_ISA_avx2", "-I", str(ROOT / "csrc")]
        subprocess.run([*command, "-c", str(ROOT / source), "-o", str(compiled)], check=True)
        symbols = subprocess.run(["nm", "-C", str(compiled)], check=True, capture_output=True, text=True).stdout
        defined = [re.match(r"[0-9a-f]+ ([A-Za-z]) (.*)", line) for line in symbols.splitlines()]
        shared = [m[2] for m in defined if m and (m[1] == "W" or (m[1] == "T" and "metarec::avx2::" not in m[2]))]
        leaked += [f"{source}: {name}" for name in shared]
    assert not leaked
