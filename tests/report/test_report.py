"""What people see of a run, and what its log keeps."""

import io
import json
from xml.etree import ElementTree

import numpy as np
from rich.console import Console

from metarec_fast.evaluation import Metrics
from metarec_fast.profiling.steps import PARTS, Part, StageProfile
from metarec_fast.report import profile
from metarec_fast.report.console import ConsoleReporter, describe
from metarec_fast.report.table import COLUMNS, Row, markdown, values

METRICS = {"losses": {"source": 3.5, "target": 2.25}, "weights": {"source": 1.0}}


def metrics() -> Metrics:
    return Metrics("leave one out; test", False, 50, np.arange(4), np.array([0, 1, 6, 40]), np.zeros(4, np.int64))


def test_values_are_those_of_the_metrics():
    named = values(metrics())
    assert set(COLUMNS) <= set(named)
    assert (named["Recall@5"], named["Recall@10"], named["Recall@20"]) == (0.5, 0.75, 0.75)
    np.testing.assert_allclose(named["NDCG@5"], (1 + 1 / np.log2(3)) / 4)
    np.testing.assert_allclose(named["MRR"], (1 + 1 / 2 + 1 / 7 + 1 / 41) / 4)


def test_a_markdown_table_names_method_protocol_and_what_was_not_trained():
    rows = [Row("popularity", metrics(), trained=False), Row("MetaRec", metrics(), seconds=3.0)]
    lines = markdown(rows, columns=("Recall@10", "MRR")).splitlines()
    assert lines[:2] == ["| method | Recall@10 | MRR |", "|---|--:|--:|"]
    assert lines[2].startswith("| popularity (untrained) | 0.7500 | ") and lines[3].startswith("| MetaRec | 0.7500 | ")
    assert lines[4:] == ["", metrics().protocol]
    assert markdown([]) == ""


def test_metrics_in_one_line():
    assert describe(METRICS) == "source 3.500  target 2.250  weights 1.00"


def run(reporter: ConsoleReporter) -> None:
    reporter.begin("MetaRec")
    reporter.evaluation("finetune", 0, "NDCG@10", 0.25, 0.25)
    for step in (1, 2):
        reporter.step("finetune", step, 2, METRICS)


def test_every_step_and_evaluation_is_logged_and_a_resumed_run_appends(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(2):
        with ConsoleReporter(log=log, console=Console(file=io.StringIO())) as reporter:
            run(reporter)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(entries) == 6
    evaluation, step = entries[3], entries[5]
    assert (evaluation["validation_ndcg@10"], evaluation["best"], evaluation["step"]) == (0.25, 0.25, 0)
    assert {k: step[k] for k in ("run", "stage", "step", *METRICS)} == {
        "run": "MetaRec",
        "stage": "finetune",
        "step": 2,
        **METRICS,
    }


def test_without_a_terminal_there_is_a_line_now_and_then_and_no_control_codes():
    for seconds, lines in ((0.0, 2), (3600.0, 1)):
        out = io.StringIO()
        with ConsoleReporter(console=Console(file=out, width=200), every_seconds=seconds) as reporter:
            reporter._last = -1e9 if seconds else 0.0
            run(reporter)
        shown = out.getvalue()
        assert shown.count("MetaRec finetune") == lines and "valid NDCG@10 0.2500" in shown
        assert "\x1b" not in shown


def test_a_terminal_gets_a_bar_a_stage():
    out = io.StringIO()
    with ConsoleReporter(console=Console(file=out, force_terminal=True, width=200)) as reporter:
        run(reporter)
        reporter.step("meta", 1, 5, METRICS)
    shown = out.getvalue()
    assert "2/2" in shown and "1/5" in shown


def stage_profile() -> StageProfile:
    parts = {name: Part() for name in PARTS}
    parts["loss"] = Part(forward_ms=2.0, backward_ms=4.0, flops=2e9, bytes=1e6)
    parts["data"] = Part(forward_ms=4.0)
    return StageProfile("MetaRec", "meta <1>", 10.0, 14.0, 2, 1e12, 1e10, parts)


def test_a_profile_for_people_and_for_programs(tmp_path):
    out = io.StringIO()
    profile.show([stage_profile()], Console(file=out, width=120))
    shown = out.getvalue()
    assert "MetaRec meta <1>: 10.0 ms a step" in shown
    loss = next(line for line in shown.splitlines() if "loss" in line)
    assert all(figure in loss for figure in ("60.0%", "2.00", "4.00")) and "█████▒▒▒▒▒▒▒▒▒▒" in loss
    assert "Roofline: 20% of the step, at 1000 GFLOP/s and 10 GB/s measured on 2 threads" in " ".join(shown.split())
    profile.write([stage_profile()], tmp_path)
    (written,) = json.loads((tmp_path / "profile.json").read_text())
    assert written["parts"]["loss"] == {
        "forward_ms": 2.0,
        "backward_ms": 4.0,
        "flops": 2e9,
        "bytes": 1e6,
        "ms": 6.0,
        "roofline_ms": 2.0,
    }
    assert written["roofline_share"] == 0.2
    svg = ElementTree.fromstring((tmp_path / "profile.svg").read_text())
    bars = [e for e in svg.iter("{http://www.w3.org/2000/svg}rect") if e.get("height") == "14"]
    assert len(bars) == 2 * len(PARTS)
    assert max(float(bar.get("x")) + float(bar.get("width")) for bar in bars) == 640
