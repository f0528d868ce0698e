"""The Triton kernels on the CPU, by Triton's interpreter.

Triton decides whether to interpret when a kernel is decorated, so the variable must be set before the first import: the
tests are in interpreted.py and run in a process of their own. Kernels that were interpreted cannot be compiled, and
test_ahead_of_time.py compiles them in this one.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="the interpreter of Triton before 3.7 cannot loop to a run-time bound with NumPy 2.4 or newer",
)
def test_kernels_under_the_interpreter(everything):
    tests = Path(__file__).with_name("interpreted.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(tests),
        *(["--all"] if everything else []),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize(
    ("module", "unwanted"), [("metarec_fast", "triton"), ("metarec_fast.ops", "metarec_fast.kernels")]
)
def test_kernels_are_loaded_on_first_use(module, unwanted):
    script = f"import sys, {module}; print([m for m in sys.modules if (m + '.').startswith('{unwanted}.')])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_folder_imports_under_its_installed_name_only():
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, capture_output=True, text=True)
    assert run.returncode != 0
    assert "import metarec_fast.kernels, not kernels" in run.stderr
