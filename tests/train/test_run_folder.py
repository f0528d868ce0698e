"""A run folder is of one run: what it refuses, what goes on, and by what it tells data apart."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from metarec_fast import MetaRec
from metarec_fast.data import Domain, Sequences, Vocabulary
from metarec_fast.data.identity import identity
from metarec_fast.files import only_here
from metarec_fast.train import run_folder
from metarec_fast.train.stop import Interrupted
from tests.tiny import DOMAINS, config

SOURCE, TARGET = DOMAINS.sources[0], DOMAINS.target
QUICK = config(
    model={"cooccurrence": "none"}, train={"warmup_steps": 1, "meta_steps": 1, "finetune_steps": 2, "batch_size": 4}
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what its folder holds."""
    folder = tmp_path_factory.mktemp("run")
    MetaRec.fit(SOURCE, TARGET, config=QUICK, run_dir=folder)
    return folder, held(folder)


def held(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fit(folder, source=SOURCE, target=TARGET, options=QUICK, **more):
    return MetaRec.fit(source, target, config=options, run_dir=folder, **more)


def changed(domain, **changes):
    return dataclasses.replace(domain, **changes)


def moved(domain, **arrays):
    return changed(domain, sequences=dataclasses.replace(domain.sequences, **arrays))


def halved(domain):
    s, users = domain.sequences, len(domain.users) // 2
    end = s.offsets[users]
    times = None if s.times is None else s.times[:end]
    part = Sequences(s.offsets[: users + 1], s.items[:end], s.num_items, times)
    return changed(domain, sequences=part, users=Vocabulary(list(domain.users)[:users]))


def resorted(domain):
    items = domain.sequences.items.copy()
    items[:2] = items[1::-1]
    if items[0] == items[1]:
        items[0] = (items[0] + 1) % domain.num_items
    return moved(domain, items=items)


def renumbered(domain, role):
    return changed(domain, **{role: Vocabulary(list(getattr(domain, role))[::-1])})


OTHER = {
    "another name": (lambda d: changed(d, name="other"), "'other'.*was '{name}'"),
    "half of the users": (halved, "{name}' has other events than before: .* users, was"),
    "another order": (resorted, "{name}' has other events than before, or the same in another order"),
    "other user ids": (lambda d: renumbered(d, "users"), "{name}' has other user ids"),
    "other item ids": (lambda d: renumbered(d, "items"), "{name}' has other item ids"),
}


@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("role", ["source", "target"])
def test_other_data_does_not_resume(run, what, role):
    folder, before = run
    change, words = OTHER[what]
    domain = SOURCE if role == "source" else TARGET
    with pytest.raises(ValueError, match=role + ".*" + words.format(name=domain.name)):
        fit(folder, **{role: change(domain)}, resume=True)
    assert held(folder) == before


@pytest.mark.parametrize("what", OTHER)
def test_checkpoints_tell_too(run, what, tmp_path):
    """Also where nothing else in the folder does."""
    (tmp_path / "run").mkdir()
    os.symlink(run[0] / "checkpoint", tmp_path / "run" / "checkpoint")
    with pytest.raises(
        ValueError, match="belongs to other domains: source.*" + OTHER[what][1].format(name=SOURCE.name)
    ):
        fit(tmp_path / "run", source=OTHER[what][0](SOURCE), resume=True)


def test_times_count_where_they_are_read():
    later = moved(TARGET, times=TARGET.sequences.times + 1)
    for split, other in (("leave_one_out", False), ("time", True)):
        options = config(data={"split": split})
        now, before = (run_folder.data_of([], domain, options) for domain in (later, TARGET))
        assert (run_folder.other_data(now, before) is not None) == other


def test_options_that_matter_are_named_and_others_are_free(run):
    folder, before = run
    with pytest.raises(ValueError, match=r"another configuration: train\.lr is 0\.5, was 0\.01"):
        fit(folder, options=QUICK.replace(train={"lr": 0.5}), resume=True)
    assert held(folder)[folder / "model" / "model.safetensors"] == before[folder / "model" / "model.safetensors"]
    for option in ({"threads": 1}, {"compile": True}, {"compare_target_only": False}):
        assert run_folder.other_options(QUICK.replace(train=option), dataclasses.asdict(QUICK)) is None


@pytest.mark.parametrize("target", ["target", "other"])
def test_a_finished_run_is_not_overwritten_unless_requested(run, target):
    folder, _ = run
    before = held(folder)
    reported = (
        r"holds a run already: target 'target', method metarec, sources source0, finished 20.*--overwrite.*--resume"
    )
    with pytest.raises(ValueError, match=reported):
        fit(folder, target=changed(TARGET, name=target))
    assert held(folder) == before


def test_overwriting_replaces_the_run_and_leaves_other_files(tmp_path):
    fit(tmp_path)
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "log.jsonl").write_text("{}\n")
    stop = iter(range(1))
    other = changed(TARGET, name="other")
    with pytest.raises(Interrupted):
        fit(tmp_path, target=other, overwrite=True, should_stop=lambda: next(stop, None) is None)
    assert MetaRec.from_pretrained(tmp_path / "model").domain.name == "target"  # until the new one is whole
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "target_only").exists()
    assert json.loads((tmp_path / "run.json").read_text())["finished"] is None
    with pytest.raises(ValueError, match=r"target 'other', .*not finished"):
        fit(tmp_path, target=other)
    fit(tmp_path, target=other, resume=True)
    assert MetaRec.from_pretrained(tmp_path / "model").domain.name == "other"
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    "name", ["checkpoint/best.pt", "checkpoint", "model/weights.bin", "joint/model/x", "config.json"]
)
@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_files_of_others_are_neither_removed_nor_replaced(tmp_path, name, flags):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="which is of no run; move it away, or give another folder"):
        fit(tmp_path, **flags)
    assert held(tmp_path) == {path: b"mine"}


def test_overwriting_leaves_nothing_of_the_run_within_a_run(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "metarec")
    MetaRec.from_pretrained(folder / "model").adapt(SOURCE, run_dir=tmp_path, overwrite=True)
    assert not (tmp_path / "metarec").exists()


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_word_is_no_consent(run, flag):
    folder, before = run
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got 'no'; did you mean False"):
        fit(folder, **{flag: "no"})
    assert held(folder) == before


def test_both_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one"):
        fit(tmp_path, resume=True, overwrite=True)


def test_a_run_that_had_nothing_to_keep_starts_again(tmp_path):
    about = run_folder.claimed(
        tmp_path, "fit", "metarec", run_folder.data_of([], TARGET, QUICK), resume=False, overwrite=False
    )
    with pytest.raises(RuntimeError), about:
        raise RuntimeError("died before its first checkpoint")
    assert run_folder.describe(tmp_path) is None
    fit(tmp_path)


def test_one_process_a_run_folder(tmp_path):
    with only_here(tmp_path), pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on"):
        fit(tmp_path)
    assert os.listdir(tmp_path) == []


def test_adapting_another_model_does_not_resume(run, tmp_path):
    model = MetaRec.from_pretrained(run[0] / "model")
    shop = changed(SOURCE, name="shop")
    model.adapt(shop, run_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run already: target 'shop'"):
        model.adapt(shop, run_dir=tmp_path)
    model.adapt(shop, run_dir=tmp_path, resume=True)
    next(iter(model.model.shared.parameters())).data.add_(1)
    with pytest.raises(ValueError, match="the model that is adapted was another one"):
        model.adapt(shop, run_dir=tmp_path, resume=True)


def test_identity_tells_integers_from_strings_and_is_kept():
    s = Sequences(np.array([0, 2]), np.array([0, 1], np.int32), 2)
    numbers, strings = (Domain("d", s, Vocabulary(["u"]), Vocabulary(ids)) for ids in ([1, 2], ["1", "2"]))
    assert identity(numbers)["items"] != identity(strings)["items"]
    assert identity(numbers)["events"] == identity(strings)["events"]
    assert identity(numbers) == identity(Domain("d", s, Vocabulary(["u"]), Vocabulary([1, 2])))
