"""What a domain is once it is read: users' item sequences in time order, and the ids that users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from metarec_fast.data import csr
from metarec_fast.data.io.tables import SHOWN
from metarec_fast.data.vocabulary import Vocabulary
from metarec_fast.text import printable

Catalogue = Literal["training", "all"]


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

    def slices(self, begins: np.ndarray, lengths: np.ndarray, *, times: bool = True) -> Sequences:
        """Parts of this as sequences of their own: events begins[i], ..., begins[i] + lengths[i] - 1, of all users'.

        times: keep them, where there are any.
        """
        events = csr.positions(begins, lengths)
        kept = self.times[events] if times and self.times is not None else None
        return Sequences(csr.offsets(lengths), self.items[events], self.num_items, kept)

    def take(self, rows: np.ndarray, *, times: bool = True) -> Sequences:
        """The sequences of these numbers, in this order."""
        return self.slices(self.offsets[:-1][rows], self.lengths[rows], times=times)

    def pairs(self, lag: int) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of items ``lag`` >= 1 events apart in one sequence: the earlier [N] and the later [N], in order."""
        last = np.repeat(self.offsets[1:], self.lengths) - 1
        earlier = np.flatnonzero(last - np.arange(len(self.items)) >= lag)
        return self.items[earlier], self.items[earlier + lag]


def order_in_words(time: str | None) -> str:
    """time: the name of the column of times, if there is one."""
    return "in the order of rows: no time column" if time is None else f"ordered by column {time!r}"


@dataclass(frozen=True)
class ReadReport:
    """What `read` found in a file."""

    path: str
    rows: int  # rows of data, rejected ones included
    rejected: int
    examples: tuple[tuple[int, str], ...]  # the first rejected rows: (line from 1, reason)
    duplicates: int  # rows that repeat the user, item and time of an earlier one
    dropped: int  # rows left out because of duplicates=...
    tied: float | None  # share of neighbouring events of one user that have the same time; None without times
    notes: tuple[str, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)  # user, item and perhaps time -> the column it was read from
    unit: str = "line"  # what the examples count: lines, or rows of a file without lines

    @property
    def remarkable(self) -> bool:
        """Whether rows were left out or are repeated, or there are notes."""
        return bool(self.rejected or self.duplicates or self.dropped or self.notes)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows:,} rows, {self.rejected:,} rejected, {self.duplicates:,} duplicates"]
        if self.dropped:
            lines[0] += f", {self.dropped:,} dropped as repeated"
        if self.tied is not None:
            lines[0] += f", {self.tied:.1%} of neighbouring events tied in time"
        if self.columns:
            roles = ", ".join(f"{role} {self.columns[role]!r}" for role in ("user", "item") if role in self.columns)
            lines.append(f"{self.path}: read from columns {roles}; {order_in_words(self.columns.get('time'))}")
        place = "" if self.unit == "line" else f"{self.unit} "
        shown = self.examples[:SHOWN]
        lines += [f"{self.path}:{place}{line}: {reason}" for line, reason in shown]
        if self.rejected > len(shown):
            lines.append(f"... and {self.rejected - len(shown):,} more rejected rows")
        return "\n".join([*lines, *(f"{self.path}: {note}" for note in self.notes)])


@dataclass(frozen=True, eq=False, repr=False)
class Domain:
    """One catalogue with its users: nothing in it is shared with another domain."""

    name: str
    sequences: Sequences
    users: Vocabulary
    items: Vocabulary
    report: ReadReport | None = None
    ordered_by: str | None = None  # the column of times that the file was read with

    @property
    def num_users(self) -> int:
        return len(self.sequences)

    @property
    def num_items(self) -> int:
        return self.sequences.num_items

    @property
    def num_interactions(self) -> int:
        return self.sequences.num_events

    def summary(self) -> str:
        """One line for people: size, mean sequence length, what events are ordered by, and rows left out."""
        mean = self.num_interactions / max(self.num_users, 1)
        order = order_in_words(self.ordered_by)
        if self.ordered_by is None and self.sequences.times is not None:
            order = "with times"
        skipped = ""
        if self.report is not None and self.report.rejected:
            skipped = f", {self.report.rejected:,} of {self.report.rows:,} rows skipped"
        return (
            f"{printable(self.name)}: {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_interactions:,} interactions, mean length {mean:.1f}, {printable(order)}{skipped}"
        )

    def __repr__(self) -> str:
        return f"<Domain {self.summary()}>"


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
    """Training sequences (index = the domain's user; empty for users left out) and two sets of evaluation cases."""

    domain: Domain
    train: Sequences
    valid: Cases
    test: Cases
    protocol: str  # in words, printed beside every number

    @cached_property
    def trained_items(self) -> np.ndarray:
        """bool [num_items]: the items that training events hold. The others are known from held-out events alone."""
        trained = np.zeros(self.train.num_items, bool)
        trained[self.train.items] = True
        return trained

    def candidates(self, catalogue: Catalogue) -> np.ndarray | None:
        """The items to rank, bool [num_items]: those of training events; None for all. Raises ValueError for others."""
        if catalogue not in ("training", "all"):
            raise ValueError(f"catalogue must be 'training' or 'all', got {catalogue!r}")
        return self.trained_items if catalogue == "training" else None
