"""Work that is not finite: left out, counted by stage, reported, and the end of a run if there is no other."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console

from metarec_fast import MetaRec, api
from metarec_fast.data import leave_one_out
from metarec_fast.models.recommender import Recommender
from metarec_fast.profiling.steps import StepProfiler
from metarec_fast.report.console import ConsoleReporter
from metarec_fast.train.cooccurrence import CooccurrenceTrainer
from metarec_fast.train.encoder import EncoderTrainer
from metarec_fast.train.left_out import IN_A_ROW, LeftOut, NonFiniteTrainingError, not_finite, reason
from metarec_fast.train.optimizer import clip_and_step
from tests.tiny import DOMAINS, config


def test_counts_by_stage_and_ends_when_there_are_too_many_in_a_row():
    left_out = LeftOut()
    for step in range(IN_A_ROW - 1):
        assert left_out.add("meta", step, "") == step + 1
    left_out.took()
    for step in range(IN_A_ROW - 1):
        left_out.add("meta", step, "")
    left_out.end("meta", 100)
    assert left_out.not_run == [] and left_out.by_stage == {"meta": 2 * (IN_A_ROW - 1)}
    for step in range(3):
        left_out.add("finetune", step, "")
    left_out.end("finetune", 3)
    left_out.end("empty", 0)
    assert left_out.not_run == ["finetune"]
    for step in range(IN_A_ROW - 1):
        left_out.add("last", step, "the loss of a is nan")
    words = rf"^{IN_A_ROW} training steps in a row .* step 70 of last: the loss of a is nan$"
    with pytest.raises(NonFiniteTrainingError, match=words):
        left_out.add("last", 70, "the loss of a is nan")


def test_what_is_not_finite_is_named():
    bad = torch.zeros(4, 3)
    bad[1, 2] = bad[3, 0] = math.inf
    sparse = torch.sparse_coo_tensor([[5, 7]], torch.tensor([[1.0], [math.nan]]), (9, 1), check_invariants=True)
    named = {"a": torch.ones(2), "b": bad, "c": None, "d": sparse, "e": torch.tensor(math.nan)}
    assert not_finite(named) == [
        "b is not finite in 2 of 4 rows",
        "d is not finite in 1 of 2 rows",
        "e is not finite in 1 of 1 rows",
    ]
    assert reason({"x": math.nan, "y": 1.0}, {"b": bad}) == "the loss of x is nan; b is not finite in 2 of 4 rows"
    assert "too large" in reason({}, {})
    many = {f"p{i}": bad for i in range(9)}
    assert reason({"x": math.nan}, many).startswith("the loss of x is nan; p0 is")
    assert reason({}, many).endswith("; p5 is not finite in 2 of 4 rows; and 3 more")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_that_is_moved_and_not_clipped_is_looked_at_too(sparse):
    shared, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([shared, table], lr=0.1)
    grad = torch.tensor([[1.0, math.nan]])
    for values, taken in ((grad, False), (grad.nan_to_num(), True)):
        shared.grad = torch.ones(2)
        table.grad = (
            torch.sparse_coo_tensor([[1]], values, (3, 2), check_invariants=True)
            if sparse
            else values.expand(3, 2).clone()
        )
        before = shared.detach().clone()
        assert clip_and_step([shared], [optimizer], [1.0], clip=1.0) is taken
        assert torch.equal(shared, before) is not taken and table.isfinite().all()


def poisoned_build(monkeypatch, domain, *, rows=(0,)):
    """Every model that ``fit`` makes has a row of this domain's table that is not a number."""
    build = api.build

    def made(*args, **options):
        model = build(*args, **options)
        if domain in model.domains:
            with torch.no_grad():
                model.table(domain).weight[list(rows)] = math.nan
        return model

    monkeypatch.setattr(api, "build", made)


def test_a_run_whose_steps_are_not_finite_ends_with_the_reason(monkeypatch, tmp_path):
    poisoned_build(monkeypatch, "source1", rows=(0, 3))
    options = config(train={"warmup_steps": 0, "meta_steps": 40})
    with pytest.raises(NonFiniteTrainingError) as error:
        MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=options, run_dir=tmp_path)
    said = str(error.value)
    assert said.startswith(f"{IN_A_ROW} training steps in a row were left out") and "step 19 of meta" in said
    assert "the loss of source1 is nan" in said and "source1's table weight is not finite in 2 of 40 rows" in said
    assert "source0's table" not in said.split("the gradient of")[0]


def test_a_target_that_is_not_finite_is_named_where_it_is_validated(monkeypatch):
    poisoned_build(monkeypatch, "target")
    with pytest.raises(NonFiniteTrainingError, match="target's table weight is not finite in 1 of 30 rows"):
        MetaRec.fit([], DOMAINS.target, config=config(train={"method": "target_only"}))


def test_where_no_meta_step_ran_the_verdict_is_none_and_the_history_tells(monkeypatch, tmp_path):
    poisoned_build(monkeypatch, "source0")
    model = MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=config(), run_dir=tmp_path)
    report = model.history.transfer_report
    assert report["verdict"].startswith("No verdict on transfer: with sources no step of warmup, meta was finite.")
    assert report["returned"] == "target_only" == model.config.train.method and report["validation"]["p"] is None
    assert report["left_out"] == {"transferred": {"warmup": 3, "meta": 4}, "target_only": {}}
    assert model.history.skipped_steps == 7 and json.loads(json.dumps(report, allow_nan=False)) == report
    page = (tmp_path / "report.html").read_text()
    assert "No verdict on transfer" in page and "warmup 3, meta 4" in page
    assert MetaRec.from_pretrained(tmp_path / "model").history == model.history


def test_a_run_that_goes_on_has_counted_what_was_before(monkeypatch, tmp_path):
    split, sources = leave_one_out(DOMAINS.target), {d.name: leave_one_out(d) for d in DOMAINS.sources}

    def trainer(calls=None):
        left = iter(range(calls or 10**6))
        model = api.build(config(), [*sources.values(), split])
        return EncoderTrainer(
            model, sources, split, config(), folder=tmp_path, should_stop=lambda: next(left, None) is None
        )

    poisoned_build(monkeypatch, "source0")
    first = trainer(5)
    with pytest.raises(Exception, match="stopped in meta at step 2"):
        first.run()
    second = trainer()
    assert second.restore() and second.progress == first.progress
    assert second.progress.left_out.by_stage == {"warmup": 3, "meta": 2} and second.progress.left_out.in_a_row == 2
    assert second.run().left_out.not_run == ["warmup", "meta"] and second.progress.skipped == 7


def test_the_cooccurrence_scorer_counts_and_ends_in_the_same_way(monkeypatch):
    draw = CooccurrenceTrainer._draw

    def poisoned(self, pool, where, step, stream=0):
        cases = draw(self, pool, where, step, stream)
        return dataclasses.replace(cases, cooccurrence=cases.cooccurrence * math.nan) if where in stages else cases

    monkeypatch.setattr(CooccurrenceTrainer, "_draw", poisoned)
    stages = ("similarity", "warmup", "meta")
    options = config(train={"compare_target_only": False})
    history = MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=options).history
    found = {"co-occurrence: weights": 5, "co-occurrence: sources": 4, "co-occurrence: meta": 2}
    assert history.skipped_by_stage == history.cooccurrence.skipped_by_stage == found
    assert history.stages_not_run == list(found) and history.skipped_steps == 11
    stages = ("finetune",)
    long = config(train={"compare_target_only": False}, cooccurrence={"finetune_steps": 40, "patience": 99})
    with pytest.raises(
        NonFiniteTrainingError, match=r"step 19 of co-occurrence: target: the loss of co-occurrence is nan"
    ):
        MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=long)


def test_a_scorer_without_a_finite_validation_loss_is_not_kept(monkeypatch):
    monkeypatch.setattr(CooccurrenceTrainer, "validate", lambda self: math.nan)
    with pytest.raises(NonFiniteTrainingError, match="no validation loss of the co-occurrence scorer was finite"):
        MetaRec.fit([], DOMAINS.target, config=config(train={"method": "target_only"}))


def test_codes_do_not_start_from_rows_that_are_not_finite():
    model = Recommender(config().model, {"a": 20, "b": 30})
    with torch.no_grad():
        model.table("b").weight[4, 1] = math.nan
    with pytest.raises(ValueError, match="codes cannot be initialised from 'b': 1 of 30 rows of its table"):
        model.init_codebook(model.domains, seed=0)


def test_a_profile_is_of_steps_that_were_taken(monkeypatch):
    poisoned_build(monkeypatch, "source0")
    profiler = StepProfiler(skip=1, steps=1)
    options = config(train={"meta_steps": 10, "finetune_steps": 10, "finetune_scope": "all", "patience": 99})
    MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=options, profiler=profiler)
    assert [stage.stage for stage in profiler.stages] == ["finetune"]


def test_the_console_says_so_once_a_stage():
    text = io.StringIO()
    with ConsoleReporter(console=Console(file=text, width=200), every_seconds=0) as reporter:
        reporter.begin("MetaRec")
        for step in range(1, 4):
            reporter.step("meta", step, 9, {"losses": {"a": math.nan}, "skipped": step})
    said = text.getvalue()
    assert said.count("MetaRec meta step 1: a loss or gradient is not finite; such steps are left out and counted") == 1
    assert said.count("such steps") == 1 and "3 steps left out, not finite" in said
