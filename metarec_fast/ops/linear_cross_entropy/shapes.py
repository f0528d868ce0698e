"""Shapes of the gradients."""

from __future__ import annotations

from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]  # of h, table and bias; those that are not needed are empty


def gradient_shapes(
    h: Tensor, table: Tensor, need_h: bool, need_table: bool, need_bias: bool
) -> tuple[tuple[int, ...], ...]:
    (T, D), V = h.shape, table.shape[0]
    return (T, D) if need_h else (0,), (V, D) if need_table else (0,), (V,) if need_bias else (0,)
