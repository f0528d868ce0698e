"""Where the vectors are in an input: channels, images, masks, heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec_fast.ops.register import check_is_tensor, transformed


def as_indices(indices: Any, name: str = "indices") -> Tensor:
    """Indices of any integer dtype as int64; -1 stands for none.

    Raises TypeError for what is no tensor, and ValueError for a dtype that is not integer or, on a CPU, for numbers
    below -1, to which a dtype too small for the codebook wraps.
    """
    check_is_tensor(indices, name)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name} must be int64 or another integer dtype, got {indices.dtype}")
    wide = indices.long()
    if _can_be_read(wide) and bool((wide < -1).any()):
        why = "" if indices.dtype == torch.int64 else f": is {indices.dtype} too small for them?"
        raise ValueError(f"{name} must be at least -1, got {int(wide.min())}{why}")
    return wide


def _can_be_read(x: Tensor) -> bool:
    """Whether looking at values costs nothing: not on a device, nor while a program is traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor
    return x.device.type == "cpu" and not traced and not transformed()


@dataclass(frozen=True)
class Layout:
    """Between an input, its tokens [B, ..., dim], and the rows [H, N, D] that are compared with the codes.

    H is ``heads`` if each has its own codebook. Otherwise it is 1, and the heads of a token are rows side by side.
    """

    dim: int
    heads: int
    separate: bool
    channel_last: bool
    image: bool
    volume: bool

    @property
    def channels_second(self) -> bool:
        return not self.channel_last or self.image or self.volume

    def tokens(self, x: Tensor) -> Tensor:
        """The input with its channels last. Raises ValueError if it does not fit."""
        check_is_tensor(x, "x")
        if not x.is_floating_point():
            raise ValueError(f"x must be of a floating dtype, got {x.dtype}")
        if self.image:
            form, fits = f"[B, {self.dim}, H, W]", x.dim() == 4
        elif self.volume:
            form, fits = f"[B, {self.dim}, D, H, W]", x.dim() == 5
        elif not self.channel_last:
            form, fits = f"[B, {self.dim}, N] or [B, {self.dim}]", x.dim() in (2, 3)
        else:
            form, fits = f"[B, ..., {self.dim}]", x.dim() >= 2
        if not fits or x.shape[1 if self.channels_second else -1] != self.dim:
            raise ValueError(f"x must be {form}, got {tuple(x.shape)}")
        return x.movedim(1, x.dim() - 1) if self.channels_second and x.dim() > 2 else x

    def tokens_and_mask(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None = None, *, only_finite: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`tokens` and `token_mask`. only_finite: tokens with NaN or infinity do not count."""
        tokens = self.tokens(x)
        mask = self.token_mask(tokens, mask, lens)
        if only_finite:
            finite = tokens.isfinite().all(-1)
            mask = finite if mask is None else finite & mask
        return tokens, mask

    def like_input(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Tokens, channels last, back to the form of ``x``; further dimensions before the channels come last."""
        return tokens.movedim(tokens.dim() - 1, 1) if self.channels_second and x.dim() > 2 else tokens

    def token_mask(self, tokens: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
        """bool [B, ...], True where a token counts; None if all do. Raises ValueError for what does not fit."""
        if mask is None and lens is None:
            return None
        if mask is not None and lens is not None:
            raise ValueError("mask and lens exclude each other")
        if self.image or self.volume or tokens.dim() < 3:
            raise ValueError(f"mask and lens are for sequences of vectors, got x with tokens {tuple(tokens.shape)}")
        check_is_tensor(mask if lens is None else lens, "mask" if lens is None else "lens")
        if lens is not None:
            if lens.shape != tokens.shape[:1]:
                raise ValueError(f"lens must be [{tokens.shape[0]}], got {tuple(lens.shape)}")
            mask = torch.arange(tokens.shape[1], device=lens.device) < lens.unsqueeze(-1)
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(f"mask must be bool {tuple(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        return mask[(..., *(None,) * (tokens.dim() - 3))].expand(tokens.shape[:-1])

    def rows(self, tokens: Tensor) -> Tensor:
        """[..., heads * D] to [H, N, D]."""
        if self.separate:
            return tokens.reshape(-1, self.heads, tokens.shape[-1] // self.heads).transpose(0, 1)
        return tokens.reshape(1, -1, tokens.shape[-1] // self.heads)

    def row_mask(self, mask: Tensor) -> Tensor:
        """Mask of tokens to mask of rows, [N]."""
        return mask.flatten() if self.separate else mask.flatten().repeat_interleave(self.heads)

    def from_rows(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[H, N, D] to [..., heads * D]; [1, N, k, D] to [..., k, D]."""
        if rows.dim() == 4:
            return rows.reshape(*tokens.shape[:-1], *rows.shape[2:])
        if self.separate:
            rows = rows.transpose(0, 1)
        return rows.reshape(*tokens.shape[:-1], rows.shape[-1] * self.heads)

    def indices_from_rows(self, indices: Tensor, tokens: Tensor) -> Tensor:
        """[H, N] to [...], or [..., heads] if there are several; [1, N, k] to [..., k]."""
        if self.heads == 1:
            return indices.reshape(*tokens.shape[:-1], *indices.shape[2:])
        indices = indices.transpose(0, 1) if self.separate else indices
        return indices.reshape(*tokens.shape[:-1], self.heads)

    def indices_to_rows(self, indices: Tensor) -> Tensor:
        """[...] or [..., heads] to [H, N]."""
        return indices.reshape(-1, self.heads).transpose(0, 1) if self.separate else indices.reshape(1, -1)

    def positions(self, tokens: Tensor) -> int:
        """Places of a token in the batch's items: the length of a sequence, the pixels of an image."""
        if self.image or self.volume:
            return math.prod(tokens.shape[1:-1])
        return tokens.shape[-2] if tokens.dim() > 2 else 1

    def by_position(self, rows: Tensor, *, tokens: Tensor) -> Tensor:
        """[H, N, ...], or [1, N, ...], to [H, P, N / P, ...]: the rows at each position of the batch's items."""
        heads = 1 if self.separate else self.heads
        items = tokens.shape[0] if self.image or self.volume or tokens.dim() == 2 else math.prod(tokens.shape[:-2])
        rows = rows.reshape(rows.shape[0], items, self.positions(tokens), heads, *rows.shape[2:])
        return rows.transpose(1, 2).flatten(2, 3)

    def upstream_rows(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """[H, N, D] as VectorQuantize has it: [B, P, D], or with several heads [H, B, P, D] or [1, B * h, P, D]."""
        positions = self.positions(tokens)
        if self.heads == 1:
            return rows.reshape(-1, positions, rows.shape[-1])
        if self.separate:
            return rows.reshape(self.heads, -1, positions, rows.shape[-1])
        return rows.reshape(-1, positions, self.heads, rows.shape[-1]).transpose(1, 2).flatten(0, 1).unsqueeze(0)
