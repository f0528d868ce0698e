"""What is made of the cells: a tidy file, comparisons that are paired, pooled and adjusted, and words."""

import csv
import dataclasses
import json
import tarfile
from statistics import mean
from xml.etree import ElementTree

import numpy as np
import pytest

from metarec_fast.config import Config
from metarec_fast.evaluation import Difference, holm, paired_bootstrap
from metarec_fast.study import (
    Arm,
    Comparison,
    Contrast,
    Results,
    audit_study,
    audit_verdict,
    consistent,
    preset,
    run,
)
from metarec_fast.study.results import COLUMNS, contrast_table, summary
from tests.study.problems import study
from tests.tiny import config


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert run(study(), folder) == []
    return folder


def test_the_tidy_file_has_a_whole_row_for_every_cell(out):
    files = {path.name for path in Results(study(), out).write()}
    assert files == {"results.csv", "comparisons.csv", "tables.md", "gains.svg", "target.svg"}
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 20
    assert all(value != "" for row in rows for value in row.values())
    keys = {(r["arm"], r["target"], float(r["fraction"]), int(r["seed"])) for r in rows}
    assert keys == {(c.arm.name, c.target, c.fraction, c.seed) for c in study().cells()}
    for row in rows:
        record = json.loads((out / row["file"]).read_text())
        assert row["config_hash"] == record["config_hash"] and row["code_version"] == record["code_version"]
        assert row["data_hash"].split("+") == list(record["data"].values())
        assert len(record["data"]) == (3 if row["group"] in ("ours", "control") else 1)
        for column, mask in (("ndcg@10", "history not masked"), ("recall@10_masked", "history masked")):
            assert float(row[column]) == record["test"][mask]["metrics"][column.removesuffix("_masked")]
    for name in ("gains.svg", "target.svg"):
        ElementTree.parse(out / name)


def test_values_of_users_give_the_figures_of_the_row(out):
    results = Results(study(), out)
    for row in results.rows():
        for column in COLUMNS[5:13]:
            values = results.per_user(row["arm"], row["target"], row["fraction"], row["seed"], column=column)
            assert len(values) == 40 and values.mean() == pytest.approx(row[column])


def cold_study(catalogue):
    """Baselines of a target of which training holds few items."""
    data = {"catalogue": catalogue}
    changed = {"target_items": 200, "target_users": 100, "source_users": 60, "source_items": 40}
    arms = tuple(Arm(name=f, group="baseline", baseline=f, options={"data": data}) for f in ("popularity", "item-kNN"))
    against = (Comparison(arm="item-kNN", against=("popularity",)),)
    return study(arms=arms, comparisons=against, fractions=(0.1,), seeds=(0,), synthetic=changed)


def test_tables_and_comparisons_say_what_was_ranked(tmp_path):
    plan = cold_study("training")
    assert run(plan, tmp_path) == []
    results = Results(plan, tmp_path)
    for row in results.rows():
        assert row["catalogue"] == "training" and row["targets_outside"] > 0
    comparison = plan.comparisons[0]
    (own,) = results.contrasts(comparison, samples=50)
    (everywhere,) = results.contrasts(comparison, column="ndcg@10_all_items", samples=50)
    figures = {row["arm"]: row for row in results.rows()}
    assert own.arm_mean == pytest.approx(figures["item-kNN"]["ndcg@10"])
    assert everywhere.arm_mean == pytest.approx(figures["item-kNN"]["ndcg@10_all_items"])
    text = results.markdown([(comparison, [own])])
    assert "ranked are the items of training events, another target is a miss" in text
    assert "## NDCG@10, history not masked, among all items" in text
    # an arm that ranks all items is compared with another by what both ranked
    mixed = dataclasses.replace(plan, arms=(plan.arms[0], cold_study("all").arms[1]))
    assert run(mixed, tmp_path) == []
    (between,) = Results(mixed, tmp_path).contrasts(comparison, samples=50)
    assert between.baseline_mean == everywhere.baseline_mean and between.arm_mean > 0


def test_a_contrast_pools_seeds_by_user(out):
    results = Results(study(), out)
    against, baselines = (results.contrasts(c, samples=500) for c in study().comparisons)
    assert [(c.fraction, c.arm, c.baseline, c.seeds) for c in against] == [
        (0.5, "ours", "alone", 2),
        (1.0, "ours", "alone", 2),
    ]
    for contrast in against:
        a, b = (
            np.mean([results.per_user(arm, "target", contrast.fraction, s) for s in (0, 1)], axis=0)
            for arm in ("ours", "alone")
        )
        assert contrast.difference == paired_bootstrap(a, b, seed=0, samples=500)
        assert contrast.gain == pytest.approx(a.mean() / b.mean() - 1)
    assert [c.p for c in against] == holm([c.difference.p for c in against]).tolist()
    for contrast in baselines:  # the one that validation likes best, whatever the test says
        best = max(
            ("popularity", "best-baseline"), key=lambda n: mean(results.values(n, "target", contrast.fraction, valid))
        )
        assert contrast.baseline == best


def valid(record):
    return record["valid"]


def test_a_baseline_that_misses_a_seed_gives_way(out, monkeypatch):
    results = Results(study(), out)
    comparison = study().comparisons[1]
    liked = results.baseline(comparison, "target", 0.5)
    (other,) = set(comparison.against) - {liked}
    monkeypatch.delitem(results.records, (liked, "target", 0.5, 1))
    assert results.baseline(comparison, "target", 0.5) == other
    monkeypatch.delitem(results.records, (other, "target", 0.5, 0))
    assert results.baseline(comparison, "target", 0.5) == liked


def test_what_is_missing_is_left_open(out, tmp_path):
    some = study().only(arms=["ours", "alone"], seeds=[0], fractions=[0.5])
    run(study(), tmp_path, cells=some.cells())
    results = Results(study(), tmp_path)
    assert (len(results.records), results.expected, results.complete) == (2, 20, False)
    assert [(c.fraction, c.seeds) for c in results.contrasts(study().comparisons[0], samples=50)] == [(0.5, 1)]
    assert results.contrasts(study().comparisons[1]) == []
    results.write()
    assert "2 of 20 cells" in (tmp_path / "tables.md").read_text()
    assert "No cell is finished" in Results(study(), tmp_path / "none").markdown([])
    # a target of which nothing is compared yet has no curve
    two = dataclasses.replace(study(), targets=("target", "source0"), sources=("source1",))
    run(two, tmp_path / "two", cells=two.only(targets=["target"], arms=["ours", "alone"], seeds=[0]).cells())
    assert {p.name for p in Results(two, tmp_path / "two").write() if p.suffix == ".svg"} == {"gains.svg", "target.svg"}
    # cells of another configuration are none of this study's
    other = study(tune={"model.dropout": (0.1,)})
    assert {record["arm"]["group"] for record in Results(other, out).records.values()} == {"baseline"}


def test_an_archive_holds_all_that_the_tables_need(out, tmp_path):
    results = Results(study(), out)
    archive = results.archive()
    assert archive == out / "cells.tar.xz"
    assert archive.stat().st_size < sum(path.stat().st_size for path in (out / "cells").iterdir()) / 5
    with tarfile.open(archive) as tar:
        assert len(tar.getnames()) == 2 * len(results.records)
        tar.extractall(tmp_path, filter="data")
    unpacked = Results(study(), tmp_path)
    for wrote, again in zip(results.write(), unpacked.write(), strict=True):
        assert wrote.name == again.name and wrote.read_bytes() == again.read_bytes()
    assert all(record["ranks_up_to"] == 10 for record in unpacked.records.values())
    reported = []
    assert (
        run(study(), tmp_path, on_cell=lambda *args: reported.append(args)) == [] and reported == []
    )  # nothing left to run
    assert Results(study(), tmp_path).archive().read_bytes() == archive.read_bytes()


@pytest.mark.parametrize("text", ["{", "{}", "[]", "null", '{"data": 1}'])
def test_a_damaged_cell_is_named(out, tmp_path, text):
    (tmp_path / "cells").mkdir()
    name = next((out / "cells").glob("*-ours-0-*.json")).name
    (tmp_path / "cells" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is damaged; remove it"):
        Results(study(), tmp_path)


def test_markdown_has_every_arm_metric_cost_and_verdict(out):
    results = Results(study(), out)
    text = results.markdown([(c, results.contrasts(c, samples=50)) for c in study().comparisons])
    for heading in ("NDCG@10, history not masked", "Recall@10, history masked", "Cost: seconds", "Weights of sources"):
        assert f"## {heading}" in text
    for arm in study().arms:
        assert text.count(f"| {arm.name} | ") >= 8
    assert "### ours against baselines" in text and "| target, 50% | alone |" in text
    weights = results.source_means("ours", "target", 0.5, "weight")
    assert sum(weights.values()) == pytest.approx(1)
    assert f"- ours, target, 50%: source0 {weights['source0']:.3f}, source1 {weights['source1']:.3f}" in text
    assert "different code versions" not in text


def test_weights_of_sources_are_those_of_the_cooccurrence_or_else_of_the_encoder(out, monkeypatch):
    results = Results(study(), out)
    record = results.records["ours", "target", 0.5, 0]
    of_encoder = record["transfer"]["weight"]
    cooccurrence = {"source0": {"weight": 0.75, "similarity": 0.5}, "source1": {"weight": 0.25, "similarity": -0.5}}
    for history, expected in (
        ({}, of_encoder),
        ({"cooccurrence": {"sources": cooccurrence}}, {"source0": 0.75, "source1": 0.25}),
    ):
        monkeypatch.setattr(results, "records", {("ours", "target", 0.5, 0): record | {"history": history}})
        assert results.source_means("ours", "target", 0.5, "weight") == expected
    assert results.source_means("ours", "target", 0.5, "similarity") == {"source0": 0.5, "source1": -0.5}


def made(gain, p, fraction=0.1, baseline="b"):
    return Contrast("t", fraction, "a", baseline, 3, 0.1 * (1 + gain), 0.1, Difference(0.1 * gain, 0, 0, p), p)


def without(contrast, reason="9.0 of 40 targets are expected among the first 10"):
    return dataclasses.replace(contrast, p=1.0, no_verdict=reason)


def test_a_cell_without_a_verdict_is_neither_won_nor_lost():
    open_ = [without(made(gain, 0.001)) for gain in (0.5, -0.5)]
    assert not any(c.wins or c.loses or c.clear for c in open_)
    text = summary([*open_, made(0.2, 0.01)])
    assert text.startswith("Wins 1 and loses 0 of 3 cells with p < .05, 2 without a verdict; mean gain")
    table = contrast_table(open_[:1])
    assert "no verdict: 9.0 of 40 targets" in table and "0.0010" not in table


def test_ties_and_few_cases_leave_a_contrast_open(out, monkeypatch, tmp_path):
    results = Results(study(), out)
    first = study().comparisons[0]
    ranks = {
        "ours": np.stack((np.zeros(40, int), np.full(40, 30))),
        "alone": np.stack((np.full(40, 5), np.zeros(40, int))),
    }
    monkeypatch.setattr(results, "_ranks", lambda arm, *_, **__: ranks[arm])
    for contrast in results.contrasts(first, samples=200):
        assert contrast.difference.p < 0.05 and contrast.p == 1 and not contrast.loses
        assert contrast.no_verdict.startswith("the order of ties alone moves the difference")
    ranks["ours"] = np.stack((np.where(np.arange(40) < 9, 0, 30), np.zeros(40, int)))
    ranks["alone"] = np.full((2, 40), (30,)) * np.array([[1], [0]])
    assert "9.0 of 40 targets" in results.contrasts(first, samples=200)[0].no_verdict
    monkeypatch.setattr(results, "out", tmp_path)
    monkeypatch.setattr(results, "rows", list)
    results.study = dataclasses.replace(study(), comparisons=(first,))
    results.write()
    with open(tmp_path / "comparisons.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert row["p"] == row["p_holm"] == "" and row["wins"] == "False" and "9.0 of 40" in row["no_verdict"]


def test_cells_tell_of_steps_left_out_and_get_no_verdict_where_a_stage_did_not_run(out, monkeypatch):
    results = Results(study(), out)
    key = ("ours", "target", 0.5, 1)
    history = results.records[key]["history"] | {"skipped_steps": 12, "stages_not_run": ["meta"]}
    monkeypatch.setitem(results.records, key, results.records[key] | {"history": history})
    half, whole = results.contrasts(study().comparisons[0], samples=50)
    assert half.no_verdict == "no step of meta was finite in ours, seed 1" != whole.no_verdict
    assert "12 of ours on target, 50%, seed 1" in results.markdown([])
    assert [row["skipped_steps"] for row in results.rows() if row["skipped_steps"]] == [12]


def test_consistent_needs_most_wins_and_no_loss():
    win, tie, loss = made(0.2, 0.01), made(0.01, 0.5), made(-0.02, 0.6)
    assert consistent([win] * 4 + [tie])
    assert not consistent([win] * 3 + [tie] * 2)  # 60 %
    assert not consistent([win] * 9 + [loss])
    assert consistent([win] * 9 + [made(-0.009, 0.6)])
    assert not consistent([made(0.2, 0.06)]) and not consistent([])
    text = summary([win] * 4 + [tie, made(-0.3, 0.01, 1.0)])
    assert "Up to 10% of users: Wins 4 and loses 0 of 5 cells with p < .05; mean gain +16.2%" in text
    assert "More users: Wins 0 and loses 1 of 1 cells" in text and text.endswith("not consistent.")
    assert "| t, 10% | b | 0.1200 | 0.1000 | +20.0% | +0.0% to +0.0% | 0.0100 |" in contrast_table([win])


# the audit


def audit(*, leave_out=False, **changes):
    options = config(train={"threads": 1}, data={"target_fraction": 0.5})
    plan = audit_study("target", ["source0", "source1"], options, seeds=(0,), leave_out=leave_out)
    return study(**{**{f: getattr(plan, f) for f in ("name", "arms", "fractions", "seeds", "comparisons")}, **changes})


def test_an_audit_runs_its_controls_and_says_what_it_found(tmp_path):
    plan = audit()
    assert run(plan, tmp_path) == []
    sentences = audit_verdict(Results(plan, tmp_path))
    assert sentences[0].startswith("The sources ") and "against target only" in sentences[0]
    assert any("copy of the target" in s for s in sentences)
    with pytest.raises(ValueError, match="0 of 6 cells"):
        audit_verdict(Results(plan, tmp_path / "none"))


class Known:
    """Results with given gains: by (arm, against) a gain and its p."""

    complete = True

    def __init__(self, gains, **options):
        self.study, self.gains = audit(**options), gains

    def contrasts(self, comparison):
        (against,) = comparison.against
        gain, p, *reason = self.gains.get((comparison.arm, against), (0.0, 0.9))
        contrast = made(gain, p, baseline=against)
        return [without(contrast, *reason) if reason else contrast]

    def source_means(self, *queries):
        return {"target copy": 0.2, "source0": 0.5, "source0 random": 0.3}


def test_the_verdict_in_words():
    helped = {
        ("ours", "target-only"): (0.2, 0.001),
        ("target-copy", "target-only"): (0.4, 0.001),
        ("ours", "shuffled-sources"): (0.1, 0.01),
        ("random-sources", "target-only"): (-0.1, 0.01),
    }
    sentences = audit_verdict(Known(helped))
    assert sentences[0].startswith("The sources help the target: +20.0% NDCG@10")
    assert sentences[1].startswith("A copy of the target as source gives +40.0%")
    assert sentences[2].startswith("The gain is due to the order of their events: +10.0%")
    assert sentences[3].startswith("It cannot be shown that the gain is due to what their users choose together")
    assert sentences[4].startswith("Caution: random-sources should equal target only, and harm it: -10.0%")
    assert sentences[5].endswith("source0 0.500, source0 random 0.300, target copy 0.200.")
    nothing = audit_verdict(Known({}))
    assert nothing[0].startswith("The sources make no significant difference to the target")
    assert nothing[1].startswith("Even a copy of the target as source gives no clear gain")
    assert len(nothing) == 3
    assert audit_verdict(Known({("ours", "target-only"): (-0.2, 0.001)}))[0].startswith("The sources harm the target")


def test_an_audit_gives_no_verdict_where_there_is_none():
    pairs = [("ours", "target-only"), ("target-copy", "target-only"), ("random-sources", "target-only")]
    pairs += [("shuffled-sources", "target-only"), ("ours", "without-source0")]
    sentences = audit_verdict(Known(dict.fromkeys(pairs, (0.785, 0.0002, "ties decide")), leave_out=True))
    assert sentences[:2] == [
        "No verdict on the sources against target only: ties decide.",
        "No verdict on what an ideal source, a copy of the target, could give: ties decide.",
    ]
    assert sentences[2] == "No verdict on source0 beside the other sources: ties decide."
    assert not any("Caution" in s or "+78.5%" in s for s in sentences)
    helped = {pairs[0]: (0.2, 0.001), ("ours", "shuffled-sources"): (0.1, 0.01, "ties decide")}
    assert "No verdict on whether the gain is due to the order of their events: ties decide." in audit_verdict(
        Known(helped)
    )


def test_an_audit_trains_without_each_source_and_adjusts_for_their_number(tmp_path):
    plan = audit(leave_out=True)
    assert [(arm.name, arm.without) for arm in plan.arms if arm.without] == [
        ("without-source0", ("source0",)),
        ("without-source1", ("source1",)),
    ]
    assert run(plan, tmp_path, cells=plan.only(arms=["without-source1"]).cells()) == []
    (cell,) = (tmp_path / "cells").glob("*.json")
    record = json.loads(cell.read_text())
    assert set(record["data"]) == {"target", "source0"} == {"target", *record["transfer"]["weight"]}
    gains = {("ours", "without-source0"): (0.3, 0.01), ("ours", "without-source1"): (-0.1, 0.03)}
    *_, first, second, _ = audit_verdict(Known(gains, leave_out=True))
    assert first.startswith("source0 helps beside the other sources: +30.0%") and "p 0.0200)" in first
    assert second.startswith("source1 harms beside the other sources: -10.0%") and "p 0.0300)" in second
    *_, first, second, _ = audit_verdict(Known(gains | {("ours", "without-source0"): (0.3, 0.03)}, leave_out=True))
    assert first.startswith("It cannot be shown that source0 matters beside the other sources")  # .03 twice
    assert second.startswith("It cannot be shown that source1")
    with pytest.raises(ValueError, match="leave_out needs at least two sources"):
        audit_study("target", ["source0"], Config(), leave_out=True)


def test_an_audit_needs_sources():
    for sources in ((), ("target",)):
        with pytest.raises(ValueError, match="an audit needs sources that are not the target"):
            audit_study("target", sources, Config())


@pytest.mark.slow
def test_planted_transfer_is_found_and_controls_rank_below_it(tmp_path):
    assert run(preset("smoke"), tmp_path) == []
    results = Results(preset("smoke"), tmp_path)
    figures = {row["arm"]: row["ndcg@10"] for row in results.rows()}
    for arm in ("ours", "pretrain", "target-copy"):
        assert figures[arm] > max(figures[control] for control in ("shuffled-sources", "random-sources"))
    assert figures["ours"] > 1.2 * figures["target-only"] and figures["ours"] > figures["pretrain"]
    found = {(c.arm, c.against): results.contrasts(c)[0] for c in preset("smoke").comparisons}
    assert found["ours", ("lru-vq-structure", "target-only")].wins and found["ours", ("lru",)].wins
