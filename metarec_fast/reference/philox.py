"""Definition of the random numbers: Philox4x32-10, what its key and counter hold, and unbiased integers from it.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A block of four 32-bit words is
a pure function of a key and a counter, so a number belongs to its place in the training run, not to a generator's past:

    key      64 bits of the block with key (seed) and counter (stream)
    counter  (slot block, row, step's low 32 bits, step's high 16 bits << 16 | purpose << 12 | attempt)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PERMUTATION, CROP, NEGATIVE, SHARED = 1, 2, 3, 4
MAX_ATTEMPTS = 4096
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: tuple, key: tuple[int, int]) -> np.ndarray:
    """Blocks of the counters: four integers or arrays that broadcast to [...]. Returns uint32 [..., 4]."""
    c0, c1, c2, c3 = (c & _LOW for c in np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter)))
    k0, k1 = (int(k) for k in key)
    for _ in range(10):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> _HALF) ^ c1 ^ np.uint64(k0), b & _LOW, (a >> _HALF) ^ c3 ^ np.uint64(k1), a & _LOW
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def derive_key(seed: int, stream: int) -> tuple[int, int]:
    """The key of a stream (a domain, a stage): mixed, so that (seed 1, stream 0) is not (seed 0, stream 1)."""
    words = philox4x32((stream % 2**32, stream >> 32, 0, 0), (seed % 2**32, seed >> 32))
    return int(words[0]), int(words[1])


@dataclass(frozen=True)
class Randomness:
    """The words of one seed, stream, step and purpose."""

    key: tuple[int, int]
    step: int
    purpose: int

    def block(self, block: np.ndarray | int, row: np.ndarray | int, *, attempt: int = 0) -> np.ndarray:
        """uint32 [..., 4]."""
        last = (self.step >> 32) << 16 | self.purpose << 12 | attempt
        return philox4x32((block, row, self.step % 2**32, last), self.key)

    def word(self, slot: int, row: int, *, attempt: int = 0) -> int:
        """32 bits: four slots share a block."""
        return int(self.block(slot // 4, row, attempt=attempt)[slot % 4])

    def pair(self, slot: int, row: int, *, attempt: int = 0) -> tuple[int, int]:
        """Two words of 32 bits: two slots share a block."""
        words = self.block(slot // 2, row, attempt=attempt)[2 * (slot % 2) :]
        return int(words[0]), int(words[1])

    def wide(self, slot: int, row: int, *, attempt: int = 0) -> int:
        """64 bits."""
        low, high = self.pair(slot, row, attempt=attempt)
        return high << 32 | low


def multiply_shift(word: int, n: int, bits: int) -> int | None:
    """An integer in [0, n) from a word of ``bits`` bits, or None where the word would bias the result.

    Lemire, "Fast random integer generation in an interval" (2019): of the 2**bits words, 2**bits mod n are refused.
    """
    product = word * n
    return product >> bits if product % 2**bits >= 2**bits % n else None


def bounded(draw, n: int, bits: int, *, attempt: int = 0) -> int:
    """Uniform in [0, n): the first attempt whose word is accepted. ``draw(attempt)`` gives the words."""
    for a in range(attempt, MAX_ATTEMPTS):
        value = multiply_shift(draw(a), n, bits)
        if value is not None:
            return value
    raise ArithmeticError(f"{MAX_ATTEMPTS} words refused in a row: the generator is broken")
