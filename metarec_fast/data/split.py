"""Ways to divide a domain into training sequences and evaluation cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from metarec_fast.checks import PHILOX_SEED, POSITIVE_COUNT, SHARE, check_count, check_number
from metarec_fast.data.domain import Cases, Domain, Sequences, Split


def leave_one_out(domain: Domain, *, max_history: int | None = None) -> Split:
    """Ask for each user's last event (test) and the one before (validation); train on the events before both.

    Only users with three events or more have cases. Users with fewer are trained on, with all their events.
    Histories: for validation the training events, for test also the validation event; the newest `max_history` of
    them where it is given. The cut is each user's own, so training may hold events later than another user's test.
    """
    _check_max_history(max_history)
    sequences = domain.sequences
    lengths = sequences.lengths
    users = np.flatnonzero(lengths >= 3)
    train = sequences.slices(sequences.offsets[:-1], np.where(lengths >= 3, lengths - 2, lengths))
    valid = _cases(sequences, users, lengths[users] - 2, max_history)
    test = _cases(sequences, users, lengths[users] - 1, max_history)
    words = (
        "leave-one-out: per user with at least 3 events, the last is the test target and the second last the "
        "validation target; test histories include the validation event; users with fewer events are in training whole"
    )
    return _split(domain, train, valid, test, words, max_history)


def time_cut(
    domain: Domain,
    *,
    valid_from: float | None = None,
    test_from: float | None = None,
    valid: float = 0.1,
    test: float = 0.1,
    max_history: int | None = None,
) -> Split:
    """Train on what happened before one moment, the same for all users; evaluate on what came next.

    Training: events before `valid_from`. Validation: each user's first event in [valid_from, test_from), with the
    user's events before `valid_from` as history. Test: each user's first event from `test_from` on, with all the
    user's events before `test_from`. Histories may be empty; `max_history` keeps the newest of them.

    valid_from, test_from: in the units of the domain's times. Both or neither.
    valid, test: shares of all events, by time, to place the cuts where they are not given. Events at the same time
        stay together, so the shares come out larger where times are coarse.

    Raises ValueError for a domain without times, and for cuts that leave nothing to train on.
    """
    _check_max_history(max_history)
    sequences = domain.sequences
    times = sequences.times
    if times is None:
        raise ValueError(
            f"time_cut needs times, and domain {domain.name!r} has none; leave_one_out needs only the order"
        )
    if (valid_from is None) != (test_from is None):
        raise ValueError("valid_from and test_from must be given together")
    if valid_from is None:
        if not (valid > 0 and test > 0 and valid + test < 1):
            raise ValueError(f"valid and test must be positive and leave a share to train on, got {valid} and {test}")
        if len(times) == 0:
            raise ValueError(f"time_cut needs events, and domain {domain.name!r} has none")
        ordered = np.sort(times)
        test_from = ordered[min(round(len(ordered) * (1 - test)), len(ordered) - 1)].item()
        valid_from = ordered[min(round(len(ordered) * (1 - test - valid)), len(ordered) - 1)].item()
        if valid_from == test_from:
            raise ValueError(f"times are too coarse for these shares: both cuts fall on {test_from}")
    elif not valid_from < test_from:
        raise ValueError(f"valid_from must be before test_from, got {valid_from} and {test_from}")

    before_valid = _count_before(sequences, valid_from)
    before_test = _count_before(sequences, test_from)
    if not before_valid.any():
        raise ValueError(f"nothing to train on: no event of {domain.name!r} is before valid_from={valid_from}")
    train = sequences.slices(sequences.offsets[:-1], before_valid)
    in_valid = np.flatnonzero(before_test > before_valid)
    in_test = np.flatnonzero(sequences.lengths > before_test)
    words = (
        f"time cut: training before {valid_from}; validation target is a user's first event from then and before "
        f"{test_from}, test target the first from {test_from} on; histories hold the user's events before the cut"
    )
    return _split(
        domain,
        train,
        _cases(sequences, in_valid, before_valid[in_valid], max_history),
        _cases(sequences, in_test, before_test[in_test], max_history),
        words,
        max_history,
    )


def limit_users(split: Split, fraction: float, *, seed: int) -> Split:
    """The split as it would be with the data of a random share of the users, with the same test cases.

    Of the users with training events, round(fraction * users), and at least one, are kept. The others' training
    sequences are emptied and their validation cases left out: one has no validation data of users one does not
    have. Test cases stay, all of them, with their histories. For one seed, a smaller fraction keeps a subset.

    Raises ValueError for a fraction outside (0, 1], or a split without training events.
    """
    fraction, seed = check_number(fraction, "fraction", SHARE), check_count(seed, "seed", PHILOX_SEED)
    train = split.train
    users = np.flatnonzero(train.lengths)
    if not len(users):
        raise ValueError("limit_users needs users with training events, got none")
    # The raw words of Philox are the same in every NumPy; Generator.permutation need not be.
    shuffled = users[np.argsort(np.random.Philox(key=seed).random_raw(len(users)), kind="stable")]
    kept = np.zeros(len(train), bool)
    kept[shuffled[: max(1, round(fraction * len(users)))]] = True
    limited = train.slices(train.offsets[:-1], np.where(kept, train.lengths, 0))
    valid = select_cases(split.valid, np.flatnonzero(kept[split.valid.users]))
    words = (
        f"{split.protocol}; training and validation limited to {int(kept.sum()):,} of {len(users):,} users "
        f"(fraction {fraction:g}, seed {seed}), test users all kept"
    )
    return replace(split, train=limited, valid=valid, protocol=words)


def _check_max_history(max_history: int | None) -> None:
    if max_history is not None:
        check_count(max_history, "max_history", POSITIVE_COUNT)


def _cases(sequences: Sequences, users: np.ndarray, seen: np.ndarray, max_history: int | None) -> Cases:
    """After their first seen[i] events, what did users[i] choose?"""
    starts = sequences.offsets[users]
    used = seen if max_history is None else np.minimum(seen, max_history)
    histories = sequences.slices(starts + seen - used, used)
    return Cases(users.astype(np.int64), histories, sequences.items[starts + seen].astype(np.int64))


def select_cases(cases: Cases, which: np.ndarray) -> Cases:
    """The cases of these numbers."""
    return Cases(cases.users[which], cases.histories.take(which), cases.targets[which])


def _count_before(sequences: Sequences, moment: float) -> np.ndarray:
    """Events of each user with a time before the moment: int64 [users]; times rise within a user."""
    before = np.zeros(sequences.num_events + 1, np.int64)
    np.cumsum(sequences.times < moment, out=before[1:])
    return before[sequences.offsets[1:]] - before[sequences.offsets[:-1]]


def _split(domain: Domain, train: Sequences, valid: Cases, test: Cases, words: str, max_history: int | None) -> Split:
    split = Split(domain, train, valid, test, words)
    if max_history is not None:
        words += f"; at most the last {max_history} events as history"
    for name, cases in (("validation", valid), ("test", test)):
        cold, empty = int((~split.trained_items[cases.targets]).sum()), int((cases.histories.lengths == 0).sum())
        words += f"; {len(cases):,} {name} cases, {cold:,} with a target item unseen in training"
        if empty:
            words += f", {empty:,} with an empty history"
    return replace(split, protocol=words)
