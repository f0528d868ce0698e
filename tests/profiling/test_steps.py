"""A profile accounts for the whole step, and leaves the run as it was."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import profile

from metarec_fast.profiling.regions import PREFIX, recording, region
from metarec_fast.profiling.steps import PARTS, StepProfiler, account, work
from tests.tiny import config
from tests.train.test_encoder import assert_same_state, one_thread, trainer  # noqa: F401

OPTIONS = config(train={"warmup_steps": 6, "meta_steps": 6, "finetune_steps": 12, "evaluate_every": 50})


def profiled(options=OPTIONS, **kwargs):
    profiler = StepProfiler(skip=1, steps=2, **kwargs)
    profiler.begin("run")
    run = trainer(options, profiler=profiler)
    return profiler, run, run.run()


@pytest.fixture(scope="module")
def found():
    torch.set_num_threads(1)
    return profiled()


def test_every_stage_is_profiled_and_its_parts_sum_to_the_step(found):
    stages = found[0].stages
    assert [(s.run, s.stage) for s in stages] == [
        ("run", name) for name in ("warmup", "meta", "finetune table", "finetune")
    ]
    for stage in stages:
        assert tuple(stage.parts) == PARTS
        total = sum(part.ms for part in stage.parts.values())
        assert total == pytest.approx(stage.step_ms, rel=1e-6)  # by construction: every event has one part
        assert 0 < stage.roofline_share < 1


def test_parts_hold_the_operators_that_belong_to_them(found):
    for stage in found[0].stages:
        parts = stage.parts
        for name in ("gather + VQ", "encoder", "scan", "loss"):
            assert parts[name].forward_ms > 0 and parts[name].backward_ms > 0, name
            assert parts[name].flops > 0, name
        for name in ("data", "optimizer"):
            assert parts[name].forward_ms > 0 and parts[name].backward_ms == 0
        # steps this small are largely Python, some of it between the parts
        assert parts["other"].ms < 0.5 * stage.step_ms


def test_the_traced_total_is_the_time_of_the_traced_step():
    """The parts sum to what the clock says of a traced step, within 5 % (plus the start of the range)."""
    import time

    run, seconds = trainer(OPTIONS), []
    profiler = StepProfiler(skip=1, steps=1)
    profiler.begin("run")
    for step in range(3):
        with profiler.step("warmup"):
            begin = time.perf_counter()
            run.train_step("warmup", step)
            seconds.append(time.perf_counter() - begin)
    run.close()
    assert profiler.stages[0].traced_ms == pytest.approx(1e3 * seconds[-1], rel=0.05)


def test_a_profiled_run_gives_the_same_model(found):
    _, run, progress = found
    plain = trainer(OPTIONS)
    assert plain.run() == progress
    assert_same_state(run.model.state_dict(), plain.model.state_dict())


def test_regions_are_recorded_within_a_profile_alone():
    with profile() as outside, region("loss"):
        torch.ones(2) + 1
    with profile() as within, recording(), region("loss"):
        torch.ones(2) + 1
    names = [{event.name for event in one.events()} for one in (outside, within)]
    assert [PREFIX + "loss" in of for of in names] == [False, True]


@pytest.mark.parametrize(
    "changes",
    [{"train": {"loss": "sampled"}}, {"meta": {"order": 2}}, {"model": {"encoder": "sasrec", "vq": "none"}}],
    ids=str,
)
def test_options(changes):
    short = {"warmup_steps": 0, "meta_steps": 6, "finetune_steps": 0} | changes.get("train", {})
    profiler, *_ = profiled(config(**(changes | {"train": short})))
    (stage,) = profiler.stages
    assert sum(part.ms for part in stage.parts.values()) == pytest.approx(stage.step_ms, rel=1e-6)
    assert stage.parts["loss"].backward_ms > 0


def test_runs_shorter_than_a_profile_leave_none():
    profiler, *_ = profiled(config(train={"warmup_steps": 3, "meta_steps": 2, "finetune_steps": 1}))
    assert profiler.stages == []


def test_work_is_counted_from_shapes():
    assert work("aten::mm", [[5, 3], [3, 7]]) == (2 * 5 * 3 * 7, 4 * (15 + 21 + 35))
    assert work("aten::addmm", [[7], [5, 3], [3, 7], [], []])[0] == 2 * 5 * 3 * 7
    assert work("aten::bmm", [[2, 5, 3], [2, 3, 7]])[0] == 2 * 2 * 5 * 3 * 7
    T, V, D = 10, 100, 4
    forward = work("metarec_fast::linear_cross_entropy", [[T, D], [V, D], [T], [V]])
    backward = work("metarec_fast::linear_cross_entropy_backward", [[T], [T, D], [V, D], [T], [V], [T], [], [], []])
    assert forward[0] == T * V * (2 * D + 16) and backward[0] == T * V * (3 * 2 * D + 16)
    assert forward[1] == 4 * (T * D + V * D + T + V + T)
    assert work("metarec_fast::vq_commit", [[8, T, 2], [8, 16, 2]])[0] == 2 * 8 * T * 16 * 2
    assert work("metarec_fast::linear_scan", [[2, 6], [T, 2, 6], [3], []])[0] == 8 * T * 6
    assert work("aten::add", [[5], [5]]) == work("metarec_fast::other", [[5]]) == (0, 0)


def event(name, start, end, own, parent=None, sequence=-1, shapes=()):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=own,
        cpu_parent=parent,
        sequence_nr=sequence,
        scope=0,
        input_shapes=shapes,
    )


def test_backward_belongs_to_the_part_of_its_forward_operator():
    root = event("metarec_fast.profile/step", 0, 100, 1000)
    loss = event("metarec_fast.profile/loss", 10, 30, 2000, root)
    encoder = event("metarec_fast.profile/encoder", 12, 20, 3000, loss)
    product = event("aten::addmm", 13, 15, 4000, encoder, sequence=7)
    scan = event("metarec_fast::linear_scan", 16, 18, 5000, encoder, shapes=[[2, 6], [10, 2, 6], [3], []])
    back = event("autograd::engine::evaluate_function: AddmmBackward0", 40, 60, 6000, root, sequence=7)
    inside = event("aten::mm", 42, 50, 7000, back)
    other = event("aten::add", 70, 80, 8000, root)
    elsewhere = event("aten::add", 70, 80, 9000)
    parts = account([root, loss, encoder, product, scan, back, inside, other, elsewhere], root)
    assert (parts["encoder"].forward_ms, parts["encoder"].backward_ms) == (7, 13)
    assert (parts["scan"].ms, parts["loss"].ms, parts["other"].ms) == (5, 2, 9)
