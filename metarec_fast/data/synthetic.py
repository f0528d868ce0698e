"""Synthetic domains with disjoint users and items, one hidden dynamic, and a known best ranker.

The process. There are `num_classes` hidden classes, the same in every domain. Class b has three possible successors,
and the two classes before b choose among them:

    c[t] = successors[c[t-1], (phase[c[t-2]] + phase[c[t-3]]) mod 3]

where a class before the first event counts as phase 0 and c[0] is one of two entry classes. With probability `noise`
the class of an event is drawn uniformly instead. Each item of a domain belongs to one class, and is drawn within it
with a Zipf-like popularity that is the domain's own.

Why transfer helps. The rule is about classes alone, so what an encoder has learned of it on the sources holds on the
target as soon as the target's items are placed. To place them is easy: items of one class have the same few successors
and predecessors, which shows in few events. A ranker that knows the classes can count the rule on the target too; a
model that has to find places and rule together from the target alone falls well short of it.

The control is drawn as a source is, and then its events are put in random order over all users: popularity and
lengths are a source's, and beyond popularity there is nothing to learn.

All draws are words of Philox and integer arithmetic, so that a seed gives the same domains on every platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarec_fast.checks import LARGEST, PHILOX_SEED, POSITIVE_COUNT, Range, check_count, check_number
from metarec_fast.data.domain import Domain, Sequences
from metarec_fast.data.vocabulary import Vocabulary

NUM_SUCCESSORS = 3
NUM_ENTRIES = 2
NOISE_UNIT = 2**20  # noise is rounded to a multiple of 1 / NOISE_UNIT


@dataclass(frozen=True, eq=False)
class Dynamics:
    """The rule that all domains share."""

    successors: np.ndarray  # int64 [C, 3], distinct in each row
    phases: np.ndarray  # int64 [C], in [0, 3)
    entries: np.ndarray  # int64 [2]: classes that start a sequence
    noise: float

    @property
    def num_classes(self) -> int:
        return len(self.phases)

    def ruled(self, last: np.ndarray) -> np.ndarray:
        """The class that the rule says: int64 [N], after last int64 [N, 3], newest first; -1 for no class.

        last[:, 0] must be a class.
        """
        earlier = last[:, 1:]
        phase = np.where(earlier >= 0, self.phases[earlier], 0).sum(1) % NUM_SUCCESSORS
        return self.successors[last[:, 0], phase]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What is hidden of a domain's items: their classes, and integer weights by which a class draws them."""

    classes: np.ndarray  # int64 [V]
    weights: np.ndarray  # int64 [V], positive


@dataclass(frozen=True, eq=False)
class SyntheticDomains:
    """Sources from which transfer to the target helps, a control from which it does not, and the hidden truth."""

    sources: tuple[Domain, ...]
    target: Domain
    control: Domain
    dynamics: Dynamics
    catalogues: Mapping[str, Catalogue]  # by the domain's name; the control's classes have no dynamics

    def oracle(self, domain: Domain, histories: Sequences) -> np.ndarray:
        """Probability of each item as the next one, given the true process: float64 [len(histories), V].

        No ranker has a better expected NDCG. domain: a source or the target; raises ValueError for another.
        """
        if not any(domain is known for known in (*self.sources, self.target)):
            raise ValueError(f"domain must be a source or the target of these domains, got {domain.name!r}")
        catalogue, rule = self.catalogues[domain.name], self.dynamics
        lengths = histories.lengths
        last = np.full((len(histories), 3), -1)
        for back in range(3):
            long = lengths > back
            last[long, back] = catalogue.classes[histories.items[histories.offsets[1:][long] - 1 - back]]
        begun = np.flatnonzero(lengths > 0)
        of_class = np.full((len(histories), rule.num_classes), rule.noise / rule.num_classes)
        of_class[begun, rule.ruled(last[begun])] += 1 - rule.noise
        of_class[np.ix_(lengths == 0, rule.entries)] += (1 - rule.noise) / len(rule.entries)
        within = catalogue.weights / np.bincount(catalogue.classes, catalogue.weights)[catalogue.classes]
        return of_class[:, catalogue.classes] * within


def synthetic(
    *,
    num_sources: int = 2,
    source_users: int = 2000,
    source_items: int = 300,
    target_users: int = 250,
    target_items: int = 200,
    num_classes: int = 12,
    min_length: int = 10,
    max_length: int = 30,
    noise: float = 0.1,
    seed: int = 0,
) -> SyntheticDomains:
    """Sources `source0`, `source1`, ..., a small `target` and a `control` of a source's size, as the module says.

    min_length, max_length: of a user's sequence, drawn uniformly. Times are whole numbers on one clock for all domains.
    A domain is the same for a seed whatever the number and sizes of the others.

    Raises ValueError for sizes that leave a class without items, or a rule without enough classes.
    """
    check_sizes(locals())
    rule = _dynamics(_Draws(seed, 0), num_classes, noise)
    lengths = (min_length, max_length)
    catalogues: dict[str, Catalogue] = {}

    def domain(name: str, stream: int, users: int, items: int, shuffled: bool = False) -> Domain:
        draws = _Draws(seed, stream)
        catalogues[name] = catalogue = _catalogue(draws, items, num_classes)
        return _domain(name, draws, rule, catalogue, users, lengths, shuffled)

    target = domain("target", 1, target_users, target_items)
    control = domain("control", 2, source_users, source_items, shuffled=True)
    sources = tuple(domain(f"source{i}", 3 + i, source_users, source_items) for i in range(num_sources))
    return SyntheticDomains(sources, target, control, rule, catalogues)


def check_sizes(given: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments of ``synthetic`` that are out of range or at odds; ``given`` has all of them."""
    classes = check_count(given["num_classes"], "num_classes", Range(2 * NUM_SUCCESSORS, LARGEST))
    shortest = check_count(given["min_length"], "min_length", POSITIVE_COUNT)
    for name, least in (
        ("num_sources", 0),
        ("source_users", 1),
        ("target_users", 1),
        ("source_items", classes),
        ("target_items", classes),
        ("max_length", shortest),
    ):
        check_count(given[name], name, Range(least, LARGEST))
    check_number(given["noise"], "noise", Range(0, 1))
    check_count(given["seed"], "seed", PHILOX_SEED)


class _Draws:
    """Integers from Philox keyed by (seed, stream). Raw words are the same in every NumPy; Generator's need not be."""

    def __init__(self, seed: int, stream: int):
        self._words = np.random.Philox(key=(stream << 64) | seed)

    def integers(self, high: int | np.ndarray, size: int) -> np.ndarray:
        """int64 [size] in [0, high), high < 2**31; uneven by at most high / 2**32."""
        words = self._words.random_raw(size) >> np.uint64(32)
        return ((words * np.asarray(high, np.uint64)) >> np.uint64(32)).astype(np.int64)

    def permutation(self, n: int) -> np.ndarray:
        return np.argsort(self._words.random_raw(n), kind="stable")


def _dynamics(draws: _Draws, num_classes: int, noise: float) -> Dynamics:
    # Each class is the j-th successor of exactly one class, so that none is out of reach.
    columns = [np.arange(num_classes)]  # no class follows itself
    while len(columns) <= NUM_SUCCESSORS:
        column = draws.permutation(num_classes)
        if all((column != other).all() for other in columns):
            columns.append(column)
    phases = draws.permutation(num_classes) % NUM_SUCCESSORS
    entries = draws.permutation(num_classes)[:NUM_ENTRIES]
    return Dynamics(np.stack(columns[1:], axis=1), phases, entries, round(noise * NOISE_UNIT) / NOISE_UNIT)


def _catalogue(draws: _Draws, num_items: int, num_classes: int) -> Catalogue:
    classes = draws.permutation(num_items) % num_classes
    rank = np.empty(num_items, np.int64)  # within the class, at random
    shuffled = draws.permutation(num_items)
    grouped = shuffled[np.argsort(classes[shuffled], kind="stable")]
    starts = np.cumsum(np.bincount(classes)) - np.bincount(classes)
    rank[grouped] = np.arange(num_items) - starts[classes[grouped]]
    return Catalogue(classes, 2**16 // (rank + 3))


def _domain(
    name: str,
    draws: _Draws,
    rule: Dynamics,
    catalogue: Catalogue,
    num_users: int,
    bounds: tuple[int, int],
    shuffled: bool,
) -> Domain:
    num_items = len(catalogue.classes)
    lengths = bounds[0] + draws.integers(bounds[1] - bounds[0] + 1, num_users)
    classes = np.full((num_users, bounds[1] + 3), -1)  # three columns before the first event
    classes[:, 3] = rule.entries[draws.integers(len(rule.entries), num_users)]
    for t in range(3, bounds[1] + 3):
        if t > 3:
            classes[:, t] = rule.ruled(classes[:, t - 1 : t - 4 : -1])
        noisy = draws.integers(NOISE_UNIT, num_users) < round(rule.noise * NOISE_UNIT)
        classes[:, t] = np.where(noisy, draws.integers(rule.num_classes, num_users), classes[:, t])
    class_of = classes[:, 3:][np.arange(bounds[1]) < lengths[:, None]]  # user after user

    by_class = np.argsort(catalogue.classes, kind="stable")
    cumulative = np.cumsum(catalogue.weights[by_class])
    last = np.cumsum(np.bincount(catalogue.classes, minlength=rule.num_classes)) - 1
    upper = cumulative[last]
    lower = np.concatenate([[0], upper[:-1]])
    drawn = lower[class_of] + draws.integers((upper - lower)[class_of], len(class_of))
    items = by_class[np.searchsorted(cumulative, drawn, side="right")]
    if shuffled:
        items = items[draws.permutation(len(items))]

    offsets = np.zeros(num_users + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    elapsed = np.cumsum(1 + draws.integers(10**5, len(items)))
    times = elapsed + np.repeat(draws.integers(10**6, num_users) - elapsed[offsets[:-1]], lengths)
    return Domain(
        name,
        Sequences(offsets, items.astype(np.int32), num_items, times),
        Vocabulary([f"{name}-u{u}" for u in range(num_users)]),
        Vocabulary([f"{name}-i{i}" for i in range(num_items)]),
    )
