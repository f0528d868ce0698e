"""Whether one domain is another over again: what a source must not be, for then it teaches what is held out."""

from __future__ import annotations

import numpy as np

from metarec_fast.data.domain import Domain

COMPARED = 1000  # users, at most
FEWEST = 100  # events below which the same counts may be chance


def copied(source: Domain, target: Domain) -> str | None:
    """In words how ``source`` looks like a copy of ``target``, or holds one; None if it does not."""
    share, chance = _shared_events(source, target)
    if share > 0.5 and share - chance > 0.5 * (1 - chance):
        return f"holds {share:.0%} of the target's events, by the ids of users and items"
    if _same_counts(source, target):
        return "has as many events as the target of every user and item, under other ids"
    return None


def _shared_events(source: Domain, target: Domain) -> tuple[float, float]:
    """Share of the target's events that the source has too, and of those that it has of another user, by chance.

    Over some of the target's users; ids are read once, and never as a whole held.
    """
    users = np.flatnonzero(target.sequences.lengths)
    users = users[:: -(-len(users) // COMPARED) or 1]
    if source.users.is_integer != target.users.is_integer or source.items.is_integer != target.items.is_integer:
        return 0.0, 0.0
    wanted = dict(zip(target.users.decode(users), users.tolist(), strict=True))
    pairs = [(wanted[user], i) for i, user in enumerate(source.users) if user in wanted]
    events = int(target.sequences.lengths[users].sum())
    theirs = [set(source.items.decode(source.sequences[i])) for _, i in pairs]
    same = other = 0
    for at, (mine, _) in enumerate(pairs):
        chosen = target.items.decode(target.sequences[mine])
        same += sum(item in theirs[at] for item in chosen)
        other += sum(item in theirs[at - 1] for item in chosen)
    return (same / events, other / events if len(pairs) > 1 else 0.0) if events else (0.0, 0.0)


def _same_counts(source: Domain, target: Domain) -> bool:
    a, b = source.sequences, target.sequences
    if not (a.num_events == b.num_events >= FEWEST and len(a) == len(b) and a.num_items == b.num_items):
        return False
    of_users = np.array_equal(np.sort(a.lengths), np.sort(b.lengths))
    counts = [np.sort(np.bincount(s.items, minlength=s.num_items)) for s in (a, b)]
    return of_users and np.array_equal(*counts) and len(np.unique(counts[0])) > 2
