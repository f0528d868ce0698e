"""Arrays of the data side: NumPy (also memory-mapped) or CPU tensors, taken by address and never copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any] | Tensor
INT64 = (np.dtype(np.int64),)
INTEGERS = (np.dtype(np.int32), np.dtype(np.int64))
CODES = {torch.float32: "f4", torch.float64: "f8", torch.int32: "i4", torch.int64: "i8"}  # as NumPy calls them


def as_array(value: Array, name: str, *, dtypes: tuple[np.dtype, ...] = INT64, size: int | None = None) -> np.ndarray:
    """``value`` as a one-dimensional contiguous NumPy array over the same memory.

    Raises TypeError or ValueError that names the argument, what was expected and what came.
    """
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {value.device}")
        value = value.detach().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a numpy array or a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if value.ndim != 1 or not value.flags.c_contiguous:
        raise ValueError(f"{name} must be one-dimensional and contiguous, got shape {value.shape}")
    if size is not None and len(value) != size:
        raise ValueError(f"{name} must have {size} elements, got {len(value)}")
    return value


def span(array: np.ndarray | Tensor | None) -> tuple[int, int, str] | None:
    """A contiguous array on the CPU as the extension takes it: address, number of elements, type; None for None.

    The extension checks number and type against the sizes that it works with (csrc/core/bindings.h).
    Raises ValueError for an array that does not lie as one block of aligned memory on the CPU.
    """
    if array is None:
        return None
    if isinstance(array, Tensor):
        if not (array.is_cpu and array.is_contiguous()) or array.is_neg():
            raise ValueError(f"tensor must be contiguous on the CPU, got {array.layout} on {array.device}")
        return array.data_ptr(), array.numel(), CODES.get(array.dtype) or str(array.dtype)
    if not (array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative):
        raise ValueError(f"array must be contiguous, aligned and of native byte order, got {array.dtype}")
    return array.__array_interface__["data"][0], array.size, array.dtype.str[1:]


def check_offsets(offsets: Array) -> np.ndarray:
    """``offsets`` as an array of at least one element."""
    offsets = as_array(offsets, "offsets")
    if len(offsets) == 0:
        raise ValueError("offsets must be [U+1] with U >= 0, got an empty array")
    return offsets


def check_integer(value: int, name: str, *, least: int, below: int | None = None) -> int:
    """Raise TypeError or ValueError unless ``value`` is an integer in [least, below)."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least or (below is not None and value >= below):
        wanted = f"at least {least}" if below is None else f"in [{least}, {below})"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return int(value)


def check_randomness(seed: int, stream: int, step: int) -> dict[str, int]:
    """The three integers that every random number depends on, checked."""
    return {
        "seed": check_integer(seed, "seed", least=0, below=2**64),
        "stream": check_integer(stream, "stream", least=0, below=2**64),
        "step": check_integer(step, "step", least=0, below=2**48),
    }


def arange(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.int64)
