"""What tells one domain's data from another's, part by part, so that a difference can be named."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metarec_fast.data.domain import Domain
from metarec_fast.data.vocabulary import Vocabulary

BLOCK = 1 << 20  # values hashed at a time
_known: weakref.WeakKeyDictionary[Domain, dict[str, Any]] = weakref.WeakKeyDictionary()


def identity(domain: Domain) -> dict[str, Any]:
    """Name, sizes, and digests of events in their order, times, user ids and item ids: one pass, kept for the domain.

    For JSON. Other than ``fingerprint``, which knows nothing of names, it tells domains apart whose ids differ.
    """
    if domain not in _known:
        s = domain.sequences
        _known[domain] = {
            "name": domain.name,
            "num_users": domain.num_users,
            "num_items": domain.num_items,
            "num_interactions": domain.num_interactions,
            "events": _digest((s.offsets, "<i8"), (s.items, "<i8")),
            "times": None if s.times is None else _digest((s.times, f"<{s.times.dtype.kind}8")),
            "users": _of_ids(domain.users),
            "items": _of_ids(domain.items),
        }
    return dict(_known[domain])


def _digest(*arrays: tuple[np.ndarray, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for values, kind in arrays:
        digest.update(f"{len(values)} {kind} ".encode())
        for first in range(0, len(values), BLOCK):
            digest.update(np.ascontiguousarray(values[first : first + BLOCK], kind))
    return digest.hexdigest()


def _of_ids(vocabulary: Vocabulary) -> str:
    arrays = vocabulary.to_arrays()
    return _digest(*((arrays[name], arrays[name].dtype.newbyteorder("<").str) for name in sorted(arrays)))


def difference(
    now: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], *, role: str, times: bool
) -> str | None:
    """In words, how domains differ from those of before, all by ``identity``; None if they do not.

    role: what they are, "source" or "target". times: whether these are read, and not only the order that they give.
    """
    names, earlier = ([one["name"] for one in domains] for domains in (now, before))
    if names != earlier:
        listed, were = (", ".join(map(repr, some)) or "none" for some in (names, earlier))
        order = " in another order" if sorted(names) == sorted(earlier) else ""
        return f"{role}s{order}: {listed}, was {were}"
    for one, was in zip(now, before, strict=True):
        if found := _difference(one, was, times=times):
            return f"{role} {one['name']!r} has other {found}"
    return None


def _difference(one: Mapping[str, Any], was: Mapping[str, Any], *, times: bool) -> str | None:
    for key, words in (("num_users", "users"), ("num_items", "items"), ("num_interactions", "events")):
        if one[key] != was[key]:
            return f"events than before: {one[key]:,} {words}, was {was[key]:,}"
    for key in ("users", "items"):
        if one[key] != was[key]:
            return f"{key[:-1]} ids than before, or the same in another order"
    if one["events"] != was["events"]:
        return "events than before, or the same in another order"
    if times and one["times"] != was["times"]:
        return "times than before"
    return None
