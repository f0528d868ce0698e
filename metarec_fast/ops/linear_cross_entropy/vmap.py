"""Batches of calls, under torch.func.vmap, as one call where they share the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def batched(run: Callable, rows: str, needs: bool = True) -> Callable:
    """vmap of an operator whose tensors named in ``rows``, by position, have a row for each state.

    Batches that share the table are one call over all their rows, unless each wants a table's gradient of its own. Such
    calls, and those with a table each, run one after the other: each is already as parallel as the machine.
    """

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        S = info.batch_size
        by_row = [str(i) in rows.split() for i in range(len(args))]
        one_table = all(dim is None for dim, row in zip(in_dims, by_row, strict=True) if not row)
        if one_table and not (needs and any(args[-2:])):
            flat = [
                (x.expand(S, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
                if row and x is not None
                else x
                for x, dim, row in zip(args, in_dims, by_row, strict=True)
            ]
            outputs = tuple(x.unflatten(0, (S, -1)) if x.numel() else x.expand(S, 0) for x in run()(*flat))
        else:
            calls = [
                run()(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(S)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    return vmap


def batched_sum(run: Callable) -> Callable:
    """vmap of the operator that gives a total first, of which every batch has its own: it is summed anew."""

    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs, dims = batched(lambda: lambda *rows: run()(*rows)[1:], rows="0 2 4")(info, in_dims, *args)
        weight, dim = args[4], in_dims[4]
        weight = weight if dim is None else weight.movedim(dim, 0)
        total = (weight.double() * outputs[0]).sum(1).to(weight.dtype)
        return (total, *outputs), (0, *dims)

    return vmap
