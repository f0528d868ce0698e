"""Negatives made where they are used: the bits of the CPU sampler, and nothing but rows and segments to move.

Every element is a function of the key, the step, its row and its slot, so programs share nothing. A program takes a
tile of positions by draws; the words, their order and what is refused are those of reference/philox.py and
reference/negatives.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from metarec_fast.kernels import _common

_TILE = 512  # negatives of a program: larger tiles take over 200 registers a thread
_MAX_BLOCK_K = 256  # of them for one position
_NARROW = 1 << 31  # catalogues up to here take words of 32 bits, larger ones of 64
_MAX_ATTEMPTS = tl.constexpr(4096)  # the counter has 12 bits for them
_ALIAS_ATTEMPTS = tl.constexpr(16)  # draws from the alias table before the exact inverse


@triton.jit
def _any(x):
    return tl.max(x.to(tl.int32)) > 0


@triton.jit
def _unsigned(word):
    return word.to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _at_most(sorted_ptr, length, value, AS_RANKS: tl.constexpr):
    """How many of the first ``length`` are at most ``value``, each less its place if AS_RANKS: a search a lane."""
    below = tl.zeros_like(value)
    length = below + length.to(value.dtype)
    while tl.max(length) > 0:
        half = (length + 1) >> 1
        at = below + half - 1
        probe = tl.load(sorted_ptr + at, mask=length > 0, other=0)
        if AS_RANKS:
            probe -= at
        below = tl.where((length > 0) & (probe <= value), below + half, below)
        length -= half
    return below


@triton.jit
def _block(slot_block, row, step, last, key0, key1):
    """The four words of each counter."""
    return tl.philox_impl(slot_block.to(tl.uint32), row, step, last, key0, key1)


@triton.jit
def _pair(slot, row, step, last, key0, key1):
    """Two words a slot: two slots share a block."""
    w0, w1, w2, w3 = _block(slot >> 1, row, step, last, key0, key1)
    odd = (slot & 1) != 0
    return tl.where(odd, w2, w0), tl.where(odd, w3, w1)


@triton.jit
def _join(low, high):
    return high.to(tl.uint64) << 32 | low.to(tl.uint64)


@triton.jit
def _word(slot, row, step, last, key0, key1, WIDE: tl.constexpr):
    """64 bits a slot if WIDE, else 32: four slots share a block."""
    if WIDE:
        low, high = _pair(slot, row, step, last, key0, key1)
        return _join(low, high)
    else:
        w0, w1, w2, w3 = _block(slot >> 2, row, step, last, key0, key1)
        odd = (slot & 1) != 0
        return tl.where((slot & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))


@triton.jit
def _bounded(word, n, inside, slot, row, step, last, key0, key1, FIRST: tl.constexpr, WIDE: tl.constexpr):
    """Uniform in [0, n) from the words of attempt FIRST: multiply and shift, refused words drawn again."""
    value = tl.umulhi(word, n)
    refused = inside & (word * n < n)
    if _any(refused):
        threshold = (0 - n) % n
        refused = refused & (word * n < threshold)
        attempt = FIRST + 1
        while _any(refused) & (attempt < _MAX_ATTEMPTS):
            again = _word(slot, row, step, last | attempt.to(tl.uint32), key0, key1, WIDE)
            value = tl.where(refused, tl.umulhi(again, n), value)
            refused = refused & (again * n < threshold)
            attempt += 1
    return value


@triton.jit
def _places(segments_ptr, users_ptr, B, T, count, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile's positions [BLOCK_T] with row, user and first slot of each, and its first draw."""
    blocks = tl.cdiv(count, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    t = program // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    row = _at_most(segments_ptr + 1, B, t, False)
    user = tl.load(users_ptr + row, mask=t < T, other=0)
    slot = (t - tl.load(segments_ptr + row, mask=t < T, other=0)) * count
    return t, row, user, slot, program % blocks * BLOCK_K


@triton.jit(do_not_specialize=["B", "T", "count", "last_item", "first_row", "step", "last", "key0", "key1"])
def _uniform(
    segments_ptr, users_ptr,  # [B + 1], [B]
    seen_offsets_ptr, seen_counts_ptr, seen_ptr, shift_ptr,  # [U], [U], [E], [U]
    negatives_ptr, logq_ptr,  # [T, count] twice
    B, T, count, last_item, first_row, step, last, key0, key1,
    WIDE: tl.constexpr, SHARE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The r-th unseen item for a uniform r.

    SHARE: slots that a block of words serves, or 1 where rows may begin inside a block.
    """
    t, row, user, first_slot, first = _places(segments_ptr, users_ptr, B, T, count, BLOCK_T, BLOCK_K)
    k = first + tl.arange(0, BLOCK_K)
    inside = (t[:, None] < T) & (k[None, :] < count)
    slot = first_slot[:, None] + k[None, :]
    c1 = (row.to(tl.uint32) + _unsigned(first_row))[:, None]
    c2, c3, key0, key1 = _unsigned(step), _unsigned(last), _unsigned(key0), _unsigned(key1)
    seen_count = tl.load(seen_counts_ptr + user)

    if SHARE == 1:
        word = _word(slot, c1, c2, c3, key0, key1, WIDE)
    else:
        shared = first + tl.arange(0, BLOCK_K // SHARE) * SHARE
        w0, w1, w2, w3 = _block((first_slot[:, None] + shared[None, :]) // SHARE, c1, c2, c3, key0, key1)
        if WIDE:
            word = tl.interleave(_join(w0, w1), _join(w2, w3))
        else:
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    unseen = tl.maximum(last_item - seen_count + 1, 1).to(word.dtype)[:, None]
    rank = _bounded(word, unseen, inside, slot, c1, c2, c3, key0, key1, 0, WIDE)

    rank = rank.to(tl.int64 if WIDE else tl.int32)
    seen_ptr += tl.load(seen_offsets_ptr + user)[:, None]
    further = _at_most(seen_ptr, tl.where(inside, seen_count[:, None], 0), rank, True)
    at = t[:, None] * count + k[None, :]
    tl.store(negatives_ptr + at, (rank + further).to(tl.int64), mask=inside)
    logq = (-tl.load(shift_ptr + user)).to(tl.float32)[:, None]
    tl.store(logq_ptr + at, tl.broadcast_to(logq, BLOCK_T, BLOCK_K), mask=inside)


@triton.jit
def _from_cell(table_ptr, log_p_ptr, column, word, inside):
    """Item and log of probability of a cell: its own item below the threshold, else its alias."""
    at = column.to(tl.int64) * 4
    threshold = _unsigned(tl.load(table_ptr + at, mask=inside, other=0))
    other = word >= threshold
    alias = tl.load(table_ptr + at + 1, mask=inside & other, other=0)
    log_p = tl.load(log_p_ptr + at + 2 + other.to(tl.int64), mask=inside, other=0.0)
    return tl.where(other, alias, column.to(tl.int32)), log_p


@triton.jit
def _contains(seen_ptr, count, item, inside):
    below = _at_most(seen_ptr, tl.where(inside, count, 0), item, False)
    return tl.load(seen_ptr + below - 1, mask=inside & (below > 0), other=-1) == item


@triton.jit(do_not_specialize=["B", "T", "count", "last_item", "first_row", "step", "last", "key0", "key1"])
def _popular(
    segments_ptr, users_ptr,  # [B + 1], [B]
    seen_offsets_ptr, seen_counts_ptr, seen_ptr, shift_ptr, weight_ptr,  # [U], [U], [E], [U], [U]
    table_ptr, log_p_ptr, cumulative_ptr,  # [V, 4] twice, [V + 1]
    negatives_ptr, logq_ptr,  # [T, count] twice
    B, T, count, last_item, first_row, step, last, key0, key1,
    SHARE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Items of the alias table until one is unseen; after the last attempt, by the cumulative weights of the unseen."""
    t, row, user, first_slot, first = _places(segments_ptr, users_ptr, B, T, count, BLOCK_T, BLOCK_K)
    k = first + tl.arange(0, BLOCK_K)
    inside = (t[:, None] < T) & (k[None, :] < count)
    slot = first_slot[:, None] + k[None, :]
    c1 = (row.to(tl.uint32) + _unsigned(first_row))[:, None]
    c2, c3, key0, key1 = _unsigned(step), _unsigned(last), _unsigned(key0), _unsigned(key1)
    seen_count = tl.load(seen_counts_ptr + user)[:, None]
    seen_ptr += tl.load(seen_offsets_ptr + user)[:, None]
    items = _unsigned(last_item) + 1
    threshold = (0 - items) % items

    if SHARE == 1:
        column_word, cell_word = _pair(slot, c1, c2, c3, key0, key1)
    else:
        shared = first + tl.arange(0, BLOCK_K // SHARE) * SHARE
        w0, w1, w2, w3 = _block((first_slot[:, None] + shared[None, :]) // SHARE, c1, c2, c3, key0, key1)
        column_word, cell_word = tl.interleave(w0, w2), tl.interleave(w1, w3)
    item, log_p = _from_cell(table_ptr, log_p_ptr, tl.umulhi(column_word, items), cell_word, inside)
    undecided = inside & ((column_word * items < threshold) | _contains(seen_ptr, seen_count, item, inside))
    attempt = 1
    while _any(undecided) & (attempt < _ALIAS_ATTEMPTS):
        column_word, cell_word = _pair(slot, c1, c2, c3 | attempt.to(tl.uint32), key0, key1)
        again, again_log_p = _from_cell(table_ptr, log_p_ptr, tl.umulhi(column_word, items), cell_word, undecided)
        accepted = undecided & (column_word * items >= threshold)
        accepted = accepted & (_contains(seen_ptr, seen_count, again, undecided) == 0)
        item, log_p = tl.where(accepted, again, item), tl.where(accepted, again_log_p, log_p)
        undecided = undecided & (accepted == 0)
        attempt += 1

    if _any(undecided):
        word = _word(slot, c1, c2, c3 | _ALIAS_ATTEMPTS, key0, key1, True)
        unseen = tl.maximum(tl.load(weight_ptr + user), 1).to(tl.uint64)[:, None]
        mass = _bounded(word, unseen, undecided, slot, c1, c2, c3, key0, key1, _ALIAS_ATTEMPTS, True).to(tl.int64)
        j = tl.zeros_like(seen_count)
        walking = undecided & (j < seen_count)
        while _any(walking):  # past the weight of each seen item that lies before
            passed = tl.load(seen_ptr + j + tl.zeros_like(slot), mask=walking, other=0)
            before = tl.load(cumulative_ptr + passed, mask=walking, other=0)
            walking = walking & (before <= mass)
            mass += tl.load(cumulative_ptr + passed + 1, mask=walking, other=0) - tl.where(walking, before, 0)
            j += 1
            walking = walking & (j < seen_count)
        found = _at_most(cumulative_ptr + 1, tl.where(undecided, last_item, 0), mass, False)
        item = tl.where(undecided, found.to(tl.int32), item)
        log_p = tl.where(undecided, tl.load(log_p_ptr + found * 4 + 2, mask=undecided, other=0.0), log_p)

    at = t[:, None] * count + k[None, :]
    tl.store(negatives_ptr + at, item.to(tl.int64), mask=inside)
    logq = log_p.to(tl.float64) - tl.load(shift_ptr + user)[:, None]
    tl.store(logq_ptr + at, logq.to(tl.float32), mask=inside)


class Words(NamedTuple):
    """What is common to the counters of a call, each of 32 bits: step's low half, the last word without its attempt,
    and the key."""

    step: int
    last: int
    key0: int
    key1: int


class Popularity(NamedTuple):
    """An alias table on the device: table and log_p are the same cells [V, 4] as int32 and as float32."""

    table: Tensor
    log_p: Tensor
    cumulative: Tensor  # int64 [V + 1]
    unseen_weights: Tensor  # int64 [U], of what the user has not seen


def _int32(word: int) -> int:
    """The same 32 bits as a signed number: arguments of one type, whatever their value."""
    return word - (1 << 32) if word >> 31 else word


def sample_negatives(
    users_B: Tensor,
    segments: Tensor,
    seen_offsets: Tensor,
    seen_counts: Tensor,
    seen_items: Tensor,
    shift: Tensor,
    *,
    positions: int,
    count: int,
    num_items: int,
    first_row: int,
    words: Words,
    popularity: Popularity | None = None,
) -> tuple[Tensor, Tensor]:
    """Negatives int64 and logq float32, [positions, count], for what was checked: rows, segments, no user without any.

    users_B: int64, rows of the seen items. segments: int64 [B+1]. seen_offsets, seen_counts: int64, at least [U].
    seen_items: [E], int64 if num_items > 2**31, else int32; distinct and rising in a row.
    shift: float64 [U]: what is subtracted from the item's log probability, which is 0 for uniform.
    """
    wide = num_items > _NARROW
    negatives = _common.empty((positions, count), dtype=torch.int64, device=users_B.device)
    logq = _common.empty((positions, count), dtype=torch.float32, device=users_B.device)
    if negatives.numel() == 0:
        return negatives, logq
    per_block = 2 if wide or popularity is not None else 4
    share = per_block if count % per_block == 0 else 1
    BLOCK_K = _common.block_d(count, least=per_block, most=_MAX_BLOCK_K)
    BLOCK_T = _TILE // BLOCK_K
    grid = (_common.cdiv(positions, BLOCK_T) * _common.cdiv(count, BLOCK_K),)
    numbers = len(users_B), positions, count, num_items - 1, *map(_int32, (first_row, *words))
    seen = segments, users_B, seen_offsets, seen_counts, seen_items, shift
    tile = {"SHARE": share, "BLOCK_T": BLOCK_T, "BLOCK_K": BLOCK_K, "num_warps": 4, "enable_fp_fusion": True}
    if popularity is None:
        _uniform[grid](*seen, negatives, logq, *numbers, WIDE=wide, **tile)
    else:
        table, log_p, cumulative, weights = popularity
        _popular[grid](*seen, weights, table, log_p, cumulative, negatives, logq, *numbers, **tile)
    return negatives, logq
