"""A run is a function of its step number: stopping, skipping and choosing leave no trace that a reader cannot see."""

import gc
import itertools
import math
import threading
import time

import pytest
import torch

from metarec_fast.api import build
from metarec_fast.data import leave_one_out
from metarec_fast.meta import FixedStep
from metarec_fast.sampling import BatchShape
from metarec_fast.train import encoder as encoder_module
from metarec_fast.train.encoder import TABLE, EncoderTrainer, stages
from metarec_fast.train.optimizer import dropout_seed
from metarec_fast.train.stop import Interrupted
from tests.tiny import DOMAINS, config


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, so that runs can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(options, **kwargs) -> EncoderTrainer:
    sources = {} if options.train.method == "target_only" else {d.name: leave_one_out(d) for d in DOMAINS.sources}
    target = leave_one_out(DOMAINS.target)
    return EncoderTrainer(build(options, [*sources.values(), target]), sources, target, options, **kwargs)


def after(calls: int):
    """Asks to stop at the call that follows ``calls`` others."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


class Recorder:
    def __init__(self) -> None:
        self.steps, self.evaluations = [], []

    def begin(self, title): ...

    def step(self, stage, step, total, metrics):
        self.steps.append((stage, step, total, metrics))

    def evaluation(self, stage, step, metric, value, best):
        self.evaluations.append((stage, step, value, best))


def assert_same_state(got, want) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("method", ["target_only", "pretrain", "metarec"])
def test_every_method_may_take_the_same_number_of_steps(method):
    options = config(train={"method": method, "warmup_steps": 5, "meta_steps": 7, "finetune_steps": 11})
    assert sum(stage.steps for stage in stages(options, 40)) == 23
    assert stages(options, 40)[-1].name == "finetune"


RUN = config(train={"meta_steps": 11})  # long enough for an entry in the trace


@pytest.fixture(scope="module")
def straight():
    torch.set_num_threads(1)
    run = trainer(RUN)
    return run, run.run()


# warm-up: steps 0-2, meta: 3-13, fine-tuning of the table: 14-16, of everything: 17-19
@pytest.mark.parametrize("calls", [0, 2, 3, 4, 9, 13, 14, 15, 16, 17, 18, 19])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(straight, tmp_path, calls):
    with pytest.raises(Interrupted, match="stopped in"):
        trainer(RUN, folder=tmp_path, should_stop=after(calls)).run()
    resumed = trainer(RUN, folder=tmp_path)
    assert resumed.restore()
    progress = resumed.run()
    assert_same_state(resumed.model.state_dict(), straight[0].model.state_dict())
    assert progress == straight[1]


def test_stopped_three_times(straight, tmp_path):
    for _ in range(3):
        run = trainer(RUN, folder=tmp_path, should_stop=after(5))
        run.restore()
        with pytest.raises(Interrupted):
            run.run()
    run = trainer(RUN, folder=tmp_path)
    run.restore()
    assert run.run() == straight[1]
    assert_same_state(run.model.state_dict(), straight[0].model.state_dict())


def test_a_finished_run_is_restored_whole(straight, tmp_path):
    first = trainer(RUN, folder=tmp_path)
    first.run()
    first.save()
    seen = Recorder()
    again = trainer(RUN, folder=tmp_path, reporter=seen)
    again.restore()
    assert again.run() == straight[1]
    assert not seen.steps
    assert_same_state(again.model.state_dict(), straight[0].model.state_dict())


def test_another_configuration_is_refused(tmp_path):
    first = trainer(config(), folder=tmp_path)
    first.save()
    with pytest.raises(ValueError, match="another configuration"):
        trainer(config(train={"seed": 1}), folder=tmp_path).restore()


def test_other_domains_are_refused(tmp_path):
    first = trainer(config(), folder=tmp_path)
    first.save()
    other = trainer(config(), folder=tmp_path)
    other.model.tables[0] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other domains"):
        other.restore()


def test_nothing_to_restore(tmp_path):
    assert not trainer(config(), folder=tmp_path / "none").restore()
    assert not trainer(config()).restore()


def at_stage(stage):
    run = trainer(config())
    run.progress.stage = [s.name for s in run.stages].index(stage)
    run.begin_stage(run.stages[run.progress.stage])
    run.train_step(stage, 0)
    return run


@pytest.mark.parametrize("stage", ["warmup", TABLE, "finetune"])
def test_a_gradient_that_is_not_finite_behind_a_loss_that_is_leaves_the_step_out(stage):
    run = at_stage(stage)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    hook = run.model.shared.codebook.register_hook(lambda grad: grad * math.nan)
    encoder = next(run.model.shared.encoder.parameters()).register_hook(lambda grad: grad * math.nan)
    metrics = run.train_step(stage, 1)
    assert all(math.isfinite(loss) for loss in metrics["losses"].values())
    assert metrics["skipped"] and run.progress.skipped == 1
    assert_same_state(run.model.state_dict(), before)
    hook.remove(), encoder.remove()
    assert "skipped" not in run.train_step(stage, 2)


@pytest.mark.parametrize(
    ("stage", "poisoned"),
    [("warmup", "source1"), ("meta", "source0"), ("meta", "target"), (TABLE, "target"), ("finetune", "target")],
)
def test_a_step_that_is_not_finite_is_left_out(stage, poisoned):
    run = at_stage(stage)
    table = run.model.table(poisoned).weight
    healthy = table.detach().clone()
    with torch.no_grad():
        table.fill_(math.nan)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    metrics = run.train_step(stage, 1)
    assert metrics["skipped"] and run.progress.skipped == 1
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    # and it leaves nothing behind that spoils the steps after it
    with torch.no_grad():
        table.copy_(healthy)
    metrics = run.train_step(stage, 2)
    assert "skipped" not in metrics and run.progress.skipped == 1
    assert not torch.equal(table, healthy)


def test_patience_ends_the_run(monkeypatch):
    scope = {"patience": 2, "finetune_steps": 40, "finetune_scope": "all"}
    run = trainer(config(train=scope), reporter=(seen := Recorder()))
    figures = iter([0.1, 0.3, 0.2, 0.3])
    monkeypatch.setattr(run, "validate", lambda: next(figures))
    progress = run.run()
    assert [e[2] for e in seen.evaluations] == [0.1, 0.3, 0.2, 0.3]
    assert (progress.best, progress.best_at, progress.waited) == (0.3, "finetune 2", 2)
    assert [s for s in seen.steps if s[0] == "finetune"][-1][1] == 6  # evaluated at 0, 2, 4 and 6


def test_the_best_model_by_validation_is_returned():
    # a rate this high makes fine-tuning harmful sooner or later, so that the last model is not the best one
    run = trainer(config(train={"finetune_lr": 3.0, "finetune_steps": 12}), reporter=(seen := Recorder()))
    progress = run.run()
    ndcg = [e[2] for e in seen.evaluations]
    assert progress.best == max(ndcg) > ndcg[-1]
    assert run.validate() == progress.best


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"method": "target_only"}},
        {"train": {"method": "pretrain"}},
        {"train": {"method": "pretrain", "finetune_scope": "table"}},
        {"train": {"method": "joint"}},
        {"train": {"loss": "sampled"}},
        {"train": {"loss": "sampled", "negative_distribution": "uniform", "window": "crop"}},
        {"meta": {"order": 2, "inner_steps": 2}},
        {"meta": {"similarity_decay": 0.0, "same_batch": True, "inner_steps": 2}},
        {"model": {"encoder": "sasrec"}},
        {"model": {"vq": "none"}},
        {"model": {"vq": "quantized", "vq_gradient": "rotation", "init": "random"}},
        {"data": {"mask_history": True}},
    ],
    ids=str,
)
def test_every_option_trains(changes):
    options = config(**changes)
    run = trainer(options, reporter=(seen := Recorder()))
    progress = run.run()
    assert progress.skipped == 0 and progress.best > 0
    assert len(seen.steps) == 13
    expected = {"target"} if options.train.method == "target_only" else {"source0", "source1", "target"}
    assert {name for *_, metrics in seen.steps for name in metrics["losses"]} == expected


def test_joint_training_shows_all_domains_in_every_step_and_is_chosen_by_validation():
    run = trainer(config(train={"method": "joint"}), reporter=(seen := Recorder()))
    progress = run.run()
    assert {stage for stage, *_ in seen.steps} == {"joint"} and len(seen.steps) == 13
    assert all(set(metrics["losses"]) == {"source0", "source1", "target"} for *_, metrics in seen.steps)
    assert progress.best == max(e[2] for e in seen.evaluations) == run.validate()
    assert progress.best_at.startswith("joint ")


def test_a_table_alone_is_fine_tuned(monkeypatch):
    run = trainer(config(train={"method": "pretrain", "finetune_scope": "table"}))
    kept = {}

    def validate():  # ever better, so that the last model is returned
        if not kept:
            kept.update({k: v.clone() for k, v in run.model.state_dict().items()})
        return float(run.progress.step)

    monkeypatch.setattr(run, "validate", validate)
    run.run()
    for name, tensor in run.model.state_dict().items():
        moves = name.startswith(f"tables.{run.model.domains.index('target')}.")
        assert torch.equal(tensor, kept[name]) != moves, name


GRADUAL = config(train={"finetune_steps": 8, "patience": 2})
# by stage and step: the best table is not the last, patience ends both halves, and everything does better later
NDCG = {(TABLE, 0): 0.1, (TABLE, 2): 0.3, (TABLE, 4): 0.2, ("finetune", 2): 0.25, ("finetune", 4): 0.4}


def reported(monkeypatch, run):
    """Every validation has the figure above; the stages, steps and states at which one was made."""
    evaluated = []

    def validate():
        at = run.stages[run.progress.stage].name, run.progress.step
        evaluated.append((at, {k: v.clone() for k, v in run.model.state_dict().items()}))
        return NDCG[at]

    monkeypatch.setattr(run, "validate", validate)
    return evaluated


def test_gradual_fine_tuning_moves_the_table_alone_and_then_everything_from_the_best_table(monkeypatch):
    run = trainer(GRADUAL.replace(train={"finetune_lr": 5e-3}), reporter=(seen := Recorder()))
    evaluated, train_step, starts, rates = reported(monkeypatch, run), run.train_step, {}, {}

    def watched(stage, step):
        starts.setdefault(stage, {k: v.clone() for k, v in run.model.state_dict().items()})
        rates[stage] = {group["lr"] for group in run.optimizer.param_groups}
        return train_step(stage, step)

    monkeypatch.setattr(run, "train_step", watched)
    progress = run.run()
    assert (progress.best, progress.best_at) == (0.4, "finetune 4")
    assert [at for at, _ in evaluated] == list(NDCG)  # the best table is not validated again
    target = f"tables.{run.model.domains.index('target')}."
    states = [state for _, state in evaluated]
    for now, after in itertools.pairwise(states[:3]):
        for name, tensor in now.items():
            assert torch.equal(tensor, after[name]) != name.startswith(target), name
    assert_same_state(starts["finetune"], states[1])
    moved = {k for k, v in states[4].items() if not torch.equal(v, states[1][k])}
    assert moved >= {f"shared.{k}" for k, _ in run.model.shared.named_parameters()} and any(
        k.startswith(target) for k in moved
    )
    assert rates["meta"] == {1e-2} and rates[TABLE] == rates["finetune"] == {5e-3}
    assert [run.schedule(stage, 0) for stage in (TABLE, "finetune")] == [[("target", 0)], [("target", 4)]]
    streams = [run._sampler("target", stage).stream for stage in ("meta", TABLE, "finetune")]
    assert streams[1] == streams[2] != streams[0]
    assert [step for stage, step, *_ in seen.steps if stage in (TABLE, "finetune")] == [1, 2, 3, 4] * 2


# steps of the table are 7-10, of everything 11-14
@pytest.mark.parametrize("calls", [9, 10, 11, 12, 14])
def test_a_gradual_run_goes_on_from_the_best_table(monkeypatch, tmp_path, calls):
    straight = trainer(GRADUAL)
    reported(monkeypatch, straight)
    want = straight.run()
    stopped = trainer(GRADUAL, folder=tmp_path, should_stop=after(calls))
    reported(monkeypatch, stopped)
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = trainer(GRADUAL, folder=tmp_path)
    reported(monkeypatch, resumed)
    assert resumed.restore() and resumed.run() == want
    assert_same_state(resumed.model.state_dict(), straight.model.state_dict())


def test_each_half_of_gradual_fine_tuning_has_its_own_patience(monkeypatch):
    run = trainer(config(train={"patience": 1, "finetune_steps": 40}), reporter=(seen := Recorder()))
    monkeypatch.setattr(run, "validate", iter([0.3, 0.2, 0.1]).__next__)
    assert run.run().best_at == f"{TABLE} 0"
    assert [s[:2] for s in seen.steps[7:]] == [(TABLE, 1), (TABLE, 2), ("finetune", 1), ("finetune", 2)]


@pytest.mark.parametrize(("users", "want"), [(40, 11), (176, 11), (177, 12), (1600, 100)])
@pytest.mark.parametrize("method", ["target_only", "pretrain", "joint", "metarec"])
def test_many_users_bear_more_steps(method, users, want):
    options = config(train={"method": method, "finetune_steps": 11, "finetune_passes": 1.0})
    assert sum(stage.steps for stage in stages(options, users)) == 3 + 4 + want


@pytest.mark.parametrize(
    ("scope", "steps", "want"),
    [
        *((scope, 0, [0] * (1 + (scope == "gradual"))) for scope in ("all", "table", "gradual")),
        *[("all", 3, [3]), ("table", 3, [3]), ("gradual", 1, [0, 1]), ("gradual", 2, [1, 1]), ("gradual", 3, [1, 2])],
    ],
)
def test_stages_of_fine_tuning(scope, steps, want):
    options = config(train={"method": "pretrain", "finetune_scope": scope, "finetune_steps": steps})
    names = {"all": ["finetune"], "table": [TABLE], "gradual": [TABLE, "finetune"]}[scope]
    assert [(s.name, s.steps) for s in stages(options, 40)[1:]] == list(zip(names, want, strict=True))
    assert trainer(options).run().best > 0  # what has no steps is validated all the same


def test_warm_up_is_on_the_sources():
    run = trainer(config())
    assert run.schedule("warmup", 2) == [("source0", 2), ("source1", 2)]


def test_a_target_alone_has_no_shared_parameters_to_leave_as_they_are(monkeypatch):
    run = trainer(config(train={"method": "target_only", "finetune_scope": "table"}))
    kept = {k: v.detach().clone() for k, v in run.model.shared.named_parameters()}
    monkeypatch.setattr(run, "validate", lambda: float(run.progress.step))  # the last model is returned
    run.run()
    assert not any(torch.equal(tensor, kept[name]) for name, tensor in run.model.shared.named_parameters())


@pytest.mark.parametrize("decay", [0.95, 0.0])
def test_weights_noise_and_descents_of_sources_are_traced(decay):
    run = trainer(config(train={"meta_steps": 23}, meta={"similarity_decay": decay}), reporter=(seen := Recorder()))
    trace = run.run().trace
    assert [(entry["step"], entry["draws"]) for entry in trace] == [(10, 16), (20, 20)]  # two steps begin
    steps = [metrics for stage, _, _, metrics in seen.steps if stage == "meta"]
    for entry, part in zip(trace, (steps[2:10], steps[10:20]), strict=True):
        assert entry["weight"] == part[-1]["weights"] and sum(entry["weight"].values()) == pytest.approx(1)
        assert entry["similarity"] == part[-1]["similarities"] and set(entry["similarity"]) == {"source0", "source1"}
        draws = [draw for metrics in part for draw in metrics["noise"].values()]
        assert entry["noise"] == pytest.approx(math.sqrt(sum(d * d for d in draws) / len(draws)))
        means = [sum(column) / len(part) for column in zip(*(metrics["descents"] for metrics in part), strict=True)]
        assert [entry["descent"], *entry["descent_without"].values()] == pytest.approx(means)


def test_a_skipped_step_is_not_traced():
    run = trainer(config(train={"meta_steps": 10}))
    step, run.train_step = (
        run.train_step,
        lambda stage, at: {**step(stage, at), **({"skipped": True} if at > 7 else {})},
    )
    assert run.run().trace == []
    assert len(run.progress.untraced) == 6


def prefetching() -> int:
    return sum(t.name == "metarec_fast.Prefetch" for t in threading.enumerate())


def test_no_thread_is_left_behind(tmp_path):
    gc.collect()
    assert prefetching() == 0
    with pytest.raises(Interrupted):
        trainer(RUN, folder=tmp_path, should_stop=after(2)).run()
    assert prefetching() == 0
    alone = trainer(RUN)
    alone.train_step("warmup", 0)
    assert prefetching() == 1
    del alone
    gc.collect()
    for _ in range(1000):  # its thread may be the one that holds it last
        if prefetching() == 0:
            break
        time.sleep(0.01)
    assert prefetching() == 0


def test_sequences_that_cannot_be_sampled_are_reported_as_they_are():
    run = trainer(RUN)
    items = run.target.train.items
    first, items[0] = items[0], -1
    try:
        with pytest.raises(ValueError, match=r"items must be in \[0, \d+\), got -1"):
            run.train_step("finetune", 0)
    finally:
        items[0] = first


SAMPLED = {"loss": "sampled", "negatives": 4, "meta_steps": 11, "batch_size": 4}


@pytest.mark.parametrize("changes", [{}, {"meta": {"inner_steps": 2, "order": 2}}, {"train": {"method": "pretrain"}}])
def test_large_tables_are_trained_by_rows_with_the_results_of_dense_steps(monkeypatch, changes):
    options = config(train=SAMPLED, model={"dropout": 0.0}).replace(**changes)
    dense = trainer(options)
    progress = dense.run()
    monkeypatch.setattr(encoder_module, "LARGE_TABLE", 1)
    by_rows = trainer(options)
    assert dense.table_optimizer is None and by_rows.table_optimizer is not None
    assert by_rows.run().best == pytest.approx(progress.best, rel=1e-3)
    for name, tensor in dense.model.state_dict().items():
        torch.testing.assert_close(by_rows.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("calls", [2, 9, 13, 17])
def test_a_stopped_run_by_rows_goes_on_as_if_it_had_not_been(monkeypatch, tmp_path, calls):
    monkeypatch.setattr(encoder_module, "LARGE_TABLE", 35)  # the sources' tables of 40 items, not the target's of 30
    options = config(train=SAMPLED)
    straight = trainer(options)
    progress = straight.run()
    assert len(straight.table_optimizer.param_groups[0]["params"]) == 2
    with pytest.raises(Interrupted):
        trainer(options, folder=tmp_path, should_stop=after(calls)).run()
    resumed = trainer(options, folder=tmp_path)
    assert resumed.restore()
    assert resumed.run() == progress
    assert_same_state(resumed.model.state_dict(), straight.model.state_dict())


def test_tables_stay_dense_where_every_row_is_touched(monkeypatch):
    monkeypatch.setattr(encoder_module, "LARGE_TABLE", 1)
    assert trainer(config()).table_optimizer is None


def capturing(given):
    """``given`` with train.capture, which a configuration for a CPU refuses: FixedStep needs no GPU."""
    object.__setattr__(given.train, "capture", True)
    return given


@pytest.mark.parametrize("options", [{}, {"loss": "sampled"}], ids=str)
def test_steps_on_batches_of_a_fixed_size_train_as_plain_ones(monkeypatch, options):
    taken = []

    class Counted(FixedStep):
        def __call__(self, *args, **kwargs):
            taken.append(self.target_shape)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(encoder_module, "CapturedStep", Counted)
    ends = []
    for capture in (False, True):
        given = config(
            model={"dropout": 0.0},
            meta={"inner_steps": 2},
            train=options,
        )
        run = trainer(capturing(given) if capture else given)
        run.model.double()  # so that no code is nearly as near as another
        for stage in ("warmup", "meta"):
            for step in range(4):
                run.train_step(stage, step)
        run.close()
        ends.append((run.model.state_dict(), run.averages.steps))
    assert len(taken) == 4
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-10)


def test_a_batch_too_large_to_be_captured_is_stepped_plainly(monkeypatch):
    monkeypatch.setattr(encoder_module, "CapturedStep", FixedStep)
    run = trainer(capturing(config()))
    run._captured.target_shape = BatchShape(1, 1, 12)
    monkeypatch.setattr(FixedStep, "__call__", None)
    metrics = run.train_step("meta", 0)
    run.close()
    assert len(metrics["losses"]) == len(run.sources) + 1


def test_capture_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match=r"captured step \(train.capture\) needs parameters on a CUDA device, got cpu"):
        trainer(capturing(config()))


@pytest.mark.gpu
def test_a_captured_run_learns_what_a_plain_one_learns():
    losses = []
    for capture in (False, True):
        run = trainer(config(model={"dropout": 0.0}, train={"capture": capture, "device": "cuda"}))
        losses.append([run.train_step("meta", step)["losses"] for step in range(6)])
        run.close()
    for plain, captured in zip(*losses, strict=True):  # float32, and steps build on each other
        assert captured == pytest.approx(plain, rel=1e-2)


def test_dropout_has_a_seed_of_its_own_at_every_step_whatever_the_run_s_seed():
    places = [(stage, step) for stage in range(3) for step in (0, 1, 2**31 - 1)]
    seeds = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**48, 2**63 - 1]
    drawn = [dropout_seed(seed, *place) for seed in seeds for place in places]
    assert len(set(drawn)) == len(drawn) and max(drawn) < 2**64
    assert dropout_seed(3, 2, 5) == (3 << 40) + (2 << 32) + 5  # as runs of small seeds always had it
