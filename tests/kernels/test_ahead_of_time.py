"""Every kernel compiled for sm_80 and sm_90, with the block sizes and arguments its launcher uses; no GPU is needed.

``pytest -s`` prints what each takes of a multiprocessor: 65536 registers and, on the smallest chip of the generation,
99 KB of shared memory for one program.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from metarec_fast.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_backward
from metarec_fast.kernels.linear_scan import linear_scan, linear_scan_backward
from metarec_fast.kernels.target_ranks import target_ranks
from metarec_fast.kernels.vq_backward import vq_backward
from metarec_fast.kernels.vq_commit import vq_commit
from metarec_fast.kernels.vq_statistics import vq_statistics
from tests.examples import representative

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Launch(NamedTuple):
    """One launch as the launcher made it: what triton.compile needs to make the same kernel."""

    kernel: JITFunction
    signature: dict
    constants: dict
    alignment: dict
    options: dict


class Usage(NamedTuple):
    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


@pytest.fixture
def launches(monkeypatch):
    """Launchers run on CPU tensors append here what they would have launched."""
    recorded = []

    def record(kernel, *args, grid, warmup, **options):
        signature, constants, alignment = {}, {}, {}
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        for position, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            fixed = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (fixed and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or (fixed and value % 16 == 0):
                alignment[(position,)] = [["tt.divisibility", 16]]
        recorded.append(Launch(kernel, signature, constants, alignment, options))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


def compile_for(launch: Launch, capability: int) -> Usage:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.alignment)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    shared = used["SHARED"] + compiled.metadata.shared
    return Usage(used["REG"], used["STACK"], used["LOCAL"], shared, compiled.asm["ptx"])


# Each block shape of the screen: on chip by width and in chunks; split, and in the half types.
@pytest.mark.parametrize(
    ("capability", "dtype", "D"),
    representative(
        [
            (80, torch.float32, 8),
            (80, torch.float32, 64),
            (80, torch.float32, 256),
            (80, torch.bfloat16, 128),
            (80, torch.float16, 256),
            (90, torch.float32, 32),
            (90, torch.float32, 64),
            (90, torch.float32, 256),
            (90, torch.bfloat16, 256),
            (90, torch.float16, 128),
        ],
        [(90, torch.float32, 64)],
    ),
    ids=str,
)
@pytest.mark.parametrize("metric", ["distance", "product"])
def test_no_spills_and_room_for_two(launches, capability, dtype, D, metric):
    x, codebook = torch.zeros(1, 1 << 16, D, dtype=dtype), torch.zeros(1, 1 << 11, D, dtype=dtype)
    row_weight = torch.ones(x.shape[1]) if dtype == torch.float32 else None
    # launchers write nothing here, so let them sort zeros and not what was left in memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metarec_fast.kernels._common.empty", torch.zeros)
        vq_commit(x, codebook, metric=metric)
        vq_statistics(x, torch.zeros(x.shape[:2], dtype=torch.int64), codebook.shape[1], row_weight)
        if dtype == torch.float32:
            vq_backward(x, torch.zeros(x.shape[:2]), x, x, rotation=True)

    names = {launch.kernel.__name__ for launch in launches}
    expected = {"_prepare", "_screen", "_refine", "_gather", "_keys", "_sum_pieces", "_add_pieces"}
    assert (expected | {"_backward"} if dtype == torch.float32 else expected) <= names
    if metric == "product":  # what the metric is nothing to is compiled once
        launches[:] = [launch for launch in launches if launch.kernel.__name__ in ("_prepare", "_screen", "_refine")]
    print()
    for launch in launches:
        name = launch.kernel.__name__
        assert launch.options["enable_fp_fusion"] is (name != "_refine")
        usage = compile_for(launch, capability)
        print(f"sm_{capability} {str(dtype)[6:]:>8} D={D:<4}{name:<12}", end="")
        print(f"{usage.registers:4} registers {usage.stack:4} B stack {usage.shared:7} B shared memory")
        # the ptxas that comes with Triton 3.4 parks one float64 of _refine, whatever the block size
        assert usage.stack <= (8 if name == "_refine" else 0), f"{name} spills {usage.stack} bytes"
        assert usage.local == 0
        assert usage.registers <= 255
        assert usage.shared <= 99 * 1024
        if name == "_refine":
            assert "fma.rn.f64" not in usage.ptx, "ties would fall another way than on the CPU"
        if name == "_screen":
            assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in usage.ptx
            if launch.constants["RESIDENT"] and capability == 90:
                threads = 32 * launch.options["num_warps"]
                assert 2 * threads * usage.registers <= 65536, "two programs no longer fit a multiprocessor"


@pytest.mark.parametrize("capability", representative([80, 90], [90]))
@pytest.mark.parametrize("D", representative([16, 50, 64], [64]))
@pytest.mark.parametrize("with_bias", representative([False, True], [True]))
def test_target_ranks(launches, capability, D, with_bias):
    h, table = torch.zeros(1000, D), torch.zeros(5000, D)
    target_ranks(h, table, torch.zeros(5000) if with_bias else None, torch.zeros(1000, dtype=torch.int64), *[None] * 5)
    assert [launch.kernel.__name__ for launch in launches] == ["_pair_scores", "_count", "_pair_scores"]
    print()
    for launch in launches[:2]:
        usage = compile_for(launch, capability)
        print(f"sm_{capability} D={D:<4}{launch.kernel.__name__:<14}", end="")
        print(f"{usage.registers:4} registers {usage.stack:4} B stack {usage.shared:7} B shared memory")
        assert usage.stack == usage.local == 0
        assert usage.shared <= 99 * 1024
        # one chain of multiply-adds an element: a matrix unit would add in blocks, and a score apart would differ
        assert "fma.rn.f32" in usage.ptx
        assert "mma" not in usage.ptx
        assert "mul.f32" not in usage.ptx


@pytest.mark.parametrize("capability", representative([80, 90], [90]))
@pytest.mark.parametrize("dtype", representative([torch.float32, torch.float64], [torch.float32]))
def test_linear_scan_does_not_spill(launches, capability, dtype):
    a, u, offsets = torch.zeros(2, 128, dtype=dtype), torch.zeros(9, 2, 128, dtype=dtype), torch.tensor([0, 4, 9])
    for reverse in (False, True):
        linear_scan(a, u, offsets, reverse=reverse)
        linear_scan_backward(a, u, u, offsets, reverse=reverse)
    assert [launch.kernel.__name__ for launch in launches] == ["_scan", "_backward"] * 2
    for launch in launches:
        usage = compile_for(launch, capability)
        assert usage.stack == usage.local == usage.shared == 0
        assert usage.registers <= 64


@pytest.mark.parametrize("capability", representative([80, 90], [90]))
@pytest.mark.parametrize("D", representative([16, 64, 128], [64]))
def test_linear_cross_entropy_does_not_spill(launches, capability, D):
    h, table, bias, targets = torch.zeros(900, D), torch.zeros(12_001, D), torch.zeros(12_001), torch.zeros(900).long()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metarec_fast.kernels._common.empty", torch.zeros)
        _, lse = linear_cross_entropy(h, table, targets, bias, -100)
        linear_cross_entropy_backward(lse, h, table, targets, bias, lse, -100, True, True, True)
    assert [launch.kernel.__name__ for launch in launches] == ["_forward", "_rows", "_items"]
    for launch in launches:
        usage = compile_for(launch, capability)
        assert usage.stack == usage.local == 0, f"{launch.kernel.__name__} spills {usage.stack} bytes"
        assert usage.registers <= 255
        assert usage.shared <= 99 * 1024
        assert "mma" in usage.ptx


def test_no_kernel_is_compiled_again_for_another_number_of_rows_or_codes(launches):
    made = []
    for N, K in itertools.product((1025, 4096), (513, 2048)):
        launches.clear()
        x = torch.zeros(1, N, 64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("metarec_fast.kernels._common.empty", torch.zeros)
            patch.setattr("metarec_fast.kernels.nearest_codeword._REFINE_ALL", 0)
            vq_commit(x, torch.zeros(1, K, 64))
            vq_statistics(x, torch.zeros(1, N, dtype=torch.int64), K)
        made.append([str(launch) for launch in launches])
    assert len(made[0]) == 7
    assert made[0] == made[1] == made[2] == made[3]
