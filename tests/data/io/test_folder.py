"""A domain written and read again is the same domain."""

import copy
import errno
import json
import os
import shutil

import numpy as np
import pytest

from metarec_fast.data import Domain, Sequences, Vocabulary, import_file, load_domain, save_domain
from metarec_fast.files import sealed
from tests.killed import killed

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


def test_saving_over_another_domain_is_requested(tmp_path):
    save_domain(DOMAINS["whole times"], tmp_path)
    with pytest.raises(ValueError, match=r"holds a domain already; .*overwrite=True.*'t' of 3 users and 3 items"):
        save_domain(DOMAINS["strings"], tmp_path)
    assert load_domain(tmp_path).name == "t"
    save_domain(DOMAINS["strings"], tmp_path, overwrite=True)
    assert load_domain(tmp_path).sequences.times is None


def test_what_is_there_stays_until_the_new_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "d"
    save_domain(DOMAINS["strings"], folder)
    monkeypatch.setattr("metarec_fast.data.io.folder.write_all", lambda *_: (_ for _ in ()).throw(full_disk()))
    with pytest.raises(OSError, match="No space left on device") as raised:
        save_domain(DOMAINS["integers"], folder, overwrite=True)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(folder)
    assert load_domain(folder).name == "s"
    assert os.listdir(tmp_path) == ["d"]


def describe(folder, manifest):
    """A description that somebody wrote who knows how."""
    del manifest["checksum"]
    (folder / "domain.json").write_bytes(sealed(manifest))
    manifest["checksum"] = None


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("swap", ["exchange", "two renames"])
def test_a_save_that_is_killed_leaves_the_old_domain_or_the_new(tmp_path, monkeypatch, swap):
    if swap == "two renames":
        monkeypatch.setattr("metarec_fast.files._exchange", lambda *_: False)
    folder, seen, at, died = tmp_path / "d", set(), 0, True
    save_domain(DOMAINS["strings"], folder)
    while died:
        at += 5
        died = killed(lambda: save_domain(DOMAINS["integers"], folder, overwrite=True), at)
        seen.add(load_domain(folder, verify=True).name)
        save_domain(DOMAINS["strings"], folder, overwrite=True)
        assert os.listdir(tmp_path) == ["d"]
    assert seen == {"s", "i"} and at > 20


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
    monkeypatch.setattr("metarec_fast.data.io.folder.MAPPED", 20)
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
def test_a_changed_byte_is_found_on_request_and_always_in_arrays_that_are_read(tmp_path, name):
    save_domain(DOMAINS["whole times"], tmp_path / "d")
    path = tmp_path / "d" / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for options in ({}, {"verify": True, "mmap": True}):
        with pytest.raises(ValueError, match=rf"damaged: {name}\.npy has another checksum"):
            load_domain(tmp_path / "d", **options)


@pytest.mark.parametrize("mmap", [False, True])
def test_offsets_that_fall_and_items_outside_the_catalogue_are_found_without_checksums(tmp_path, mmap):
    for name, at, value in (("offsets", 1, 4), ("items", 2, 3), ("items", 0, -1)):
        domain = DOMAINS["strings"]
        arrays = {"offsets": OFFSETS.copy(), "items": ITEMS.copy()}
        arrays[name][at] = value
        bad = Domain("bad", Sequences(**arrays, num_items=3), domain.users, domain.items)
        save_domain(bad, tmp_path / "d", overwrite=True)
        with pytest.raises(ValueError, match=rf"damaged: {name} must"):
            load_domain(tmp_path / "d", mmap=mmap, verify=False)


def test_every_malformed_field_is_named(tmp_path):
    folder = tmp_path / "d"
    path = write_csv(tmp_path / "x.csv")
    import_file(path, folder)
    whole = json.loads((folder / "domain.json").read_text())
    places = [("", key) for key in whole] + [("source", key) for key in whole["source"]]
    places += [("arrays", key) for key in whole["arrays"]]
    for section, key in places:
        values = [True, [[]], {"a": {}}, -1, 1.5, float("nan")] + ([] if section == "arrays" else ["gone"])
        for value in values:
            manifest = copy.deepcopy(whole)
            held = manifest[section] if section else manifest
            if (section, key) == ("source", "tied") and value == 1.5:
                continue  # a number there is
            if value == "gone":
                del held[key]
            else:
                held[key] = value
            describe(folder, manifest) if key != "checksum" else (folder / "domain.json").write_text(
                json.dumps(manifest)
            )
            with pytest.raises(ValueError, match=rf"domain\.json.*{key}"):
                load_domain(folder)


def write_csv(path):
    path.write_text("user_id,item_id,timestamp\na,x,1\na,y,2\nb,x,3\n")
    return path


def test_arrays_that_do_not_fit_each_other(tmp_path):
    folder = tmp_path / "d"
    save_domain(DOMAINS["strings"], folder)
    manifest = json.loads((folder / "domain.json").read_text())
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
        arrays = manifest["arrays"] | {name: theirs[name] for name in swapped}
        describe(mixed, manifest | {"arrays": arrays})
        with pytest.raises(ValueError, match="mixed is damaged"):
            load_domain(mixed)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 3}', '{"format": 3, "arrays": {"offsets": 3}}', "\0"])
def test_descriptions_that_describe_nothing(tmp_path, text):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    (tmp_path / "d" / "domain.json").write_text(text)
    with pytest.raises(ValueError, match=r"is damaged: domain\.json"):
        load_domain(tmp_path / "d")


def test_names_in_a_description_do_not_lead_out_of_the_folder(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    shutil.copy(tmp_path / "d" / "items.npy", tmp_path / "outside.npy")
    manifest = json.loads((tmp_path / "d" / "domain.json").read_text())
    manifest["arrays"]["../outside"] = manifest["arrays"]["items"]
    describe(tmp_path / "d", manifest)
    with pytest.raises(ValueError, match="is damaged"):
        load_domain(tmp_path / "d")


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    path = tmp_path / "d" / "items.npy"
    np.save(path, np.array([print], object), allow_pickle=True)
    manifest = json.loads((tmp_path / "d" / "domain.json").read_text())
    manifest["arrays"]["items"]["bytes"] = path.stat().st_size
    describe(tmp_path / "d", manifest)
    with pytest.raises(ValueError, match=r"is damaged: items\.npy holds \|O"):
        load_domain(tmp_path / "d")


def test_a_missing_description_and_another_format(tmp_path):
    save_domain(DOMAINS["strings"], tmp_path / "d")
    path = tmp_path / "d" / "domain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 3: import or save the domain again"):
        load_domain(tmp_path / "d")
    path.unlink()
    with pytest.raises(ValueError, match=r"domain\.json is missing"):
        load_domain(tmp_path / "d")
