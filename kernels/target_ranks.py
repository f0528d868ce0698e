"""target_ranks on a GPU: scores are compared where the product leaves them and only counts reach memory.

Every score is a chain of float32 multiply-adds that starts from the bias and goes through D in its order: products by
tl.dot with input_precision="ieee" run on the multiply-add units, one chain an element, whatever the shape of the tile.
So a target's score computed by itself is, bit for bit, the score that its tile holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_BLOCK_PAIRS = 16
_BLOCK_B, _BLOCK_V = 64, 64
_TILES = 256  # of a program: its counts of 10 bits hold up to 1023
_FIELD = tl.constexpr(10)


@triton.jit
def _multiply(h, table, bias, rows, items, inside, D, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scores of rows [M] x items [N], pointers to their first elements; items that are not inside score their bias."""
    scores = tl.zeros([rows.shape[0], items.shape[0]], tl.float32)
    if HAS_BIAS:
        scores += tl.load(bias + items, mask=inside, other=0.0)[None, :]
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(h + rows[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        y = tl.load(table + items[None, :] * D + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(x, y, scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["P"])
def _pair_scores(
    h_ptr, table_ptr, bias_ptr, cases_ptr, items_ptr,  # [B, D], [V, D], [V], [P] twice
    scores_ptr,  # [P]
    P, D,
    HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The diagonal of a tile that has one row and one column for each pair."""
    lane = tl.arange(0, BLOCK_P)
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + lane
    cases = tl.load(cases_ptr + p, mask=p < P, other=0)
    items = tl.load(items_ptr + p, mask=p < P, other=0)
    scores = _multiply(h_ptr, table_ptr, bias_ptr, cases, items, p < P, D, HAS_BIAS, BLOCK_D)
    diagonal = tl.sum(tl.where(lane[:, None] == lane[None, :], scores, 0.0), 1)
    tl.store(scores_ptr + p, diagonal, mask=p < P)


@triton.jit(do_not_specialize=["B", "V", "tiles"])
def _count(
    h_ptr, table_ptr, bias_ptr, own_ptr,  # [B, D], [V, D], [V], [B]
    greater_ptr, equal_ptr, nonfinite_ptr,  # [B] int64, added to
    B, V, D, tiles,
    HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, FIELD: tl.constexpr,
):  # fmt: skip
    """Counts of BLOCK_B rows over some tiles of items. An element keeps its three counts in the fields of a word."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = tl.minimum(b, B - 1)
    own = tl.load(own_ptr + rows)[:, None]
    first = tl.program_id(1).to(tl.int64) * tiles * BLOCK_V
    counts = tl.zeros([BLOCK_B, BLOCK_V], tl.int32)
    for tile in range(tiles):
        v = first + tile * BLOCK_V + tl.arange(0, BLOCK_V)
        scores = _multiply(h_ptr, table_ptr, bias_ptr, rows, v, v < V, D, HAS_BIAS, BLOCK_D)
        word = (scores > own).to(tl.int32) + ((scores == own).to(tl.int32) << FIELD)
        word += ((tl.abs(scores) < float("inf")) == 0).to(tl.int32) << (2 * FIELD)
        counts += tl.where((v < V)[None, :], word, 0)
    last: tl.constexpr = (1 << FIELD) - 1
    tl.atomic_add(greater_ptr + b, tl.sum(counts & last, 1).to(tl.int64), mask=b < B)
    tl.atomic_add(equal_ptr + b, tl.sum((counts >> FIELD) & last, 1).to(tl.int64), mask=b < B)
    tl.atomic_add(nonfinite_ptr + b, tl.sum(counts >> (2 * FIELD), 1).to(tl.int64), mask=b < B)


def pair_scores(h: Tensor, table: Tensor, bias: Tensor | None, cases: Tensor, items: Tensor) -> Tensor:
    """[P] float32: score of case cases[p] and item items[p], int64, as `target_ranks` computes it."""
    P, D = len(cases), h.shape[1]
    scores = _common.empty((P,), dtype=torch.float32, device=h.device)
    if P:
        _pair_scores[(_common.cdiv(P, _BLOCK_PAIRS),)](
            h, table, table if bias is None else bias, cases, items, scores, P, D,
            HAS_BIAS=bias is not None, BLOCK_P=_BLOCK_PAIRS, BLOCK_D=16,
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return scores


def target_ranks(
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
    """Contiguous float32 and int64 tensors as `ops.target_ranks` takes them -> greater, equal, nonfinite, int64 [B].

    Items must lie in the table; those of added rise within a case.
    """
    (B, D), V = h.shape, table.shape[0]
    _common.check_shapes(table=(table, (V, D)), targets=(targets, (B,)), bias=(bias, (V,)))
    _common.check_shapes(seen_offsets=(seen_offsets, (B + 1,)), added_offsets=(added_offsets, (B + 1,)))
    if added_offsets is not None:
        _common.check_shapes(added_terms=(added_terms, added_items.shape))
    greater, equal, nonfinite = torch.zeros(3, B, dtype=torch.int64, device=h.device)
    if B == 0:
        return greater, equal, nonfinite
    rows = torch.arange(B, device=h.device)
    base = pair_scores(h, table, bias, rows, targets)
    own, left_out = base, rows * V + targets
    of_targets = left_out
    if added_offsets is not None:
        added = _keys(added_offsets, added_items, rows, V)
        if len(added):
            at = torch.searchsorted(added, left_out).clamp_max(len(added) - 1)
            own = torch.where(added[at] == left_out, base + added_terms[at], base)

    tiles = min(_TILES, _common.cdiv(V, _BLOCK_V))
    _count[(_common.cdiv(B, _BLOCK_B), _common.cdiv(V, tiles * _BLOCK_V))](
        h, table, table if bias is None else bias, own, greater, equal, nonfinite, B, V, D, tiles,
        HAS_BIAS=bias is not None, BLOCK_B=_BLOCK_B, BLOCK_V=_BLOCK_V, BLOCK_D=16, FIELD=_FIELD.value,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip

    nonfinite += (~own.isfinite()).long() - (~base.isfinite()).long()
    if seen_offsets is not None:
        left_out = torch.cat((left_out, _keys(seen_offsets, seen_items, rows, V))).unique()
    scores = pair_scores(h, table, bias, left_out // V, left_out % V)
    _add(greater, equal, left_out // V, scores, own, -1)
    if added_offsets is not None:
        others = ~torch.isin(added, of_targets)
        added, terms = added[others], added_terms[others]
        cases = added // V
        scores = pair_scores(h, table, bias, cases, added % V)
        nonfinite.index_add_(0, cases, (~(scores + terms).isfinite()).long() - (~scores.isfinite()).long())
        fresh = ~torch.isin(added, left_out)
        cases, scores, terms = cases[fresh], scores[fresh], terms[fresh]
        _add(greater, equal, cases, scores, own, -1)
        _add(greater, equal, cases, scores + terms, own, 1)
    return greater, equal, nonfinite


def _keys(offsets: Tensor, items: Tensor, rows: Tensor, V: int) -> Tensor:
    """One integer for each case and item of a CSR."""
    return rows.repeat_interleave(offsets.diff(), output_size=len(items)) * V + items


def _add(greater: Tensor, equal: Tensor, cases: Tensor, scores: Tensor, own: Tensor, sign: int) -> None:
    greater.index_add_(0, cases, (scores > own[cases]).long(), alpha=sign)
    equal.index_add_(0, cases, (scores == own[cases]).long(), alpha=sign)
