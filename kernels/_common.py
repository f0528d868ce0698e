"""What the launchers share: output buffers and block sizes."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of partial sums is never wider than this: wider vectors are walked in chunks.
MAX_BLOCK_D = 128


def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output buffer that the kernel must fill; tests replace this to prove that every element is written."""
    return torch.empty(shape, dtype=dtype, device=device)


def check_shapes(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError for a tensor of another shape than a kernel takes it to be: it would read outside of it."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def block_d(D: int, *, least: int, most: int) -> int:
    """The power of two that holds D, kept between ``least`` and ``most`` (powers of two)."""
    return min(most, max(least, 1 << (D - 1).bit_length()))
