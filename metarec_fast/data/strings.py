"""Strings in two arrays, decoded on demand: what a vocabulary of millions of strings is held in."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

BLOCK = 65536  # strings that are encoded or decoded at a time


class PackedStrings(Sequence[str]):
    """String i is the UTF-8 of ``utf8[offsets[i]:offsets[i + 1]]``. The arrays may be memory-mapped.

    utf8: uint8 [bytes]. offsets: int64 [n + 1].
    """

    def __init__(self, utf8: np.ndarray, offsets: np.ndarray):
        self.utf8, self.offsets = utf8, offsets

    @classmethod
    def of(cls, blocks: Iterable[list[str]]) -> PackedStrings:
        """The strings of the lists, one list after the other."""
        texts, lengths = [], [np.zeros(1, np.int64)]
        for block in blocks:
            parts = [value.encode() for value in block]
            lengths.append(np.fromiter(map(len, parts), np.int64, len(parts)))
            texts.append(b"".join(parts))
        return cls(np.frombuffer(b"".join(texts), np.uint8), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]
        return self.utf8[self.offsets[i] : self.offsets[i + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            bounds = self.offsets[first : first + BLOCK + 1].tolist()
            text = self.utf8[bounds[0] : bounds[-1]].tobytes()
            for begin, end in itertools.pairwise(bounds):
                yield text[begin - bounds[0] : end - bounds[0]].decode()
