"""External ids -> indices by first appearance, piece by piece."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metarec_fast.data.strings import BLOCK, PackedStrings
from metarec_fast.data.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl

DECIMAL = r"^(?:0|-?[1-9][0-9]*)$"
MOST = 2**31 - 1  # ids of one vocabulary


class Numbering:
    """Numbers ids 0, 1, ... as they first appear, over any number of pieces.

    Integers stay integers while int64 or uint64 holds all of them; otherwise they become their decimal strings. So do
    they when a string comes that is no integer.

    Memory: 24 to 48 bytes an id for the look-up (while it grows, half as much again), and the ids: 8 bytes, or
    16 and the text's.
    """

    def __init__(self) -> None:
        self._kind: pl.DataType | None = None  # Int64, UInt64 or String
        self._integers: list[np.ndarray] = []
        self._strings: pl.Series | None = None
        self._seed = 0
        self._slots = _Slots()

    def __len__(self) -> int:
        return self._slots.count

    def add(self, ids: pl.Series, *, text: bool) -> np.ndarray:
        """Indices of ids: int32 [n]. text: strings that are canonical decimals may stand for integers.

        Raises ValueError for more than 2**31 - 1 distinct ids.
        """
        import polars as pl

        if not len(ids):
            return np.empty(0, np.int32)
        if text and ids.dtype == pl.String and self._kind != pl.String:
            ids = _as_integers(ids)
        kind = ids.dtype if self._kind is None else self._common(ids)
        if kind == pl.String and self._kind is not None and self._kind != pl.String:
            self._strings = pl.Series(np.concatenate(self._integers)).cast(pl.String)
            self._integers = []
            self._rehash()
        elif kind == pl.UInt64 and self._kind == pl.Int64:
            self._integers = [known.astype(np.uint64) for known in self._integers]
        self._kind = kind
        ids = ids.cast(kind)
        return self._add_strings(ids) if kind == pl.String else self._add_integers(ids.to_numpy())

    def vocabulary(self) -> Vocabulary:
        """The ids so far."""
        if self._integers:
            return Vocabulary.of_distinct(_narrowed(np.concatenate(self._integers)))
        if self._strings is None:
            return Vocabulary()
        blocks = (self._strings.slice(first, BLOCK).to_list() for first in range(0, len(self), BLOCK))
        return Vocabulary.of_distinct(PackedStrings.of(blocks))

    def _common(self, ids: pl.Series) -> pl.DataType:
        """The type that holds the ids known and these."""
        import polars as pl

        if ids.dtype == self._kind:
            return self._kind
        if pl.String in (ids.dtype, self._kind):
            return pl.String
        signed = ids.min() if ids.dtype == pl.Int64 else min(int(known.min()) for known in self._integers)
        return pl.UInt64 if signed >= 0 else pl.String

    def _add_integers(self, ids: np.ndarray) -> np.ndarray:
        keys = ids.view(np.uint64)
        index, new, first = self._look_up(keys)
        if len(new):
            self._slots.add(new)
            self._integers.append(ids[first])
        return index

    def _add_strings(self, ids: pl.Series) -> np.ndarray:
        import polars as pl

        while True:
            index, new, first = self._look_up(_hashes(ids, self._seed))
            known = self._strings
            if len(new):
                # By way of Python, so that the piece's text is not kept alive.
                fresh = pl.Series(ids.gather(first).to_list(), dtype=pl.String)
                known = fresh if known is None else pl.concat([known, fresh], rechunk=known.n_chunks() > 8)
            if (known.gather(index) == ids).all():
                break
            self._seed += 1  # two strings share a hash
            self._rehash()
        if len(new):
            self._slots.add(new)
            self._strings = known
        return index

    def _look_up(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index of each key, keys that are new in the order of their indices, where each of those first is)."""
        index = self._slots.find(keys)
        rows = np.flatnonzero(index < 0)
        if not len(rows):
            return index, keys[:0], rows
        distinct, first, inverse = np.unique(keys[rows], return_index=True, return_inverse=True)
        if len(self) + len(distinct) > MOST:
            raise ValueError(f"more than {MOST:,} distinct ids in one column")
        order = np.argsort(first)
        number = np.empty(len(order), np.int32)
        number[order] = np.arange(len(self), len(self) + len(order))
        index[rows] = number[inverse]
        return index, distinct[order], rows[first[order]]

    def _rehash(self) -> None:
        """Look the known strings up by hashes of the first seed from here on that tells them apart."""
        self._slots = _Slots()
        if self._strings is None:
            return
        while True:
            keys = _hashes(self._strings, self._seed)
            if len(np.unique(keys)) == len(keys):
                break
            self._seed += 1
        self._slots.add(keys)


def _hashes(strings: pl.Series, seed: int) -> np.ndarray:
    return strings.hash(seed=seed).to_numpy()


def _as_integers(text: pl.Series) -> pl.Series:
    """The integers, if every text is the canonical decimal of one and one type holds them; else the texts."""
    import polars as pl

    if text.str.contains(DECIMAL).all():
        for kind in (pl.Int64, pl.UInt64):
            integers = text.cast(kind, strict=False)
            if not integers.null_count():
                return integers
    return text


def _narrowed(integers: np.ndarray) -> np.ndarray:
    """int64 where it holds all of them."""
    return integers if integers.max() > np.iinfo(np.int64).max else integers.astype(np.int64, copy=False)


class _Slots:
    """An open hash table of distinct uint64 keys, numbered as they were added; looks many up at once."""

    def __init__(self) -> None:
        self.count = 0
        self._allocate(16)

    def _allocate(self, bits: int) -> None:
        self._bits = bits
        self._keys = np.zeros(1 << bits, np.uint64)
        self._index = np.full(1 << bits, -1, np.int32)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys >> np.uint64(32)
        mixed ^= keys
        mixed *= np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: neighbours land far apart
        mixed >>= np.uint64(64 - self._bits)
        return mixed.view(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Index of each key, -1 where it is unknown: int32 [n]."""
        slot = self._home(keys)
        index = self._index[slot]
        others = np.flatnonzero((self._keys[slot] != keys) & (index >= 0))
        while len(others):
            slot[others] = (slot[others] + 1) & (len(self._index) - 1)
            at = slot[others]
            index[others] = self._index[at]
            others = others[(self._keys[at] != keys[others]) & (index[others] >= 0)]
        return index

    def add(self, keys: np.ndarray) -> None:
        """keys: distinct and unknown."""
        bits = self._bits
        while 2 * (self.count + len(keys)) > 1 << bits:
            bits += 1
        numbers = np.arange(self.count, self.count + len(keys), dtype=np.int32)
        if bits > self._bits:
            used = self._index >= 0
            old = self._keys[used], self._index[used]
            self._allocate(bits)
            self._place(*old)
        self._place(keys, numbers)
        self.count += len(keys)

    def _place(self, keys: np.ndarray, numbers: np.ndarray) -> None:
        slot = self._home(keys)
        while len(keys):
            free = self._index[slot] < 0
            self._index[slot[free]] = numbers[free]
            won = self._index[slot] == numbers  # where several keys met at a free slot, one of them
            self._keys[slot[won]] = keys[won]
            keys, numbers, slot = keys[~won], numbers[~won], slot[~won] + 1
            slot &= len(self._index) - 1
