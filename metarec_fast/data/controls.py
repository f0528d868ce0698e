"""Domains that a claim of transfer is tested with: order destroyed, items destroyed, or the target itself."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from metarec_fast.checks import PHILOX_SEED, check_count
from metarec_fast.data.domain import Domain, Sequences
from metarec_fast.data.vocabulary import Vocabulary


def shuffled_order(domain: Domain, *, seed: int) -> Domain:
    """Each user's items in random order: who chose what stays, when does not."""
    return _reordered(domain, "shuffled", _ranked_within(_users(domain.sequences), _keys(domain, seed)))


def shuffled_ties(domain: Domain, *, seed: int) -> Domain:
    """Events of one user at one time in random order, under the domain's own name. Raises ValueError without times."""
    s = domain.sequences
    if s.times is None:
        raise ValueError(f"domain {domain.name!r} has no times, so no ties to shuffle")
    new = np.ones(s.num_events, bool)
    new[1:] = s.times[1:] != s.times[:-1]
    new[s.offsets[:-1][s.lengths > 0]] = True
    shuffled = _reordered(domain, "", _ranked_within(np.cumsum(new), _keys(domain, seed)))
    return replace(shuffled, name=domain.name, report=domain.report, ordered_by=domain.ordered_by)


def random_items(domain: Domain, *, seed: int) -> Domain:
    """All events' items in random order over all users: popularity and lengths stay, nothing else does."""
    return _reordered(domain, "random", np.argsort(_keys(domain, seed), kind="stable"))


def relabelled_copy(domain: Domain, *, seed: int, without: np.ndarray | None = None) -> Domain:
    """The same domain under other ids and in another order of users: what an ideal source would be.

    without: [N] users, by number, who are left out of it.
    """
    s, seed = domain.sequences, check_count(seed, "seed", PHILOX_SEED)
    users, items = (
        np.argsort(np.random.Philox(key=(i << 64) | seed).random_raw(n), kind="stable")
        for i, n in enumerate((domain.num_users, domain.num_items))
    )
    if without is not None:
        users = users[~np.isin(users, without)]
    offsets = np.concatenate(([0], np.cumsum(s.lengths[users])))
    at = np.repeat(s.offsets[:-1][users] - offsets[:-1], s.lengths[users]) + np.arange(offsets[-1])
    times = None if s.times is None else s.times[at]
    sequences = Sequences(offsets, items[s.items[at]].astype(s.items.dtype), s.num_items, times)
    return Domain(
        f"{domain.name} copy",
        sequences,
        Vocabulary(np.arange(len(users))),
        Vocabulary(np.arange(domain.num_items)),
    )


def fingerprint(domain: Domain) -> str:
    """16 hexadecimal digits that tell this domain's events, their order and their times from any other's."""
    s = domain.sequences
    digest = hashlib.sha256(f"{domain.num_users} {domain.num_items}".encode())
    for values, kind in ((s.offsets, "<i8"), (s.items, "<i8"), (s.times, "<f8")):
        if values is not None:
            digest.update(np.ascontiguousarray(values, kind).tobytes())
    return digest.hexdigest()[:16]


def _users(sequences: Sequences) -> np.ndarray:
    return np.repeat(np.arange(len(sequences)), sequences.lengths)


def _keys(domain: Domain, seed: int) -> np.ndarray:
    """A random number an event. Raw words of Philox are the same in every NumPy."""
    return np.random.Philox(key=check_count(seed, "seed", PHILOX_SEED)).random_raw(domain.num_interactions)


def _ranked_within(group: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The order that sorts by key within each group; groups rise."""
    return np.lexsort((keys, group))


def _reordered(domain: Domain, how: str, order: np.ndarray) -> Domain:
    """The items in another order; users, lengths and times stay where they are."""
    s = domain.sequences
    return replace(
        domain, name=f"{domain.name} {how}", sequences=replace(s, items=s.items[order]), report=None, ordered_by=None
    )
