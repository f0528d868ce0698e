"""External ids and the dense indices that stand for them."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from metarec_fast.data.strings import BLOCK, PackedStrings

INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)
UINT64_MAX = 2**64 - 1


class Vocabulary:
    """External ids in order; index i stands for the i-th of them.

    The ids are all integers or all strings, and 7 is not "7". Integers are held as int64, or as uint64 where one
    needs it; integers that fit neither are held as their decimal strings. Strings are verbatim: no blank is stripped
    and no Unicode form changed.

    ids: distinct strings, or distinct integers (a NumPy integer array is taken as it is). Raises TypeError for ids of
    another kind, ValueError for a repeated id.
    """

    def __init__(self, ids: Iterable[str] | Iterable[int] | np.ndarray = ()):
        self._hold(_normalised(ids))
        self._check_distinct()

    @classmethod
    def of_distinct(cls, ids: np.ndarray | list[str] | PackedStrings) -> Vocabulary:
        """A vocabulary that holds ``ids`` as they are; that they are distinct is checked by the first look-up.

        ids: int64 or uint64 [n], or strings. PackedStrings may be memory-mapped: they are decoded one by one as they
        are asked for, and only a look-up by id reads them all.
        """
        vocabulary = cls.__new__(cls)
        vocabulary._hold(ids)
        return vocabulary

    def _hold(self, ids: np.ndarray | list[str] | PackedStrings) -> None:
        self._ids = ids
        self._order: np.ndarray | None = None  # integer ids: argsort, for look-up by bisection
        self._index: dict[str, int] | None = None  # string ids

    def _check_distinct(self) -> None:
        """Raise ValueError for a repeated id; leaves behind what look-ups need."""
        if self.is_integer and self._order is None:
            order = np.argsort(self._ids, kind="stable")
            ordered = self._ids[order]
            repeated = ordered[:-1][ordered[1:] == ordered[:-1]]
            if len(repeated):
                raise ValueError(f"ids must be distinct, got {repeated[0]} more than once")
            self._order = order
        elif not self.is_integer and self._index is None:
            index = {value: i for i, value in enumerate(self._ids)}
            if len(index) != len(self._ids):
                repeated = next(value for i, value in enumerate(self._ids) if index[value] != i)
                raise ValueError(f"ids must be distinct, got {repeated!r} more than once")
            self._index = index

    @property
    def is_integer(self) -> bool:
        return isinstance(self._ids, np.ndarray)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str] | Iterator[int]:
        return iter(self._ids.tolist() if self.is_integer else self._ids)

    def __contains__(self, value: object) -> bool:
        try:
            self.encode([value])
        except (TypeError, ValueError):
            return False
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        if self.is_integer != other.is_integer or len(self) != len(other):
            return False
        if self.is_integer:
            return self._ids.tolist() == other._ids.tolist()
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None

    def __repr__(self) -> str:
        kind = self._ids.dtype if self.is_integer else "string"
        return f"Vocabulary({len(self):,} {kind} ids)"

    def encode(self, ids: Iterable[str] | Iterable[int] | np.ndarray) -> np.ndarray:
        """Indices of ids: int64 [n]. Raises ValueError naming the first id that is unknown."""
        if isinstance(ids, (str, bytes)):
            raise TypeError(f"ids must be a sequence of ids, got the single {type(ids).__name__} {ids!r}")
        self._check_distinct()
        if self.is_integer:
            return self._encode_integers(ids)
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        try:
            return np.fromiter((self._index[value] for value in values), np.int64, len(values))
        except (KeyError, TypeError):  # TypeError: a value that cannot be hashed
            unknown = next(v for v in values if not isinstance(v, str) or v not in self._index)
            raise self.unknown(unknown) from None

    def _encode_integers(self, ids) -> np.ndarray:
        if not (isinstance(ids, np.ndarray) and ids.dtype.kind in "iu"):
            values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
            bounds = np.iinfo(self._ids.dtype)
            for value in values:
                if not _is_int(value) or not bounds.min <= operator.index(value) <= bounds.max:
                    raise self.unknown(value)
            ids = np.array([operator.index(v) for v in values], self._ids.dtype)
        # NumPy promotes int64 with uint64 to float64, which would merge ids; same-kind arrays do not meet that.
        elif ids.dtype.kind != self._ids.dtype.kind:
            bounds = np.iinfo(self._ids.dtype)
            outside = ids < 0 if ids.dtype.kind == "i" else ids > np.uint64(bounds.max)
            if outside.any():
                raise self.unknown(ids[outside][0].item())
        wanted = ids.reshape(-1).astype(self._ids.dtype)
        if not len(wanted):
            return np.empty(0, np.int64)
        if not len(self):
            raise self.unknown(wanted[0].item())
        ordered = self._ids[self._order]
        place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
        wrong = ordered[place] != wanted
        if wrong.any():
            raise self.unknown(wanted[wrong][0].item())
        return self._order[place].astype(np.int64)

    def find(self, ids: Iterable[Any]) -> np.ndarray:
        """Indices of ids, -1 for whatever is none: int64 [n]."""
        values = list(ids)
        self._check_distinct()
        if not self.is_integer:
            held = self._index
            return np.fromiter((held.get(v, -1) if isinstance(v, str) else -1 for v in values), np.int64, len(values))
        bounds = np.iinfo(self._ids.dtype)
        usable = [i for i, v in enumerate(values) if _is_int(v) and bounds.min <= operator.index(v) <= bounds.max]
        found = np.full(len(values), -1, np.int64)
        if usable and len(self):
            wanted = np.array([operator.index(values[i]) for i in usable], self._ids.dtype)
            place = np.searchsorted(self._ids, wanted, sorter=self._order)
            place = self._order[np.minimum(place, len(self) - 1)]
            found[usable] = np.where(self._ids[place] == wanted, place, -1)
        return found

    def parse(self, texts: Iterable[str]) -> list[str] | list[int]:
        """Ids as a command line gives them: integers if the ids here are integers. Looks nothing up.

        Raises ValueError naming the first text that is no integer where the ids are.
        """
        texts = list(texts)
        if not self.is_integer:
            return texts
        for text in texts:
            if re.fullmatch(r"[+-]?[0-9]+", text) is None:
                raise ValueError(f"ids here are integers, got {text!r}")
        return [int(text) for text in texts]

    def unknown(self, value: object) -> ValueError:
        """What to raise for an id that is none of these."""
        held = "integers" if self.is_integer else "strings"
        kind = _is_int(value) if self.is_integer else isinstance(value, str)
        hint = "" if kind or not len(self) else f" (ids here are {held}, got {type(value).__name__})"
        return ValueError(f"unknown id {value!r}{hint}")

    def decode(self, indices: Iterable[int] | np.ndarray) -> list[str] | list[int]:
        """Ids of indices. Raises IndexError for an index outside [0, len)."""
        indices = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices)).reshape(-1)
        if indices.size and indices.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        wrong = (indices < 0) | (indices >= len(self))
        if wrong.any():
            raise IndexError(f"indices must be in [0, {len(self)}), got {indices[wrong][0]}")
        if self.is_integer:
            return self._ids[indices.astype(np.int64)].tolist()
        return [self._ids[i] for i in indices.tolist()]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The ids as arrays, for safetensors or npz.

        Integers: {"integers": int64 or uint64 [n]}. Strings: {"utf8": uint8 [bytes], "offsets": int64 [n + 1]}.
        """
        if self.is_integer:
            return {"integers": self._ids.copy()}
        packed = self._ids
        if not isinstance(packed, PackedStrings):
            packed = PackedStrings.of(packed[first : first + BLOCK] for first in range(0, len(packed), BLOCK))
        return {"utf8": packed.utf8, "offsets": packed.offsets}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], *, distinct: bool = False) -> Vocabulary:
        """The inverse of `to_arrays`. Raises ValueError for arrays that `to_arrays` cannot have written.

        distinct: take it from the caller that the ids are distinct strings or integers; the arrays are then held as
        they are, also memory-mapped, and not read through.
        """
        if set(arrays) == {"integers"}:
            integers = np.asanyarray(arrays["integers"])
            if integers.dtype not in (np.int64, np.uint64) or integers.ndim != 1:
                raise ValueError(f"integers must be int64 or uint64 [n], got {integers.dtype} {integers.shape}")
            return cls.of_distinct(integers) if distinct else cls(integers)
        if set(arrays) != {"utf8", "offsets"}:
            raise ValueError(f"arrays must be integers, or utf8 and offsets, got {sorted(arrays)}")
        utf8, offsets = np.asanyarray(arrays["utf8"]), np.asanyarray(arrays["offsets"])
        if utf8.dtype != np.uint8 or offsets.dtype != np.int64 or utf8.ndim != 1 or offsets.ndim != 1:
            raise ValueError(f"utf8 must be uint8 [bytes] and offsets int64 [n + 1], got {utf8.dtype}, {offsets.dtype}")
        rising = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == len(utf8) and (np.diff(offsets) >= 0).all()
        if not rising:
            raise ValueError(f"offsets must rise from 0 to the {len(utf8)} bytes of utf8")
        strings = PackedStrings(utf8, offsets)
        if distinct:
            return cls.of_distinct(strings)
        try:
            return cls(list(strings))
        except UnicodeDecodeError as error:
            raise ValueError(f"utf8 holds bytes that are not UTF-8: {error}") from None


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def _normalised(ids) -> np.ndarray | list[str]:
    """int64 or uint64 [n], or a list of strings."""
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"ids must be a sequence of ids, got the single {type(ids).__name__} {ids!r}")
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        if ids.dtype == np.uint64 and len(ids) and ids.max() > INT64_MAX:
            return ids.reshape(-1).copy()
        return ids.reshape(-1).astype(np.int64)
    values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if all(isinstance(value, str) for value in values):
        for value in values:
            if not value.isascii():
                _require_utf8(value)
        return [str(value) for value in values]
    for value in values:
        if not _is_int(value):
            raise TypeError(f"ids must be all strings or all integers, got {type(value).__name__} {value!r}")
    values = [operator.index(value) for value in values]
    low, high = min(values), max(values)
    if low >= INT64_MIN and high <= INT64_MAX:
        return np.array(values, np.int64)
    if low >= 0 and high <= UINT64_MAX:
        return np.array(values, np.uint64)
    return [str(value) for value in values]


def _require_utf8(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"ids must be valid Unicode, got a lone surrogate in {value!r}") from None
