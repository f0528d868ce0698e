import numpy as np
import pytest

from metarec_fast import _C
from metarec_fast.reference.philox import NEGATIVE, Randomness, bounded, derive_key, philox4x32

# Known answers of Random123 1.14 (kat_vectors), philox4x32 with 10 rounds.
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_values(counter, key, expected):
    assert tuple(philox4x32(counter, key).tolist()) == expected
    assert _C.philox(*counter, *key) == expected


def test_blocks_broadcast():
    words = philox4x32((np.arange(5), np.array([[7], [8]]), 3, 4), (1, 2))
    assert words.shape == (2, 5, 4)
    assert words[1, 4].tolist() == list(_C.philox(4, 8, 3, 4, 1, 2))


def test_keys_of_neighbouring_seeds_and_streams_differ():
    keys = {derive_key(seed, stream) for seed in range(20) for stream in range(20)}
    assert len(keys) == 400


def test_bounded_skips_words_that_would_bias():
    n = 2**31 + 1  # nearly every second word is refused
    random = Randomness(derive_key(0, 0), 5, NEGATIVE)
    values, refused = [], 0
    for slot in range(2000):
        attempts = []
        values.append(bounded(lambda a, s=slot, t=attempts: t.append(a) or random.word(s, 0, attempt=a), n, 32))
        refused += len(attempts) > 1
    assert 800 < refused < 1200
    assert min(values) >= 0
    assert max(values) < n
    assert abs(np.mean(values) / n - 0.5) < 0.03  # 4 standard deviations of a mean of 2000
