import os
from pathlib import Path

import numpy as np
import pytest

from metarec_fast.data import Domain, Sequences, Vocabulary, synthetic


@pytest.fixture(scope="session")
def real_domains() -> Path:
    """The folder of the real domains; skips where there is none."""
    beside = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("METAREC_FAST_DATA", beside))
    if not list(folder.glob("amazon14_*.inter.gz")):
        pytest.skip(f"needs the real domains; none in {folder} (METAREC_FAST_DATA names the folder)")
    return folder


@pytest.fixture(scope="session")
def world():
    return synthetic()


@pytest.fixture
def make_domain():
    """A domain from lists of items and, perhaps, of times."""

    def make(sequences, times=None, num_items=None, name="made"):
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in sequences])]).astype(np.int64)
        items = np.array([i for s in sequences for i in s], np.int32)
        num_items = int(items.max(initial=-1)) + 1 if num_items is None else num_items
        when = None if times is None else np.array([t for ts in times for t in ts])
        return Domain(
            name,
            Sequences(offsets, items, num_items, when),
            Vocabulary([f"u{u}" for u in range(len(sequences))]),
            Vocabulary([f"i{i}" for i in range(num_items)]),
        )

    return make
