"""Files and folders that are whole or as they were, and one process a folder."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest

from metarec_fast import files
from metarec_fast.files import Damaged, Kind, only_here, read_json, replacing, write_atomically
from tests.killed import fails_with_little_room, killed

NOTES = Kind("notebook", "index", owns=lambda name: name in ("index", "page"), describe=lambda _: "notes")


def write(folder, text, *, overwrite=True):
    with replacing(folder, NOTES, overwrite=overwrite) as partial:
        (partial / "page").write_text(text)
        (partial / "index").write_text("page")


def read(folder):
    return (folder / "page").read_text() if NOTES.is_in(folder) else None


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """With the system's exchange of names, and without."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return request.param


def test_a_process_killed_anywhere_leaves_the_old_or_the_new(tmp_path, swap):
    folder, seen = tmp_path / "n", set()
    for at in range(1, 100):
        write(folder, "old")
        (folder / "letter").write_text("not ours")
        died = killed(lambda: write(folder, "new"), at)
        seen.add(read(folder))
        assert read(folder) in ("old", "new") and (folder / "letter").read_text() == "not ours"
        write(folder, "next")  # which clears away what the dead left
        assert os.listdir(tmp_path) == ["n"] and read(folder) == "next"
        if not died:
            break
    assert at > 5 and seen == {"old", "new"} and not died


def test_a_first_save_that_is_killed_leaves_nothing_or_all(tmp_path):
    folder, at, died = tmp_path / "n", 0, True
    while died:
        at += 1
        died = killed(lambda: write(folder, "new"), at)
        assert read(folder) in (None, "new")
        write(folder, "next")
        assert os.listdir(tmp_path) == ["n"]
        (folder / "index").unlink()
        (folder / "page").unlink()
    assert at > 3


def test_a_file_killed_anywhere_is_the_old_or_the_new(tmp_path):
    path, at, died = tmp_path / "f", 0, True
    while died:
        at += 1
        write_atomically(path, b"old")
        died = killed(lambda: write_atomically(path, b"new"), at)
        assert path.read_bytes() in (b"old", b"new")
        write_atomically(path, b"next")
        assert os.listdir(tmp_path) == ["f"]
    assert at > 3


def test_a_full_disk_names_the_path_and_leaves_what_was(tmp_path):
    write(tmp_path / "n", "old")
    write_atomically(tmp_path / "f", b"old")
    reported = fails_with_little_room(lambda: write(tmp_path / "n", "new" * 1000), 100)
    assert str(tmp_path / "n") in reported and "partial" not in reported
    reported = fails_with_little_room(lambda: write_atomically(tmp_path / "f", b"new" * 1000), 100)
    assert reported.endswith(f"'{tmp_path / 'f'}'")
    assert read(tmp_path / "n") == "old" and (tmp_path / "f").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["f", "n"]


def test_the_old_comes_back_when_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    write(tmp_path / "n", "old")
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    rename = os.rename

    def fail_for_the_new(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output error; what was there before is as it was") as raised:
        write(tmp_path / "n", "new")
    assert raised.value.filename == str(tmp_path / "n")
    assert read(tmp_path / "n") == "old" and os.listdir(tmp_path) == ["n"]


def test_what_is_being_written_is_no_leftover(tmp_path):
    with replacing(tmp_path / "n", NOTES, overwrite=True) as partial:
        (partial / "page").write_text("slow")
        (partial / "index").write_text("page")
        write(tmp_path / "n", "quick")
        assert partial.exists() and read(tmp_path / "n") == "quick"
    assert read(tmp_path / "n") == "slow" and os.listdir(tmp_path) == ["n"]


def test_hidden_names_cannot_be_foreseen_and_belong_to_their_owner(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "n", NOTES, overwrite=True) as partial:
            names.add(partial.name)
            assert stat.S_IMODE(partial.stat().st_mode) == 0o700
            (partial / "index").write_text("page")
    assert len(names) == 3
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "n").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_links_are_not_followed_by_writes(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("f", "f.partial"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "f").is_symlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="lock"), only_here(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_leftover_that_is_a_link_is_not_emptied(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis").write_text("years")
    (tmp_path / f".n.partial-{'0' * 16}").symlink_to(tmp_path / "far")
    write(tmp_path / "n", "new")
    assert (tmp_path / "far" / "thesis").read_text() == "years"


def test_names_of_the_greatest_length(tmp_path):
    write(tmp_path / ("n" * 255), "a")
    write_atomically(tmp_path / ("f" * 255), b"a")
    assert len(os.listdir(tmp_path)) == 2


def test_one_process_a_folder(tmp_path):
    with (
        only_here(tmp_path),
        pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "),
        only_here(tmp_path),
    ):
        pass
    code = (
        f"from metarec_fast.files import only_here\nfrom pathlib import Path\nwith only_here(Path({str(tmp_path)!r})):"
    )
    code += "\n print('in', flush=True)\n input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=rf"in use by process {other.pid} on "), only_here(tmp_path):
        pass
    other.kill()
    other.wait()
    with only_here(tmp_path):  # released by its death
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"\xff\xfe{", "no JSON"),
        (b"{", "no JSON"),
        (b"9" * 10_000, "no JSON"),
    ],
    ids=["deep", "no UTF-8", "cut", "long number"],
)
def test_what_is_no_json_is_named(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(Damaged, match=rf"^a\.json .*{words}"):
        read_json(tmp_path, "a.json")


def test_only_files_of_the_folder_itself_are_read(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "outside").write_text(json.dumps({}))
    (tmp_path / "d" / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(tmp_path / "d" / "pipe")
    for name, words in (("link", "leads out"), ("../outside", "leads out"), ("pipe", "not a file"), ("no", "missing")):
        with pytest.raises(Damaged, match=words):
            read_json(tmp_path / "d", name)
