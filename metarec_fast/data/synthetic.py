"""Synthetic domains with disjoint users and items, one hidden dynamic, and a known best ranker.

The process. There are ``num_classes`` hidden classes, the same in every domain. Class b has three possible
successors, ``successors[b, 0..2]``, and the two classes before b choose among them:

    c[t] = successors[c[t-1], (phase[c[t-2]] + phase[c[t-3]]) mod 3]

(a class that does not exist yet has phase 0; c[0] is drawn from few entry classes). With probability ``noise`` the
class of an event is drawn uniformly instead. Every item of a domain belongs to one class and is drawn within it with
a Zipf-like popularity of the domain's own.

Why transfer helps. Which class an item is in shows in few events: items of one class have the same few successors and
predecessors. The rule among the three successors needs contexts of three events, far more data than the small target
has, and it says nothing about any domain's items: an encoder that has learned it on the sources can be used on the
target as soon as the target's items are placed.

The control has a source's item counts and sequence lengths, and its events in random order over all users: there is
nothing in it to learn but popularity.

All draws are Philox words and integer arithmetic: a seed gives the same domains on every platform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metarec_fast.data.domain import Domain, Sequences
from metarec_fast.data.vocabulary import Vocabulary

SUCCESSORS = 3


class _Draws:
    """Integers from Philox, keyed by (seed, stream)."""

    def __init__(self, seed: int, stream: int):
        self._bits = np.random.Philox(key=(stream << 64) | seed)

    def integers(self, high: int, size: int) -> np.ndarray:
        """int64 [size] in [0, high), high <= 2**31; the bias is below high / 2**32."""
        words = self._bits.random_raw(size) >> np.uint64(32)
        return ((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64)

    def permutation(self, n: int) -> np.ndarray:
        return np.argsort(self._bits.random_raw(n), kind="stable")
