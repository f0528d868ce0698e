"""bench/gpu.sh and bench/gpu_kernels.py, as far as a machine without a card can tell."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_sequence
from bench.gpu_case import Rates

BENCH = Path(__file__).parents[2] / "bench"


def test_dry_run_checks_every_provider_and_writes_nothing(tmp_path):
    command = [sys.executable, BENCH / "gpu_kernels.py", "--dry-run", "--out", tmp_path, "--only", "float32 H1"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for kernel in ("nearest_codeword", "vq_commit", "vq_statistics", "target_ranks"):
        lines = [line for line in run.stdout.splitlines() if line.startswith(kernel)]
        assert "metarec_fast" in lines[0]
        assert len(lines) >= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kernel", "providers"),
    [
        ("linear_scan float32", 2),
        ("linear_scan backward", 2),
        ("linear_cross_entropy", 3),
        pytest.param("outer step, order 1", 8, marks=pytest.mark.slow),
        ("outer step, order 2", 6),
    ],
)
def test_what_steps_are_made_of_is_checked_and_runs(kernel, providers):
    (case,) = gpu_sequence.cases("cpu", kernel, Rates(1.0, 1.0, 1.0, 1.0))
    calls = dict(case.providers)
    assert len(calls) == providers and "metarec_fast" in next(iter(calls))
    case.check(next(iter(calls.values()))())
    for call in calls.values():
        call()
    assert case.roofline_ms > 0


def test_a_result_that_is_off_is_not_timed():
    close = gpu_sequence.close
    close([torch.ones(3)], [torch.ones(3)], tolerance=1e-5)
    with pytest.raises(AssertionError):
        close([torch.ones(3) * 1.001], [torch.ones(3)], tolerance=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a card")
def test_without_a_card_it_says_so():
    run = subprocess.run([sys.executable, BENCH / "gpu_kernels.py"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "no CUDA device" in run.stderr


def test_script_names_its_usage_for_an_unknown_option():
    run = subprocess.run(["bash", BENCH / "gpu.sh", "--fast"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "unknown option --fast; usage:" in run.stderr
