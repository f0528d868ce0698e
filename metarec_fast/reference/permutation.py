"""Definition of the epoch order: a keyed permutation of [0, size) computed entry by entry, without an array."""

from __future__ import annotations

import numpy as np

from metarec_fast.reference.philox import PERMUTATION, Randomness, derive_key

ROUNDS = 8
MIN_BITS = 8  # halves of one or two bits do not mix: small orders walk through 256 numbers instead


def epoch_order(size: int, first: int, count: int, *, seed: int, stream: int, epoch: int) -> np.ndarray:
    """Entries [first, first + count) of the permutation of [0, size) that belongs to (seed, stream, epoch): int64.

    A Feistel network permutes the 2**bits numbers that just hold ``size``; a result outside [0, size) is sent through
    again until it falls inside, which keeps the map one to one (cycle walking) and takes two passes at most on average
    above 2**(MIN_BITS - 1).
    """
    bits = max(MIN_BITS, (size - 1).bit_length())
    low_bits = bits // 2
    high_mask, low_mask = np.uint64(2 ** (bits - low_bits) - 1), np.uint64(2**low_bits - 1)
    randomness = Randomness(derive_key(seed, stream), epoch, PERMUTATION)
    keys = randomness.block(np.arange(ROUNDS // 4), 0).reshape(-1)

    def permute(x: np.ndarray) -> np.ndarray:
        high, low = x >> np.uint64(low_bits), x & low_mask
        for i in range(0, ROUNDS, 2):
            high = high ^ (_mix(low, keys[i]) & high_mask)
            low = low ^ (_mix(high, keys[i + 1]) & low_mask)
        return high << np.uint64(low_bits) | low

    x = permute(np.arange(first, first + count, dtype=np.uint64))
    while (outside := x >= size).any():
        x[outside] = permute(x[outside])
    return x.astype(np.int64)


def _mix(x: np.ndarray, key: np.uint32) -> np.ndarray:
    """32 bits in which every bit of x and key shows: multiplications and shifts modulo 2**32."""
    low = np.uint64(0xFFFFFFFF)
    x = ((x + np.uint64(key)) & low) * np.uint64(0x9E3779B1) & low
    x = (x ^ x >> np.uint64(16)) * np.uint64(0x85EBCA6B) & low
    x = (x ^ x >> np.uint64(13)) * np.uint64(0xC2B2AE35) & low
    return x ^ x >> np.uint64(16)
