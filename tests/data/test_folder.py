"""A domain written and read again is the same domain."""

import errno
import json
import os
import shutil
from pathlib import Path

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


def test_what_is_there_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    save_domain(DOMAINS["strings"], folder)
    monkeypatch.setattr("metarec_fast.data.folder.write_all", lambda *_: (_ for _ in ()).throw(full_disk()))
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_domain(DOMAINS["integers"], folder)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(folder)
    assert load_domain(folder).name == "s"
    assert os.listdir(tmp_path) == ["d"]


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failure_at_any_step_leaves_what_was(tmp_path, monkeypatch, call, before):
    folder = tmp_path / "d"
    if before:
        save_domain(DOMAINS["strings"], folder)
    owner = Path if call == "mkdir" else os
    calls = getattr(owner, call)

    def fail(*given, **named):
        if call == "mkdir" and given[0] == tmp_path:
            return calls(*given, **named)
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(owner, call, fail)
    if call == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Read-only"):
        save_domain(DOMAINS["integers"], folder)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == (["d"] if before else [])
    if before:
        assert load_domain(folder, verify=True).name == "s"


def test_the_old_domain_comes_back_when_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    save_domain(DOMAINS["strings"], folder)
    rename = os.rename

    def fail_for_the_new(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        save_domain(DOMAINS["integers"], folder)
    assert load_domain(folder).name == "s"
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("folder", ["foreign", "file"])
def test_what_is_no_domain_is_never_touched(tmp_path, folder):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match=r"holds files but no domain|is a file, expected a folder"):
        save_domain(DOMAINS["strings"], tmp_path / folder)
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "foreign"]


def test_links_to_a_folder_are_followed(tmp_path):
    (tmp_path / "far" / "d").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "d")
    save_domain(DOMAINS["strings"], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_domain(tmp_path / "far" / "d").name == "s"


@pytest.mark.parametrize("name", DOMAINS)
def test_mapped_and_read_are_the_same(tmp_path, name):
    save_domain(DOMAINS[name], tmp_path / "d")
    mapped, read = load_domain(tmp_path / "d", mmap=True), load_domain(tmp_path / "d", mmap=False)
    assert isinstance(mapped.sequences.offsets, np.memmap) and not isinstance(read.sequences.offsets, np.memmap)
    assert not mapped.sequences.offsets.flags.writeable
    for field in ("offsets", "items", "times"):
        mine, theirs = getattr(mapped.sequences, field), getattr(read.sequences, field)
        assert (mine is None and theirs is None) or np.array_equal(mine, theirs)
    for mine, theirs in ((mapped.users, read.users), (mapped.items, read.items)):
        assert mine == theirs
        assert mine.encode(list(mine)).tolist() == list(range(len(mine)))
        assert mine.decode(np.arange(len(mine))[::-1]) == list(theirs)[::-1]


def test_large_domains_are_mapped_of_themselves(tmp_path, monkeypatch):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    assert not isinstance(load_domain(tmp_path / "d").sequences.items, np.memmap)
    monkeypatch.setattr("metarec_fast.data.folder.MAPPED", 20)
    assert isinstance(load_domain(tmp_path / "d").sequences.items, np.memmap)


ARRAYS = ["offsets", "items", "times", "users.utf8", "users.offsets", "items.integers"]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("mmap", [False, True])
def test_damage_is_named(tmp_path, name, mmap):
    folder = tmp_path / "d"
    save_domain(DOMAINS["whole times"], folder)
    path = folder / f"{name}.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-3], b"", whole + b"\0", b"\x80" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"d is damaged: {name}\.npy"):
            load_domain(folder, mmap=mmap)
    path.unlink()
    with pytest.raises(ValueError, match=rf"d is damaged: {name}\.npy"):
        load_domain(folder, mmap=mmap)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_changed_byte_is_found_on_request(tmp_path, name):
    save_domain(DOMAINS["whole times"], tmp_path / "d")
    path = tmp_path / "d" / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_domain(tmp_path / "d", verify=True)


def test_arrays_that_do_not_fit_each_other(tmp_path):
    folder = tmp_path / "d"
    save_domain(DOMAINS["strings"], folder)
    facts = json.loads((folder / "domain.json").read_text())
    other = tmp_path / "e"
    save_domain(
        Domain("e", Sequences(OFFSETS[:2], ITEMS[:3], 3), Vocabulary(["a"]), Vocabulary(["x", "y", "z"])), other
    )
    theirs = json.loads((other / "domain.json").read_text())["arrays"]
    for swapped in (["offsets"], ["items"], ["users.utf8", "users.offsets"]):
        mixed = tmp_path / "mixed"
        shutil.rmtree(mixed, ignore_errors=True)
        shutil.copytree(folder, mixed)
        for name in swapped:
            shutil.copy(other / f"{name}.npy", mixed)
        arrays = facts["arrays"] | {name: theirs[name] for name in swapped}
        (mixed / "domain.json").write_text(json.dumps(facts | {"arrays": arrays}))
        with pytest.raises(ValueError, match="mixed is damaged"):
            load_domain(mixed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "arrays": {"offsets": 3}}', "\0"])
def test_descriptions_that_describe_nothing(tmp_path, text):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    (tmp_path / "d" / "domain.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged|format None"):
        load_domain(tmp_path / "d")


def test_names_in_a_description_do_not_lead_out_of_the_folder(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    shutil.copy(tmp_path / "d" / "items.npy", tmp_path / "outside.npy")
    facts = json.loads((tmp_path / "d" / "domain.json").read_text())
    facts["arrays"]["../outside"] = facts["arrays"]["items"]
    (tmp_path / "d" / "domain.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is damaged"):
        load_domain(tmp_path / "d")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    path = tmp_path / "d" / "items.npy"
    np.save(path, np.array([print], object), allow_pickle=True)
    facts = json.loads((tmp_path / "d" / "domain.json").read_text())
    facts["arrays"]["items"]["bytes"] = path.stat().st_size
    (tmp_path / "d" / "domain.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_domain(tmp_path / "d")


def test_a_missing_description_and_another_format(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    path = tmp_path / "d" / "domain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    with pytest.raises(ValueError, match="format 3, this version reads 2"):
        load_domain(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=r"domain\.json is missing"):
        load_domain(tmp_path / "d")
