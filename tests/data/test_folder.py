"""A domain written and read again is the same domain."""

import json

import numpy as np
import pytest

from metarec_fast.data import Domain, Sequences, Vocabulary, load_domain, save_domain

OFFSETS, ITEMS = np.array([0, 3, 3, 5], np.int64), np.array([0, 1, 2, 1, 0], np.int32)

DOMAINS = {
    "strings": Domain("s", Sequences(OFFSETS, ITEMS, 3), Vocabulary(["a", "", "ü"]), Vocabulary(["x", "y", "書"])),
    "integers": Domain("i", Sequences(OFFSETS, ITEMS, 3), Vocabulary([5, -1, 2**62]), Vocabulary([2**64 - 1, 0, 7])),
    "mixed": Domain("m", Sequences(OFFSETS, ITEMS, 3), Vocabulary([1, 2, 3]), Vocabulary(["1", "2", "3"])),
    "whole times": Domain(
        "t", Sequences(OFFSETS, ITEMS, 3, np.arange(5) + 2**53), Vocabulary(["a", "b", "c"]), Vocabulary([1, 2, 3])
    ),
    "fractional times": Domain(
        "f", Sequences(OFFSETS, ITEMS, 3, np.arange(5) / 3), Vocabulary(["a", "b", "c"]), Vocabulary([1, 2, 3])
    ),
    "empty": Domain("e", Sequences(OFFSETS[:1], ITEMS[:0], 0), Vocabulary(), Vocabulary()),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_round_trip(tmp_path, name):
    domain = DOMAINS[name]
    save_domain(domain, tmp_path)
    got = load_domain(tmp_path)
    assert got.name == domain.name and got.num_items == domain.num_items
    assert got.users == domain.users and got.items == domain.items
    for field in ("offsets", "items", "times"):
        was, now = getattr(domain.sequences, field), getattr(got.sequences, field)
        if was is None:
            assert now is None
        else:
            assert now.dtype == was.dtype and np.array_equal(now, was)


def test_a_slice_of_larger_arrays_is_saved_as_itself(tmp_path):
    times = np.arange(10)[::2]
    domain = Domain("v", Sequences(OFFSETS, ITEMS, 3, times), DOMAINS["strings"].users, DOMAINS["strings"].items)
    save_domain(domain, tmp_path)
    assert load_domain(tmp_path).sequences.times.tolist() == [0, 2, 4, 6, 8]


def test_saving_over_another_domain(tmp_path):
    save_domain(DOMAINS["whole times"], tmp_path)
    save_domain(DOMAINS["strings"], tmp_path)
    assert load_domain(tmp_path).sequences.times is None


def test_a_folder_is_whole_only_when_its_description_is_there(tmp_path, monkeypatch):
    save_domain(DOMAINS["strings"], tmp_path)
    monkeypatch.setattr("safetensors.numpy.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_domain(DOMAINS["integers"], tmp_path)
    with pytest.raises(ValueError, match=r"domain\.json is missing"):
        load_domain(tmp_path)


def test_damage_is_named(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path)
    path = tmp_path / "domain.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        load_domain(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        load_domain(tmp_path)


def test_another_format_is_refused(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path)
    facts = json.loads((tmp_path / "domain.json").read_text())
    (tmp_path / "domain.json").write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        load_domain(tmp_path)
