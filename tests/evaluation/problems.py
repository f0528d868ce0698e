"""Small problems that the evaluation tests share."""

import numpy as np

from metarec_fast.data.domain import Cases, Sequences, Split


def sequences(rows, num_items):
    return Sequences(
        offsets=np.cumsum([0, *map(len, rows)]),
        items=np.concatenate([np.asarray(row, np.int32) for row in rows]) if rows else np.zeros(0, np.int32),
        num_items=num_items,
    )


def leave_one_out(rows, num_items):
    """Last event of each row for test, the one before for validation; rows of three events or more."""
    users = np.arange(len(rows))

    def cases(cut):
        targets = np.array([row[-cut] for row in rows], np.int64)
        return Cases(users, sequences([row[:-cut] for row in rows], num_items), targets)

    return Split(None, sequences([row[:-2] for row in rows], num_items), cases(2), cases(1), "leave-one-out")


def random_rows(rng, count, num_items, longest=12):
    return [rng.integers(num_items, size=rng.integers(3, longest + 1)).tolist() for _ in range(count)]


class TableScorer:
    """Scores written down beforehand, one row a user."""

    def __init__(self, scores):
        self.scores, self.num_items = scores, scores.shape[1]

    def prepare(self, histories, users=None):
        rows = self.scores[users]
        return lambda begin, end: rows[:, begin:end]
