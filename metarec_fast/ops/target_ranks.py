"""target_ranks: where targets rank among all items of a table, by counts, without a [B, V] tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast import _C
from metarec_fast.ops.arrays import span
from metarec_fast.ops.register import Backend, check_tensor, choose_backend, define, empty
from metarec_fast.reference.target_ranks import linear_target_ranks

_REFERENCE_SCORES = 1 << 26  # that exist at a time where no kernel runs


class TargetRanks(NamedTuple):
    """int64 [B] each: candidates that score above the target, candidates that score the same, scores not finite."""

    greater: Tensor
    equal: Tensor
    nonfinite: Tensor


def _cpu(
    h: Tensor,
    table: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seen_offsets: Tensor | None,
    seen_items: Tensor | None,
    added_offsets: Tensor | None,
    added_items: Tensor | None,
    added_terms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (h, table, bias, targets, seen_offsets, seen_items, added_offsets, added_items, added_terms)
    inputs = [x if x is None else x.contiguous() for x in given]
    (B, D), V = h.shape, table.shape[0]
    counts = [empty((B,), dtype=torch.int64, device=h.device) for _ in range(3)]
    _C.target_ranks(
        *map(span, (*inputs, *counts)),
        B=B,
        V=V,
        D=D,
    )
    return tuple(counts)


def _cuda(
    h: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, *lists: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if h.dtype == torch.float64:
        return _reference(h, table, bias, targets, *lists)
    from metarec_fast.kernels.target_ranks import target_ranks

    _check_items(len(table), targets, *lists)
    given = (h, table, bias, targets, *lists)
    return target_ranks(*(x if x is None else x.contiguous() for x in given))


def _reference(
    h: Tensor, table: Tensor, bias: Tensor | None, targets: Tensor, *lists: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_items(len(table), targets, *lists)
    parts = []
    step = max(1, _REFERENCE_SCORES // max(1, len(table)))
    for begin in range(0, max(1, len(h)), step):
        rows = slice(begin, begin + step)
        seen, added = (None if x[0] is None else _of_cases(rows, *x) for x in (lists[:2], lists[2:]))
        parts.append(linear_target_ranks(h[rows], table, targets[rows], bias=bias, seen=seen, added=added))
    return tuple(torch.cat(counts) for counts in zip(*parts, strict=True))


def _of_cases(rows: slice, offsets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The part of a CSR that belongs to these cases."""
    offsets = offsets[rows.start : rows.stop + 1]
    mine = slice(int(offsets[0]), int(offsets[-1]))
    return offsets - offsets[0], *(x[mine] for x in values)


_op = define(
    "target_ranks(Tensor h, Tensor table, Tensor? bias, Tensor targets, Tensor? seen_offsets, Tensor? seen_items, "
    "Tensor? added_offsets, Tensor? added_items, Tensor? added_terms) -> (Tensor greater, Tensor equal, "
    "Tensor nonfinite)",
    cpu=_cpu,
    cuda=_cuda,
    fake=lambda h, *_: tuple(h.new_empty(h.shape[0], dtype=torch.int64) for _ in range(3)),
)


def target_ranks(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
    added: tuple[Tensor, Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> TargetRanks:
    """How many candidates of each case score above its target, and how many the same; score = h . item + bias + term.

    h: [B, D] float32 or float64 states. table: [V, D] items, dtype of h. targets: [B] int64, items of the table.
    bias: [V], dtype of h. seen: CSR (offsets [B+1] int64, items int32 or int64) of items that are no candidates, in any
    order and with repeats; the target stays in, seen or not. added: CSR (offsets, items, terms in the dtype of h) of
    terms that belong to few items; items rise within a case.
    backend: "auto", "reference", "cpu" or "triton" (float32).

    A score is summed in float32 or float64 in one order, whatever the other arguments: an item with the target's own
    row ties with it, and the counts do not depend on threads, tiles or the other cases. Between instruction sets and
    devices the last bit of a score may differ. Memory beyond the inputs: of the order of B, and V / 64 words a thread.

    Returns greater, equal (without the target) and nonfinite, int64 [B]. Where nonfinite is not 0, a score is NaN or
    infinite, of a candidate or not, and the other two mean nothing. Not differentiable.
    Raises TypeError or ValueError for arguments of another dtype, shape or device and for items outside the table.
    """
    check_tensor(h, "h", dtypes=(torch.float32, torch.float64), dims=2)
    check_tensor(table, "table", dtypes=(h.dtype,), dims=2, device=h.device)
    check_tensor(targets, "targets", dtypes=(torch.int64,), dims=1, device=h.device)
    B, V = h.shape[0], table.shape[0]
    _check_shape("table", table, (V, h.shape[1]))
    _check_shape("targets", targets, (B,))
    if bias is not None:
        check_tensor(bias, "bias", dtypes=(h.dtype,), dims=1, device=h.device)
        _check_shape("bias", bias, (V,))
    for name, lists in (("seen", seen), ("added", added)):
        if lists is None:
            continue
        if not isinstance(lists, tuple) or len(lists) != (2 if name == "seen" else 3):
            expected = "(offsets, items)" if name == "seen" else "(offsets, items, terms)"
            raise TypeError(f"{name} must be {expected}, got {type(lists).__name__}")
        check_tensor(lists[0], f"{name} offsets", dtypes=(torch.int64,), dims=1, device=h.device)
        check_tensor(lists[1], f"{name} items", dtypes=(torch.int64, torch.int32), dims=1, device=h.device)
        _check_shape(f"{name} offsets", lists[0], (B + 1,))
    if added is not None:
        check_tensor(added[2], "added terms", dtypes=(h.dtype,), dims=1, device=h.device)
        _check_shape("added terms", added[2], (len(added[1]),))
    chosen = choose_backend(backend, h.device, operator="target_ranks", triton=h.dtype == torch.float32)
    h, table, bias = (x if x is None else x.detach() for x in (h, table, bias))
    seen_offsets, seen_items = (None, None) if seen is None else (seen[0], seen[1].long())
    offsets, items, terms = (None, None, None) if added is None else (added[0], added[1].long(), added[2].detach())
    run = _reference if chosen == "reference" else _op
    return TargetRanks(*run(h, table, bias, targets, seen_offsets, seen_items, offsets, items, terms))


def _check_items(
    V: int,
    targets: Tensor,
    seen_offsets: Tensor | None,
    seen_items: Tensor | None,
    added_offsets: Tensor | None,
    added_items: Tensor | None,
    _: Tensor | None,
) -> None:
    """What the C++ checks itself: items are addresses."""
    for name, offsets, items in (("seen", seen_offsets, seen_items), ("added", added_offsets, added_items)):
        if offsets is not None and (offsets[0] != 0 or offsets[-1] != len(items) or (offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to the number of rows ({len(items)})")
        if offsets is not None and name == "added":
            cases = torch.arange(len(offsets) - 1, device=items.device).repeat_interleave(offsets.diff())
            if ((items.diff() <= 0) & (cases.diff() == 0)).any():
                raise ValueError("added items must rise within each case")
    for name, items in (("targets", targets), ("seen items", seen_items), ("added items", added_items)):
        if items is not None and ((items < 0) | (items >= V)).any():
            raise ValueError(
                f"{name} must lie in [0, {V}), the rows of table, got {int(items.min())} to {int(items.max())}"
            )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
