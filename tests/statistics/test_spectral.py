"""A spectral start places items by what surrounds them."""

import numpy as np
import pytest
import torch

from metarec_fast.data import Sequences
from metarec_fast.statistics.spectral import moments, spectral_table, turned


def sequences(rows, num_items: int) -> Sequences:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return Sequences(offsets, np.concatenate(rows).astype(np.int32), num_items)


@pytest.fixture
def groups():
    """Users who read only items 0-9, and users who read only 10-19; 20-24 have no events."""
    rng = np.random.default_rng(0)
    return sequences([rng.integers(0, 10, 12) + 10 * (u % 2) for u in range(60)], 25)


def test_deterministic_for_a_seed(groups):
    table = spectral_table(groups, 8, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(spectral_table(groups, 8, seed=3), table)
    assert torch.equal(torch.get_rng_state(), state)  # a generator of its own
    assert not torch.equal(spectral_table(groups, 8, seed=4)[20:], table[20:])


def test_groups_stand_apart(groups):
    cosine = (table := spectral_table(groups, 8, seed=0)) @ table.T
    a, b = slice(0, 10), slice(10, 20)
    apart = cosine[a, b].abs().max()
    within = torch.cat((cosine[a, a], cosine[b, b])).mean()
    assert apart < 0.05 < 0.2 < within


def test_the_seed_rotates_nothing_of_what_is_known(groups):
    """Cosines between items with events come from the data; the seed only starts the iteration."""
    one, two = (spectral_table(groups, 4, seed=s)[:20] for s in (0, 1))
    torch.testing.assert_close((one @ one.T)[:10, 10:], (two @ two.T)[:10, 10:], rtol=0, atol=0.05)


@pytest.mark.parametrize("dim", [1, 8, 64])
def test_rows_have_length_one(groups, dim):
    table = spectral_table(groups, dim, seed=0)
    assert table.shape == (25, dim) and table.dtype == torch.float32
    torch.testing.assert_close(table.norm(dim=1), torch.ones(25))


def test_items_without_events_get_directions_of_their_own(groups):
    unseen = spectral_table(groups, 8, seed=0)[20:]
    cosine = unseen @ unseen.T - torch.eye(5)
    assert cosine.abs().max() < 0.99


@pytest.mark.parametrize("num_items", [1, 2, 5])
def test_a_catalogue_smaller_than_the_rows_are_long(num_items):
    rows = [np.arange(num_items), np.arange(num_items)[::-1]]
    table = spectral_table(sequences(rows, num_items), 16, seed=0)
    assert table.shape == (num_items, 16) and table.isfinite().all()
    torch.testing.assert_close(table.norm(dim=1), torch.ones(num_items))


def test_sequences_in_which_nothing_meets():
    table = spectral_table(sequences([[0], [1], [2]], 4), 8, seed=0)
    assert len(table.unique(dim=0)) == 4
    torch.testing.assert_close(table.norm(dim=1), torch.ones(4))


def test_the_singular_vectors_are_those_of_a_dense_decomposition(groups):
    """Against numpy on the dense matrix, up to the rotation that equal singular values leave open."""
    window, decay, V = 10, 0.9, 20
    counts = np.zeros((V, V))
    for u in range(len(groups)):
        row = groups[u]
        for i in range(len(row)):
            for lag in range(1, min(window, i) + 1):
                counts[row[i - lag], row[i]] += decay ** (lag - 1)
    counts = counts + counts.T
    mass = counts.sum(1)
    with np.errstate(divide="ignore"):
        pmi = np.maximum(np.log(counts * mass.sum() / np.outer(mass, mass)), 0)
    U, S, _ = np.linalg.svd(pmi)
    want = U * np.sqrt(S)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    got = spectral_table(groups, V, seed=0)[:V].double().numpy()
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-3)


def test_a_turned_table_is_turned_back():
    generator = torch.Generator().manual_seed(0)
    table, Q = torch.randn(40, 8, generator=generator), torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    described = torch.randn(40, 12, generator=generator).numpy()
    frame = moments(table, described)
    assert frame.shape == (8, 12) and frame.norm().item() == pytest.approx(1)
    back = turned(table @ Q, moments(table @ Q, described), 3 * frame)
    torch.testing.assert_close(back, table, rtol=0, atol=1e-5)


def test_rounding_rotates_nothing_that_moments_leave_open():
    """Of 64 directions 12 descriptors say something; the others stay, whatever the last digits are."""
    generator = torch.Generator().manual_seed(0)
    table, frame = torch.randn(200, 64, generator=generator), torch.randn(64, 12, generator=generator)
    own = moments(table, torch.randn(200, 12, generator=generator).numpy())
    noise = 1e-7 * own.norm() * torch.randn(64, 12, generator=generator) / 28
    moved = turned(table, own + noise, frame) - turned(table, own, frame)
    assert moved.norm() < 1e-4 * table.norm()
    torch.testing.assert_close(turned(table, torch.zeros(64, 12), frame), table)


def test_turning_keeps_lengths_and_angles_also_where_nothing_is_known():
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for own in (torch.zeros(4, 3), moments(table, np.ones((5, 3)))):
        after = turned(table, own, torch.eye(4, 3))
        torch.testing.assert_close(after @ after.T, table @ table.T)
    assert not moments(table, np.zeros((5, 3))).any()
