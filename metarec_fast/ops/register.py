"""How an operator meets torch: schema, backends, tracing and batching. No arithmetic here."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    from metarec_fast import _C
except ImportError as error:
    built = sorted(path.name for path in Path(__file__).parents[1].glob("_C.*"))
    raise ImportError(
        f"the C++ extension of metarec_fast cannot be loaded: expected metarec_fast/_C{EXTENSION_SUFFIXES[0]}, found "
        f"{', '.join(built) or 'none'} ({error}); install the package again with this Python"
    ) from error

NAMESPACE = "metarec_fast"
Backend = Literal["auto", "reference", "cpu", "triton"]
BACKENDS = ("auto", "reference", "cpu", "triton")


def define(
    schema: str, *, cpu: Callable, fake: Callable, cuda: Callable | None = None, vmap: Callable | None = None
) -> Any:
    """Register ``schema`` with one implementation per device and return the callable operator.

    cpu, cuda: implementations; they get checked, contiguous tensors.
    fake: shapes and dtypes of the outputs, for tracing.
    vmap: ``(info, in_dims, *args) -> (outputs, out_dims)``, one batched call instead of a loop.
    """
    name = f"{NAMESPACE}::{schema.split('(')[0].strip()}"
    torch.library.define(name, schema[schema.index("(") :])
    torch.library.impl(name, "CPU", cpu)
    if cuda is not None:
        torch.library.impl(name, "CUDA", cuda)
    torch.library.register_fake(name, fake)
    if vmap is not None:
        torch.library.register_vmap(name, vmap)
    return getattr(torch.ops.metarec_fast, schema.split("(")[0].strip()).default


def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output buffer that the kernel must fill; tests replace this to prove that every element is written."""
    return torch.empty(shape, dtype=dtype, device=device)


def has_triton() -> bool:
    """Whether Triton is installed, found without importing it."""
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def choose_backend(backend: Backend, device: torch.device, *, operator: str, triton: bool) -> str:
    """The backend that runs: ``backend`` itself, or what fits the device if it is "auto".

    triton: whether the operator has a Triton kernel.
    Raises ValueError for an unknown name and RuntimeError for a backend that cannot serve ``device``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and triton and has_triton() else "reference"
    if backend == "cpu" and device.type != "cpu":
        raise RuntimeError(f"{operator}: backend='cpu' needs tensors on the CPU, got {device}")
    if backend == "triton":
        if not triton:
            raise RuntimeError(f"{operator} has no Triton kernel; use backend='auto' or 'reference'")
        if device.type != "cuda":
            raise RuntimeError(f"{operator}: backend='triton' needs tensors on a CUDA device, got {device}")
        if not has_triton():
            raise RuntimeError(f"{operator}: backend='triton' needs the package triton, which is not installed")
    return backend


def transformed() -> bool:
    """Whether a torch.func transform is active, also while torch.compile traces."""
    return torch._C._functorch.maybe_current_level() is not None


# what torch.compiler.assume_constant_result does, without its import of torch._dynamo (and of Triton with it)
transformed._dynamo_marked_constant = True


def forward_mode() -> bool:
    """Whether tangents are computed, by torch.func.jvp or torch.autograd.forward_ad."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def traced_transform() -> bool:
    """Whether no autograd.Function may be applied here, and plain operators must do.

    Where torch.compile traces a torch.func transform, as it would reduce the Function to operators without gradient,
    silently (torch 2.13); and in forward mode, where it would need a rule of its own.
    """
    return forward_mode() or (torch.compiler.is_compiling() and transformed())


def check_is_tensor(value: Any, name: str) -> None:
    """Raise TypeError, with what turns ``value`` into a tensor, if it is none."""
    if isinstance(value, Tensor):
        return
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    convert = "torch.from_numpy" if kind == "numpy.ndarray" else "torch.as_tensor"
    raise TypeError(f"{name} must be a torch.Tensor, got {kind}: pass {convert}({name})")


def check_tensor(
    value: Any, name: str, *, dtypes: tuple[torch.dtype, ...], dims: int, device: torch.device | None = None
) -> None:
    """Raise TypeError or ValueError that names the argument, what was expected and what came."""
    check_is_tensor(value, name)
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def backend_info() -> dict[str, Any]:
    """What runs the operators here, and why: extension, instruction set, threads, GPU, Triton.

    Raises ValueError if METAREC_FAST_ISA names no instruction set of this processor.
    """
    forced = os.environ.get("METAREC_FAST_ISA")
    cuda = torch.cuda.is_available()
    return {
        "cpu": {
            "isa": _C.active_isa(),
            "supported_isas": _C.supported_isas(),
            "why": f"forced by METAREC_FAST_ISA={forced}" if forced else "the widest this processor supports",
            "threads": _C.max_threads(),
        },
        "gpu": {
            "available": cuda,
            "device": torch.cuda.get_device_name() if cuda else None,
            "triton": has_triton(),
            "why": "CUDA tensors run Triton kernels"
            if cuda and has_triton()
            else ("no CUDA device" if not cuda else "triton is not installed: CUDA tensors run the reference"),
        },
    }
