"""What a domain is once it is read: users' item sequences in time order, and the ids that users know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metarec_fast.data.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Sequences:
    """Item sequences in time order, as CSR: sequence u is ``items[offsets[u]:offsets[u + 1]]``.

    offsets: int64 [U+1], rising from 0. items: int32 [E] (int64 if num_items >= 2**31), in [0, num_items).
    times: [E] numbers or None.
    """

    offsets: np.ndarray
    items: np.ndarray
    num_items: int
    times: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, u: int) -> np.ndarray:
        return self.items[self.offsets[u] : self.offsets[u + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def num_events(self) -> int:
        return len(self.items)


@dataclass(frozen=True, eq=False)
class Domain:
    """One catalogue with its users: nothing in it is shared with another domain."""

    name: str
    sequences: Sequences
    users: Vocabulary
    items: Vocabulary

    @property
    def num_users(self) -> int:
        return len(self.sequences)

    @property
    def num_items(self) -> int:
        return self.sequences.num_items


@dataclass(frozen=True, eq=False)
class Cases:
    """Questions of an evaluation: after ``histories[i]``, user ``users[i]`` chose ``targets[i]``.

    histories hold everything the protocol allows to be seen, oldest first; they may be empty.
    """

    users: np.ndarray  # int64 [N]
    histories: Sequences  # N of them
    targets: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Split:
    """Training sequences (index = the domain's user; empty for users left out) and two sets of questions."""

    domain: Domain
    train: Sequences
    valid: Cases
    test: Cases
    protocol: str  # in words, printed beside every number
