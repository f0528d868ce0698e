"""Run by run.py: the extension here is the sanitized one, and the sanitizers end a process that gives cause."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metarec_fast import _C

# One user who has seen ``seen`` of 5000 items, 700 negatives. The extension is given more elements than there are, so
# that nothing but a sanitizer can notice.
DRAW = """
import numpy as np
from metarec_fast import _C
from metarec_fast.ops.arrays import span
seen, negatives, logq = np.arange({seen}, dtype=np.int32), np.empty({negatives}, np.int64), np.empty(700, np.float32)
zero, ends = np.zeros(1, np.int64), np.array([0, 700])
_C.sample_negatives(
    span(zero), span(zero), span(ends), span(np.array([0, 1000])), span(np.array([1000])),
    (span(seen)[0], 1000, "i4"), (span(negatives)[0] + {shift}, 700, "i8"), span(logq), None, None, None,
    rows=1, num_users=1, positions=700, first_row=0, count=1, num_items=5000, shared=False,
    seed=1, stream=0, step=0,
)
print("drawn")
"""
ADDRESS = "AddressSanitizer: heap-buffer-overflow"


def test_the_extension_is_the_sanitized_one_for_this_instruction_set():
    extension = Path(_C.__file__)
    assert extension.parent == Path(__file__).parents[2] / "build/sanitize"
    assert {b"__asan_init", b"__ubsan_handle_type_mismatch_v1_abort"} <= set(extension.read_bytes().split(b"\0"))
    assert _C.active_isa() == os.environ["METAREC_FAST_ISA"]


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({}, None),
        ({"seen": 999}, ADDRESS),  # a read, one element past the end
        ({"negatives": 699}, ADDRESS),  # a write
        ({"negatives": 701, "shift": 4}, "runtime error: store to misaligned address"),
    ],
    ids=["nothing wrong", "read", "write", "undefined behaviour"],
)
def test_a_fault_ends_the_process(change, report):
    script = DRAW.format(**{"seen": 1000, "negatives": 700, "shift": 0, **change})
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if report is None:
        assert (run.returncode, run.stdout) == (0, "drawn\n"), run.stderr
    else:
        assert run.returncode != 0
        assert report in run.stderr
        assert "metarec::" in run.stderr
