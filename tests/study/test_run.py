"""Cells are files that are whole or absent: a study goes on where it was stopped, however it was stopped."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from metarec_fast import study as studies
from metarec_fast.api import MetaRec
from metarec_fast.config import Config
from metarec_fast.data import leave_one_out, limit_users
from metarec_fast.evaluation import best_baseline, evaluate
from metarec_fast.files import only_here
from metarec_fast.study import Arm, Cell, Domains, Study, run
from metarec_fast.study.grid import FORMAT
from metarec_fast.study.run import AMONG_ALL, RANKS, _load, cell_path, late_means, run_cell, sources_of
from metarec_fast.train.stop import Interrupted
from tests.study.problems import ARMS, study
from tests.tiny import DOMAINS


def small(**changes):
    return study(**{"fractions": (0.5,), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    reported = []
    assert run(small(), out, on_cell=lambda *given: reported.append(given)) == []
    return out, reported


def written(out):
    return {path.name: path.read_bytes() for path in (out / "cells").iterdir()}


def comparable(out):
    """Cells without what differs from run to run: their cost."""
    found = {}
    for path in (out / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        del record["cost"]
        for timed in (record.get("history", {}), *record.get("tried", ())):
            timed.pop("seconds", None)
        found[path.name] = record, np.load(path.with_suffix(".npy")).tolist()
    return found


def test_every_cell_is_reported_and_written(finished):
    out, reported = finished
    assert [(done, total) for *_, done, total in reported] == [(i + 1, 10) for i in range(10)]
    assert len(written(out)) == 20  # record and ranks of each
    assert json.loads((out / "study.json").read_text())["name"] == "tiny"
    for _, record, *_ in reported:
        cost = record["cost"]
        assert cost["seconds"] > 0 and cost["cpu_seconds"] > 0
        assert cost["peak_memory_mib"] > 50 if sys.platform == "linux" else cost["peak_memory_mib"] is None
    assert [record["cost"]["steps"] for _, record, *_ in reported[:5]] == [0, 0, 29, 29, 29]
    encoder = {"warmup": 3, "meta": 10, "finetune table": 3, "finetune": 3}
    cooccurrence = {"co-occurrence: sources": 4, "co-occurrence: meta": 2, "co-occurrence: target": 4}
    assert reported[3][1]["cost"]["steps_by_stage"] == encoder | cooccurrence


def test_a_cell_is_what_the_library_gives(finished):
    _, reported = finished
    record = {cell.arm.name: f for cell, f, *_ in reported if cell.seed == 1}
    config = Config.from_json(json.dumps(record["ours"]["config"]))
    assert config.train.seed == 1 and config.data.target_fraction == 0.5
    model = MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=config)
    assert record["ours"]["valid"] == model.evaluate("valid")["ndcg@10"]
    for mask in (False, True):
        known = json.loads(json.dumps(model.evaluate(mask_history=mask).to_dict()))
        assert record["ours"]["test"]["history masked" if mask else "history not masked"] == known
    split = limit_users(leave_one_out(DOMAINS.target), 0.5, seed=1)
    name, scorer, _ = best_baseline(split, mask_history=False)
    assert record["best-baseline"]["baseline"] == name
    known = evaluate(scorer, split.test, mask_history=False, protocol="", catalogue=split.trained_items)
    everywhere = evaluate(scorer, split.test, mask_history=False, protocol="")
    reported = record["best-baseline"]["test"]["history not masked"]
    assert reported["metrics"]["ndcg@10"] == known["ndcg@10"] and record["best-baseline"]["catalogue"] == "training"
    assert reported["among_all"]["metrics"]["ndcg@10"] == everywhere["ndcg@10"]


def test_ranks_of_every_user_are_kept(finished):
    out, reported = finished
    cell, record, *_ = reported[3]
    path = cell_path(out, small(), cell, Domains())
    names = [*RANKS, *AMONG_ALL]
    ranks = dict(zip(names, np.load(path.with_suffix(".npy")), strict=True))
    assert ranks["users"].tolist() == list(range(40))
    assert (ranks["greater, history masked"] <= ranks["greater"]).all()
    assert (ranks["greater"] <= ranks["greater, all items"]).all()
    assert record["ranks"] == names


def test_a_cell_that_ranks_all_items_has_no_figures_beside(tmp_path):
    """Five rows of ranks; and it is another cell than one of the training catalogue."""
    every = small(options={**small().options, "data": {"catalogue": "all"}})
    cell = Cell(ARMS[0], "target", 0.5, 0)
    assert run(every, tmp_path, cells=[cell]) == []
    path = cell_path(tmp_path, every, cell, Domains())
    record = json.loads(path.read_text())
    assert np.load(path.with_suffix(".npy")).shape == (5, 40) and "among_all" not in record["test"]["history masked"]
    options = [dataclasses.asdict(config) for config in every.configs(cell)]
    hashed = {"format": FORMAT, "baseline": "popularity", "configs": options, "target": record["data"]["target"]}
    hashed |= {"kinds": (), "sources": []}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    assert record["config_hash"] == digest[:16] != cell_path(tmp_path, small(), cell, Domains()).stem[-16:]


def test_finished_cells_are_not_run_again(finished, monkeypatch):
    out, _ = finished
    before = written(out)
    monkeypatch.setattr(studies.run.__globals__["run_cell"], "__code__", (lambda *a, **k: 1 / 0).__code__)
    assert run(small(), out) == []
    assert written(out) == before


def test_another_configuration_is_another_cell(finished, tmp_path):
    out, _ = finished
    cell = Cell(ARMS[3], "target", 0.5, 0)
    other = small(tune={"model.dropout": (0.1,)})
    assert cell_path(out, small(), cell, Domains()) != cell_path(out, other, cell, Domains())


def test_a_stopped_run_goes_on(finished, tmp_path):
    queries = iter(range(40))  # in the middle of the training of an arm
    with pytest.raises(Interrupted):
        run(small(), tmp_path, should_stop=lambda: next(queries, None) is None)
    partly = written(tmp_path)
    assert 0 < len(partly) < 20 and not [name for name in partly if name.endswith(".partial")]
    assert run(small(), tmp_path) == []
    assert partly.items() <= written(tmp_path).items()
    assert comparable(tmp_path) == comparable(finished[0])


def test_a_killed_run_leaves_nothing_half_written_and_goes_on(finished, tmp_path):
    (tmp_path / "s.json").write_text(small().to_json())
    command = [sys.executable, "-m", "metarec_fast", "study", str(tmp_path / "s.json"), f"--out={tmp_path}"]
    process = subprocess.Popen([*command, "--processes=2"], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until and len(list(tmp_path.glob("cells/*.json"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.wait()
    for path in tmp_path.glob("cells/*.json"):
        assert json.loads(path.read_text())["format"] == FORMAT
        assert np.load(path.with_suffix(".npy")).shape == (9, 40)
    assert run(small(), tmp_path) == []
    assert comparable(tmp_path) == comparable(finished[0])


def test_processes_give_the_same_cells(finished, tmp_path):
    reported = []
    assert run(small(), tmp_path, processes=2, on_cell=lambda *given: reported.append(given)) == []
    assert sorted(done for *_, done, _ in reported) == list(range(1, 11))
    assert comparable(tmp_path) == comparable(finished[0])


def test_processes_stop_on_request(tmp_path):
    slow = small(options={"train": {"finetune_steps": 10**6, "patience": 10**6, "batch_size": 4, "threads": 1}})
    started = time.monotonic()
    with pytest.raises(Interrupted):
        run(slow, tmp_path, processes=2, should_stop=lambda: time.monotonic() > started + 1)
    assert time.monotonic() < started + 60


def test_a_cell_that_fails_is_reported_and_tried_again(tmp_path):
    bad = Arm(name="bad", group="ours", options={"train": {"device": "cuda:99"}})  # not here
    failures = run(small(arms=(bad, ARMS[0]), comparisons=()), tmp_path)
    assert [str(cell) for cell, _ in failures] == ["target 0.5 bad seed 0", "target 0.5 bad seed 1"]
    assert "ValueError: train.device is 'cuda:99'" in failures[0].reason
    assert {name.split("-")[2] for name in written(tmp_path)} == {"popularity"}


def test_tuning_is_by_validation_and_all_of_it_is_cost():
    tuned = small(tune={"train.lr": (1e-2, 1e-9)})
    record, _ = run_cell(tuned, Cell(ARMS[2], "target", 0.5, 0), Domains())
    tried = {t["config"]["train"]["lr"]: t["valid_ndcg@10"] for t in record["tried"]}
    assert len(tried) == 2
    assert record["valid"] == max(tried.values()) == tried[record["config"]["train"]["lr"]]
    assert record["cost"]["steps"] == 2 * 29


def test_sources_of_every_kind():
    kinds = Arm(name="all", group="control", sources=("related", "shuffled", "random", "copy"))
    whole = study(arms=(kinds,), comparisons=())
    names = [d.name for d in sources_of(whole, Cell(kinds, "target", 1.0, 0), Domains())]
    assert names == [
        *("source0", "source1", "source0 shuffled", "source1 shuffled"),
        *("source0 random", "source1 random", "target copy"),
    ]
    assert sources_of(whole, Cell(ARMS[2], "target", 1.0, 0), Domains()) == []


def test_a_copy_has_none_of_the_users_that_the_target_counts():
    kinds = Arm(name="copies", group="control", sources=("copy",))
    plan = study(arms=(kinds,), comparisons=())
    target = Domains().load(plan, "target")
    for fraction, others in ((0.25, 0.75), (1.0, 1.0)):  # of a whole target, no user would be left
        (copy,) = sources_of(plan, Cell(kinds, "target", fraction, 1), Domains())
        assert copy.num_users == round(others * target.num_users)
        counted = limit_users(leave_one_out(target), fraction, seed=1).train.lengths > 0
        events = int(target.sequences.lengths[~counted if fraction < 1 else counted].sum())
        assert copy.num_interactions == events


@pytest.mark.parametrize(("fraction", "data"), [(0.99, {}), (0.25, {"split": "time"})], ids=["nobody left", "time"])
def test_a_copy_is_whole_where_it_cannot_be_less(fraction, data):
    """A cut in time would fall elsewhere without the users who are counted, and reach into validation's time."""
    kinds = Arm(name="copies", group="control", sources=("copy",), options={"data": data})
    plan = study(arms=(kinds,), comparisons=())
    (copy,) = sources_of(plan, Cell(kinds, "target", fraction, 1), Domains())
    assert copy.num_users == Domains().load(plan, "target").num_users


def test_files_are_found_by_name_and_ties_shuffled(tmp_path):
    rows = "".join(f"u{u},i{(u + t) % 9},{t // 3}\n" for u in range(8) for t in range(9))
    (tmp_path / "shop.csv").write_text("who,item_id,timestamp\n" + rows)
    where = Domains(tmp_path, (("user", "who"),))
    plain = study(targets=("shop",), sources=(), synthetic=None, arms=ARMS[:1], comparisons=())
    shuffled = dataclasses.replace(plain, shuffle_ties=True)
    first, second = (where.load(s, "shop").sequences for s in (plain, shuffled))
    assert first.items.tolist() != second.items.tolist()
    assert first.times.tolist() == second.times.tolist()
    assert where.fingerprint(plain, "shop") != where.fingerprint(shuffled, "shop")
    with pytest.raises(ValueError, match="domain 'none' is neither a file"):
        where.load(plain, "none")
    with pytest.raises(ValueError, match="synthetic domains are source0"):
        Domains().load(study(), "none")
    _load.cache_clear()


def test_means_over_the_later_half_of_a_trace():
    trace = [{"weight": {"a": w, "b": 1 - w}, "similarity": {"a": 0.0, "b": 0.0}} for w in (0.0, 0.1, 0.4, 0.6)]
    assert late_means(trace)["weight"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert late_means([]) == {}


def test_processes_must_be_positive(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        run(small(), tmp_path, processes=0)
    assert signal.getsignal(signal.SIGINT) is before
    assert os.listdir(tmp_path) == []


def test_tables_of_others_are_not_replaced(tmp_path):
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"holds results.csv and no study; --overwrite \(overwrite=True\) replaces it"):
        run(small(), tmp_path)
    assert os.listdir(tmp_path) == ["results.csv"] and (tmp_path / "results.csv").read_text() == "mine"


def test_a_folder_of_another_study_is_refused_and_left(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    other = dataclasses.replace(small(), targets=("source0",), comparisons=())
    with pytest.raises(ValueError, match=r"holds another study already: targets target, not source0; --overwrite"):
        run(other, tmp_path / "out", cells=[])
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert run(other, tmp_path / "out", cells=[], overwrite=True) == []
    assert written(tmp_path / "out") == written(finished[0])  # cells stay
    assert Study.load(tmp_path / "out" / "study.json").targets == ("source0",)


def test_one_process_at_a_time_in_a_study(tmp_path):
    with only_here(tmp_path), pytest.raises(ValueError, match="is in use by process"):
        run(small(), tmp_path, cells=[])


def test_cells_of_another_format_are_refused(tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "target-0.5-popularity-0-abc.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match=r"abc.json is a cell of format 1, this version has 2"):
        run(study(), tmp_path)
