import hashlib

import numpy as np
import pytest

from metarec_fast.data import Sequences, leave_one_out, synthetic

# Of offsets, items and times as little-endian int64: what seed 0 must give on any platform and NumPy.
DIGESTS = {
    "source0": "80b51025af03edd3",
    "source1": "fcbade39d93b088e",
    "target": "b50d8fd359f7dd6e",
    "control": "edf351c92ff48aa8",
}


def ndcg_at_10(scores, targets):
    """Mean NDCG@10 of one target a row; ties in the middle of their places."""
    own = scores[np.arange(len(targets)), targets][:, None]
    rank = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return np.where(rank < 10, 1 / np.log2(2 + rank), 0).mean()


def last_items(histories):
    return histories.items[histories.offsets[1:] - 1]


def popularity(split):
    counts = np.bincount(split.train.items, minlength=split.train.num_items)
    return np.tile(counts, (len(split.test), 1))


def transitions(split):
    """Counts of item after item, popularity breaking ties."""
    train = split.train
    counts = np.zeros((train.num_items, train.num_items))
    for u in range(len(train)):
        np.add.at(counts, (train[u][:-1], train[u][1:]), 1)
    popular = np.bincount(train.items, minlength=train.num_items) / train.num_events
    return counts[last_items(split.test.histories)] + popular


def contexts(sequences, classes):
    """Counts of a class after three classes, oldest first: [C, C, C, C]."""
    number = classes.max() + 1
    counts = np.zeros((number,) * 4)
    for u in range(len(sequences)):
        c = classes[sequences[u]]
        np.add.at(counts, (c[:-3], c[1:-2], c[2:-1], c[3:]), 1)
    return counts


def by_class(world, split, counts):
    """A ranker that knows each item's class and weight, and must take the dynamics from counts."""
    catalogue = world.catalogues["target"]
    c = catalogue.classes
    histories = split.test.histories
    last = c[histories.items[histories.offsets[1:, None] - np.arange(3, 0, -1)]]
    rates = counts + 0.02 * counts.sum((0, 1), keepdims=True) / counts.sum() + 1e-9
    rates /= rates.sum(-1, keepdims=True)
    of_class = rates[last[:, 0], last[:, 1], last[:, 2]]
    return of_class[:, c] * (catalogue.weights / np.bincount(c, catalogue.weights)[c])


@pytest.fixture(scope="module")
def crowded():
    """The same process with many target users, so that test figures are close to their expectations."""
    return synthetic(target_users=4000)


def test_shape_of_the_domains(world):
    assert [d.name for d in (*world.sources, world.target, world.control)] == [
        "source0",
        "source1",
        "target",
        "control",
    ]
    for domain in (*world.sources, world.control):
        assert (domain.num_users, domain.num_items) == (2000, 300)
    assert (world.target.num_users, world.target.num_items) == (250, 200)
    names = [set(d.users) | set(d.items) for d in (*world.sources, world.target, world.control)]
    assert len(set.union(*names)) == sum(map(len, names))  # nothing is shared
    for domain in (*world.sources, world.target, world.control):
        sequences = domain.sequences
        assert (sequences.lengths.min(), sequences.lengths.max()) == (10, 30)
        assert sequences.items.dtype == np.int32
        assert sequences.items.min() >= 0 and sequences.items.max() < domain.num_items
        for u in range(domain.num_users):
            times = sequences.times[sequences.offsets[u] : sequences.offsets[u + 1]]
            assert (np.diff(times) > 0).all()


def test_a_seed_gives_these_domains_everywhere(world):
    for domain in (*world.sources, world.target, world.control):
        sequences = domain.sequences
        state = (sequences.offsets, sequences.items, sequences.times)
        digest = hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in state)).hexdigest()[:16]
        assert digest == DIGESTS[domain.name], domain.name


def test_domains_do_not_depend_on_the_others(world):
    other = synthetic(num_sources=1, target_users=7, target_items=30)
    assert len(other.sources) == 1
    for a, b in ((other.sources[0], world.sources[0]), (other.control, world.control)):
        assert np.array_equal(a.sequences.items, b.sequences.items)
        assert np.array_equal(a.sequences.times, b.sequences.times)
    reseeded = synthetic(seed=1)
    assert not np.array_equal(reseeded.target.sequences.items[:50], world.target.sequences.items[:50])


def test_events_follow_the_rule(world):
    rule = world.dynamics
    for domain in (*world.sources, world.target):
        classes = world.catalogues[domain.name].classes
        hits = total = 0
        for u in range(domain.num_users):
            c = classes[domain.sequences[u]].tolist()
            for t in range(1, len(c)):
                phase = sum(rule.phases[c[t - back]] for back in (2, 3) if t >= back) % 3
                hits += c[t] == rule.successors[c[t - 1], phase]
                total += 1
        # The rule decides, or else a uniform draw that hits it once in 12.
        expected = 1 - rule.noise * (1 - 1 / 12)
        assert abs(hits / total - expected) < 5 * np.sqrt(expected * (1 - expected) / total)
        first = classes[domain.sequences.items[domain.sequences.offsets[:-1]]]
        expected = 1 - rule.noise * (1 - 2 / 12)
        spread = 5 * np.sqrt(expected * (1 - expected) / len(first))
        assert abs(np.isin(first, rule.entries).mean() - expected) < spread


def test_items_are_drawn_by_their_weights(world):
    source = world.sources[0]
    catalogue = world.catalogues["source0"]
    counts = np.bincount(source.sequences.items, minlength=source.num_items)
    for c in range(world.dynamics.num_classes):
        own = catalogue.classes == c
        expected = counts[own].sum() * catalogue.weights[own] / catalogue.weights[own].sum()
        chi2 = ((counts[own] - expected) ** 2 / expected).sum()
        degrees = own.sum() - 1
        assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


def test_oracle_is_a_distribution_and_right_for_short_histories(world):
    item = {c: int(np.flatnonzero(world.catalogues["target"].classes == c)[0]) for c in range(12)}
    entry, rule = int(world.dynamics.entries[0]), world.dynamics
    then = int(rule.successors[entry, 0])
    third = int(rule.successors[then, rule.phases[entry]])
    items = np.array([item[entry], item[entry], item[then]], np.int32)
    histories = Sequences(np.array([0, 0, 1, 3]), items, 200)
    scores = world.oracle(world.target, histories)
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-12)
    classes = world.catalogues["target"].classes
    mass = np.stack([np.bincount(classes, row) for row in scores])
    noise = rule.noise
    np.testing.assert_allclose(mass[0][rule.entries], (1 - noise) / 2 + noise / 12)
    np.testing.assert_allclose(mass[1][then], 1 - noise + noise / 12)
    np.testing.assert_allclose(mass[2][third], 1 - noise + noise / 12)
    with pytest.raises(ValueError, match="source or the target"):
        world.oracle(world.control, histories)


def test_oracle_probabilities_are_calibrated(crowded):
    # The mean log-probability of what happened is the mean negative entropy of what was predicted.
    split = leave_one_out(crowded.target)
    scores = crowded.oracle(crowded.target, split.test.histories)
    happened = np.log(scores[np.arange(len(scores)), split.test.targets])
    entropy = -(scores * np.log(scores)).sum(1)
    surplus = happened + entropy
    assert abs(surplus.mean()) < 5 * surplus.std() / np.sqrt(len(surplus))


def test_there_is_head_room_above_simple_rankers(world, crowded):
    split = leave_one_out(crowded.target)
    oracle = ndcg_at_10(crowded.oracle(crowded.target, split.test.histories), split.test.targets)
    small = leave_one_out(world.target)
    popular = ndcg_at_10(popularity(small), small.test.targets)
    first_order = ndcg_at_10(transitions(small), small.test.targets)
    assert oracle > 0.36
    assert popular < 0.10
    assert first_order < 0.6 * oracle
    assert first_order > popular


def test_the_rule_carries_over_from_sources_and_not_from_the_control(world, crowded):
    # Dynamics counted on one domain, used on the target by a ranker that knows the classes.
    split = leave_one_out(crowded.target)

    def learned_from(name, sequences):
        counts = contexts(sequences, world.catalogues[name].classes)
        return ndcg_at_10(by_class(world, split, counts), split.test.targets)

    oracle = ndcg_at_10(crowded.oracle(crowded.target, split.test.histories), split.test.targets)
    target = learned_from("target", leave_one_out(world.target).train)
    for i, source in enumerate(world.sources):
        score = learned_from(f"source{i}", source.sequences)
        assert score > 0.98 * oracle
        assert score > target
    assert learned_from("control", world.control.sequences) < 0.25 * oracle


def test_classes_of_the_target_show_in_first_order_counts(world):
    # Which items follow and which precede an item, seen through the main directions of the counts.
    train = leave_one_out(world.target).train
    counts = np.zeros((200, 200))
    for u in range(len(train)):
        np.add.at(counts, (train[u][:-1], train[u][1:]), 1)
    left, size, right = np.linalg.svd(np.sqrt(counts), full_matrices=False)
    profile = np.concatenate([left[:, :12] * size[:12], right[:12].T * size[:12]], axis=1)
    profile /= np.linalg.norm(profile, axis=1, keepdims=True)
    alike = profile @ profile.T
    np.fill_diagonal(alike, -1)
    classes = world.catalogues["target"].classes
    assert (classes[alike.argmax(1)] == classes).mean() > 0.9  # 0.08 by chance


def test_the_control_has_popularity_and_no_order(world):
    sequences = world.control.sequences
    counts = np.zeros((300, 300))
    np.add.at(counts, (sequences.items[:-1], sequences.items[1:]), 1)
    classes = world.catalogues["control"].classes
    by_class = np.zeros((12, 12))
    np.add.at(by_class, (classes[sequences.items[:-1]], classes[sequences.items[1:]]), 1)
    expected = np.outer(by_class.sum(1), by_class.sum(0)) / by_class.sum()
    degrees = 11**2
    assert ((by_class - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)
    popular = np.sort(np.bincount(sequences.items, minlength=300))
    assert popular[-30:].sum() > 3 * popular[:30].sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sources": -1}, "num_sources must be at least 0, got -1"),
        ({"target_items": 11}, "target_items must be at least 12, got 11"),
        ({"num_classes": 5}, "num_classes must be at least 6"),
        ({"max_length": 3}, "max_length must be at least 10, got 3"),
        ({"source_users": 0}, "source_users must be at least 1"),
        ({"noise": 1.1}, "noise must be in"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        synthetic(**options)


def test_smallest():
    world = synthetic(
        num_sources=0, source_users=1, source_items=6, target_users=1, target_items=6, num_classes=6, min_length=1,
        max_length=1,
    )  # fmt: skip
    assert world.sources == ()
    assert world.target.num_interactions == 1
