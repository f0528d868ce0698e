"""Training the co-occurrence scorer: what each method does, its query users, and that a run repeats by its seed."""

import dataclasses
import json
import math
from dataclasses import replace
from itertools import chain, islice, repeat

import numpy as np
import pytest
import torch

from metarec_fast.config import MetaConfig
from metarec_fast.cooccurrence.features import CooccurrenceEpisode
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer
from metarec_fast.data import Sequences, leave_one_out, limit_users, random_items, relabelled_copy, synthetic
from metarec_fast.meta import source_weights
from metarec_fast.train import cooccurrence as cooccurrence_module
from metarec_fast.train.cooccurrence import (
    QUERY_USERS,
    CooccurrenceTrainer,
    copy_of,
    folds,
    mean_loss,
    source_episodes,
    views_of,
    weighted_round_robin,
    weights_of,
)
from metarec_fast.train.loop import Stage
from metarec_fast.train.stop import Interrupted
from tests.statistics.test_transitions import packed
from tests.tiny import DOMAINS, config
from tests.train.test_encoder import Recorder, after, assert_same_state, one_thread  # noqa: F401

TARGET = leave_one_out(DOMAINS.target)
SOURCES = {d.name: leave_one_out(d) for d in DOMAINS.sources}


def trainer(options=None, sources=SOURCES, target=TARGET, **kwargs) -> CooccurrenceTrainer:
    return CooccurrenceTrainer(sources, target, options or config(), **kwargs)


def trained(run: CooccurrenceTrainer) -> CooccurrenceScorer:
    run.run()
    return run.result


def stages_of(seen):
    taken = {}
    for stage, step, total, _ in seen.steps:
        assert step == taken.get(stage, 0) + 1 <= total
        taken[stage] = step
    return taken


def test_a_run_is_a_function_of_the_seed():
    runs = [trainer(), trainer(), trainer(config(train={"seed": 1}))]
    torch.rand(5)  # what else was drawn does not matter
    states = [trained(run).scorer.state_dict() for run in runs]
    assert_same_state(states[1], states[0])
    assert runs[0].progress == runs[1].progress
    assert runs[0].progress.evaluations != runs[2].progress.evaluations
    assert not torch.equal(states[0]["linear.weight"], states[2]["linear.weight"])


@pytest.mark.parametrize(
    ("method", "sources", "expected"),
    [
        ("metarec", SOURCES, {"co-occurrence: sources": 4, "co-occurrence: meta": 2, "co-occurrence: target": 4}),
        ("pretrain", SOURCES, {"co-occurrence: sources": 6, "co-occurrence: target": 4}),
        ("joint", SOURCES, {"co-occurrence: sources": 6}),
        ("target_only", {}, {"co-occurrence: target": 10}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_stages_of_a_method(method, sources, expected):
    seen = Recorder()
    run = trainer(config(train={"method": method}, cooccurrence={"patience": 99}), sources, reporter=seen)
    path = trained(run)
    assert stages_of(seen) == expected
    assert isinstance(path, CooccurrenceScorer) and path.statistics is run.statistics and not path.scorer.training
    assert all(0 < loss < 20 for *_, metrics in seen.steps for loss in metrics["losses"].values())
    found = dataclasses.asdict(run.history())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["best"] == min(loss for *_, loss in found["validation_loss"])
    assert found["best_at"] in {f"{stage} {step}" for stage, step, _ in found["validation_loss"]}
    assert found["skipped_steps"] == 0 and found["transfer"] == []  # too few meta steps to be traced


def test_sources_are_traced_with_the_noise_of_their_gradients():
    seen = Recorder()
    run = trainer(config(cooccurrence={"meta_steps": 23}), reporter=seen)
    run.run()
    trace, steps = run.progress.trace, [metrics for stage, *_, metrics in seen.steps if stage == "co-occurrence: meta"]
    assert [(entry["step"], entry["draws"]) for entry in trace] == [(10, 16), (20, 20)]  # two steps begin
    assert len(run.progress.untraced) == 3
    for entry, part in zip(trace, (steps[2:10], steps[10:20]), strict=True):
        assert entry["similarity"] == part[-1]["similarities"] and entry["weight"] == part[-1]["weights"]
        assert set(entry["weight"]) == set(entry["descent_without"]) == set(SOURCES)
        assert sum(entry["weight"].values()) == pytest.approx(1)
        draws = [draw for metrics in part for draw in metrics["noise"].values()]
        assert entry["noise"] == pytest.approx(np.sqrt(np.mean(np.square(draws)))) and 0 < entry["noise"] < 1
        assert entry["descent"] == pytest.approx(np.mean([metrics["descents"][0] for metrics in part]))
    assert json.loads(json.dumps(found := dataclasses.asdict(run.history()), allow_nan=False)) == found


@pytest.mark.parametrize(("method", "pools"), [("joint", 3), ("pretrain", 2)])
def test_joint_steps_alternate_with_the_target(method, pools, monkeypatch):
    run, drawn = trainer(config(train={"method": method})), []
    draw = CooccurrenceTrainer._draw

    def watched(self, pool, stage, step, stream=0):
        if stage == "warmup":
            drawn.append([*run.episodes.values(), run.folds].index(pool))
        return draw(self, pool, stage, step, stream)

    monkeypatch.setattr(CooccurrenceTrainer, "_draw", watched)
    run.run()
    assert drawn == [step % pools for step in range(6)]


def test_round_robin_is_in_proportion():
    uniform = list(islice(weighted_round_robin([1 / 3] * 3), 9))
    assert uniform == [0, 1, 2] * 3
    weights = np.array([0.55, 0.3, 0.11, 0.04])
    taken = np.array(list(islice(weighted_round_robin(weights), 500)))
    so_far = np.cumsum(taken[:, None] == np.arange(4), 0)
    assert abs(so_far - weights * np.arange(1, 501)[:, None]).max() <= 1.5


def test_weights_are_as_soft_as_similarities_are_uncertain():
    true, sharp = torch.tensor([0.9, 0.8, 0.7, 0.2]), MetaConfig(temperature=0.1)
    exact = source_weights(true, config=sharp)
    torch.testing.assert_close(weights_of(true.expand(5, 4), config=sharp), exact)
    # what moves all sources of a draw together is no noise
    moved = true + torch.tensor([[-0.6], [0.6], [0.1], [-0.1], [0.0]])
    torch.testing.assert_close(weights_of(moved, config=sharp), exact)
    torch.manual_seed(0)
    for _ in range(20):  # equal sources beside one that is far off: none of them gets all by chance
        drawn = torch.tensor([0.5, 0.5, 0.5, 0.5, -0.5]) + 0.35 * torch.randn(5, 5)
        weights = weights_of(drawn, config=sharp)
        assert weights.sum() == pytest.approx(1) and weights[:4].max() < 0.6
    rest = drawn - drawn.mean(1, keepdim=True) - drawn.mean(0) + drawn.mean()
    error = (rest.square().sum() / (4 * 4 * 5)).sqrt()
    expected = torch.softmax(drawn.mean(0) / (0.1**2 + 4 * error**2).sqrt(), 0)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(weights_of(true[None], config=sharp), exact)
    assert weights_of(true[:, None], config=sharp).tolist() == [1.0]
    assert weights_of(drawn, config=replace(sharp, weighting="uniform")).tolist() == pytest.approx([0.2] * 5)


def test_starts_that_are_not_finite_are_left_out(monkeypatch):
    loss = CooccurrenceNetwork.loss
    for lost, weighed in ((4, True), (10**6, False)):  # of the first start, of all
        factors = chain(repeat(math.nan, lost), repeat(1.0))
        monkeypatch.setattr(CooccurrenceNetwork, "loss", lambda *given, f=factors: loss(*given) * next(f))
        run = trainer()
        for step in range(5):
            run.train_step("similarity", step)
        run.end_stage(run.stages[0])
        assert run.weights.sum() == pytest.approx(1) and bool(run.source_weights) == weighed
        assert (run.weights.tolist() == [0.5, 0.5]) != weighed


def test_a_copy_of_the_target_weighs_more_than_random_sources():
    related = DOMAINS.sources[0]
    sources = {
        "copy": relabelled_copy(DOMAINS.target, seed=0),
        "related": related,
        "random": random_items(related, seed=0),
    }
    options = config(cooccurrence={"similarity_inits": 5, "similarity_batches": 4, "batch_size": 64, "meta_steps": 10})
    run = trainer(options, {name: leave_one_out(domain) for name, domain in sources.items()})
    run.run()
    weights = {name: of.weight for name, of in run.source_weights.items()}
    assert sum(weights.values()) == pytest.approx(1) and weights["copy"] > weights["related"] > 2 * weights["random"]
    assert run.progress.trace[-1]["weight"] == pytest.approx(weights)
    assert all(of.deviation > 0 for of in run.source_weights.values())


def test_only_metarec_weighs_sources():
    run = trainer(config(train={"method": "pretrain"}))
    run.run()
    assert run.weights.tolist() == [0.5, 0.5] and run.source_weights == {}


def test_warm_up_takes_sources_as_often_as_they_weigh(monkeypatch):
    run, drawn = trainer(config(cooccurrence={"warmup_steps": 38})), []
    draw = CooccurrenceTrainer._draw

    def watched(self, pool, stage, step, stream=0):
        if stage == "warmup":
            drawn.append(list(run.episodes.values()).index(pool))
        return draw(self, pool, stage, step, stream)

    monkeypatch.setattr(CooccurrenceTrainer, "_draw", watched)
    monkeypatch.setattr(
        CooccurrenceTrainer, "_weigh_sources", lambda self: setattr(self, "weights", torch.tensor([0.9, 0.1]))
    )
    run.run()
    assert len(drawn) == 38 and drawn.count(1) == 4


@pytest.mark.parametrize(("method", "before"), [("pretrain", 0), ("target_only", 6)])
@pytest.mark.parametrize(("passes", "steps"), [(0, 4), (0.75, 4), (2.1, 11)])
def test_many_users_bear_more_steps_than_few(method, before, passes, steps):
    """40 users in batches of 8: five steps ask each once; the target alone has the steps on sources besides."""
    cooccurrence = {"finetune_passes": passes, "patience": 99}
    options = config(train={"method": method}, cooccurrence=cooccurrence)
    trainer(options, SOURCES if method == "pretrain" else {}, reporter=(seen := Recorder())).run()
    assert stages_of(seen)["co-occurrence: target"] == before + steps


def test_the_best_of_what_was_tried_is_left_in_place():
    """A rate at which training falls apart: what is kept is what was there before."""
    options = config(
        train={"method": "pretrain"}, cooccurrence={"finetune_lr": 0.3, "average_decay": 0.0, "finetune_steps": 6}
    )
    run = trainer(options)
    path = trained(run)
    after_target = [loss for stage, step, loss in run.progress.evaluations if stage == "finetune" and step]
    assert len(after_target) == 3 and all(run.progress.best < loss < math.inf for loss in after_target)
    assert run.progress.best_at.startswith("warmup") and path.scorer is run.scorer
    run.averaged = views_of(path.scorer)
    assert run.validate() == run.progress.best


def test_the_scorer_has_a_source_loss_weight_of_its_own():
    def first_meta_step(**sections):
        run = trainer(config(**sections))
        return run._meta(0) and {name: p.grad for name, p in run.scorer.named_parameters()}

    want, other = first_meta_step(), first_meta_step(cooccurrence={"source_loss_weight": 3.0})
    assert_same_state(first_meta_step(meta={"source_loss_weight": 0.0}), want)
    assert not torch.equal(other["linear.weight"], want["linear.weight"])  # others start from zeros


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_what_counts_are_the_parameters_themselves_but_on_the_target_their_average(decay, monkeypatch):
    """Every validation sees what an average kept at every step of every stage would be, to the bit."""
    average, seen = {}, []

    class Watched(Recorder):
        def step(self, stage, step, total, metrics):
            now = copy_of(views_of(run.scorer))
            on = decay if stage == "co-occurrence: target" else 0.0
            average.update({name: torch.lerp(now[name], average[name], on) for name in now})

        def evaluation(self, stage, step, metric, value, best):
            seen.append((stage.removeprefix("co-occurrence: "), step))

    run = trainer(config(cooccurrence={"average_decay": decay, "patience": 99}), reporter=Watched())
    average.update(copy_of(views_of(run.scorer)))
    keep = run.keep_if_better

    def watched(stage):
        if run.progress.step == 0:
            average.update(copy_of(views_of(run.scorer)))
        assert_same_state(run.averaged, average)
        keep(stage)

    monkeypatch.setattr(run, "keep_if_better", watched)
    path = trained(run)
    assert seen == [("sources", 4), ("meta", 0), ("meta", 2), ("target", 0), ("target", 2), ("target", 4)]
    assert run.progress.evaluations[-1][:2] == ("finetune", 4) and run.progress.best_at == "finetune 4"
    assert_same_state(path.scorer.state_dict(), average)  # kept, and not the parameters of a later step


@pytest.mark.parametrize(("stage", "at"), [("warmup", 2), ("meta", 2), ("finetune", 1)])
def test_a_step_that_is_not_finite_is_left_out(stage, at, monkeypatch):
    """One batch that is not a number: parameters and averages stay, and training goes on from there."""
    states, draw = [], CooccurrenceTrainer._draw

    def poisoned(self, pool, where, step, stream=0):
        cases = draw(self, pool, where, step, stream)
        if (where, step) == (stage, at):
            cases = dataclasses.replace(cases, cooccurrence=cases.cooccurrence * math.nan)
        return cases

    class Watched(Recorder):
        def step(self, *metrics):
            super().step(*metrics)
            kept = (
                views_of(run.scorer),
                run.averaged,
                run.averages.steps,
                run.averages.target_gradients,
                run.noise.target_gradients,
            )
            states.append([copy_of(part) for part in kept])

    monkeypatch.setattr(CooccurrenceTrainer, "_draw", poisoned)
    seen = Watched()
    run = trainer(config(cooccurrence={"meta_steps": 4, "patience": 99}), reporter=seen)
    path = trained(run)
    skipped = [i for i, (*_, metrics) in enumerate(seen.steps) if "skipped" in metrics]
    assert len(seen.steps) == 12 and [seen.steps[i][1] for i in skipped] == [at + 1]
    assert run.progress.skipped == run.history().skipped_steps == 1
    assert len(run.progress.untraced) == (1 if stage == "meta" else 2)  # two steps begin
    (i,) = skipped
    for got, want in zip(states[i], states[i - 1], strict=True):
        assert_same_state(got, want)
    assert not torch.equal(states[i + 1][0]["linear.weight"], states[i][0]["linear.weight"])
    assert all(torch.isfinite(value).all() for value in path.scorer.state_dict().values())
    assert json.loads(json.dumps(found := dataclasses.asdict(run.history()), allow_nan=False)) == found


def test_a_loss_that_is_not_finite_is_never_the_best(monkeypatch):
    losses = iter([5.0, math.nan, 4.0, math.nan, -math.inf])
    run = trainer()
    monkeypatch.setattr(run, "validate", lambda: next(losses))
    waited = []
    for run.progress.step in range(5):
        run.keep_if_better(Stage("meta", 5))
        waited.append(run.progress.waited)
    assert waited == [0, 1, 0, 1, 2]
    assert run.progress.best == 4.0 and run.progress.best_at == "meta 2"


def test_training_on_the_target_stops_when_it_gets_no_better():
    seen = Recorder()
    still = {"finetune_lr": 0.0, "finetune_steps": 50, "patience": 3}
    run = trainer(config(train={"method": "pretrain"}, cooccurrence=still), reporter=seen)
    run.run()
    # at steps 0, 2 and 4 the parameters are those that came from the sources
    assert stages_of(seen)["co-occurrence: target"] == 4
    assert run.progress.best_at.startswith("warmup")
    assert [step for stage, step, _ in run.progress.evaluations if stage == "finetune"] == [0, 2, 4]


@pytest.mark.parametrize(
    ("calls", "where"),
    [(2, "weights at step 2"), (5, "sources at step 0"), (10, "meta at step 1"), (14, "target at step 3")],
)
def test_a_stop_is_heard_before_every_step(calls, where):
    seen = Recorder()
    with pytest.raises(Interrupted, match=f"stopped in co-occurrence: {where}"):
        trainer(reporter=seen, should_stop=after(calls)).run()
    assert len(seen.steps) == max(calls - 5, 0)  # comparing sources moves nothing


@pytest.mark.parametrize("calls", [0, 2, 5, 7, 9, 10, 12, 14])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, calls):
    """weights: steps 0-4, sources: 5-8, meta: 9-10, target: 11-14"""
    options = config(cooccurrence={"patience": 99})
    straight = trainer(options)
    state = trained(straight).scorer.state_dict()
    with pytest.raises(Interrupted, match="stopped in co-occurrence"):
        trainer(options, folder=tmp_path, should_stop=after(calls)).run()
    resumed = trainer(options, folder=tmp_path, reporter=(seen := Recorder()))
    assert resumed.restore()
    assert_same_state(trained(resumed).scorer.state_dict(), state)
    assert resumed.progress == straight.progress and resumed.source_weights == straight.source_weights
    assert resumed.history() == straight.history() and len(seen.steps) == 10 - max(calls - 5, 0)
    resumed.save()
    again = trainer(options, folder=tmp_path, reporter=(seen := Recorder()))
    again.restore()
    assert_same_state(trained(again).scorer.state_dict(), state)
    assert not seen.steps and again.history() == straight.history()


def test_another_configuration_is_refused(tmp_path):
    trainer(folder=tmp_path).save()
    with pytest.raises(ValueError, match=r"another configuration: cooccurrence.lr is 0.5"):
        trainer(config(cooccurrence={"lr": 0.5}), folder=tmp_path).restore()


def test_a_start_is_gone_on_from_and_left_as_it_was():
    torch.manual_seed(7)
    start = CooccurrenceNetwork(hidden=8)
    kept = copy_of(views_of(start))
    still = trainer(config(cooccurrence={"finetune_steps": 0}), {}, start=start)
    assert_same_state(trained(still).scorer.state_dict(), kept)
    assert still.progress.evaluations == [("start", 0, still.progress.best)] and 0 < still.progress.best < 20
    seen = Recorder()
    run = trainer(config(cooccurrence={"finetune_lr": 0.01}), {}, start=start, reporter=seen)
    moved = trained(run).scorer
    assert stages_of(seen) == {"co-occurrence: target": 4}  # not the steps of one that starts afresh
    assert run.progress.evaluations[0] == ("finetune", 0, still.progress.best)
    assert run.progress.best <= still.progress.best
    assert moved is not start
    assert_same_state(views_of(start), kept)


def test_one_user_cannot_be_a_query_user():
    one = limit_users(TARGET, 0.01, seed=0)
    with pytest.raises(ValueError, match="co-occurrence needs two users with events at least, target has 1"):
        trainer(target=one)


# who the query users are


@pytest.fixture
def made(monkeypatch):
    """Every episode that is made: who counts and who the query users are."""
    made = []

    class Watched(CooccurrenceEpisode):
        def __init__(self, train, *, statistics, query_users):
            super().__init__(train, statistics=statistics, query_users=query_users)
            made.append((set(statistics.tolist()), set(query_users.tolist())))

    monkeypatch.setattr(cooccurrence_module, "CooccurrenceEpisode", Watched)
    return made


def test_each_user_is_a_query_user_of_one_fold(made):
    train = packed([[1, 2, 3]] * 11 + [[]] + [[4, 5]] * 2, 6)
    users = np.flatnonzero(train.lengths > 0)
    folds(train, users, 5, seed=(0, 2))
    assert len(made) == 5 and sorted(len(query_users) for _, query_users in made) == [2, 2, 3, 3, 3]
    assert sorted(user for _, query_users in made for user in query_users) == users.tolist()
    for counted, query_users in made:
        assert not counted & query_users and counted | query_users == set(users.tolist())


def test_more_folds_than_users_and_users_of_one_event():
    train = packed([[1, 2], [3], [4, 5]], 6)
    made = folds(train, np.arange(3), 10, seed=(0,))
    assert sorted(fold.query_users.tolist() for fold in made) == [[0], [2]]


def test_statistics_of_a_fold_leave_its_query_users_out():
    for fold in trainer().folds:
        others = np.setdiff1d(np.arange(len(TARGET.train)), fold.query_users)
        expected = np.bincount(np.concatenate([TARGET.train[u] for u in others]), minlength=30)
        assert fold.statistics.counts.tolist() == expected.tolist()


def test_a_source_counts_as_many_users_as_requested_and_queries_others(made):
    train = packed([[1, 2, 3]] * 100, 5)
    source_episodes(train, 20, (0.5, 1.0, 2.0, 50.0), seed=(0, 1))
    assert [len(counted) for counted, _ in made] == [10, 20, 40, 90]  # of the users, some are left to be query users
    assert all(not counted & query_users and len(counted | query_users) == 100 for counted, query_users in made)
    made.clear()
    many = packed([[1, 2]] * (QUERY_USERS + 900), 5)
    source_episodes(many, 20, (1.0,), seed=(0, 1))
    assert [(len(counted), len(query_users)) for counted, query_users in made] == [(20, QUERY_USERS)]


def test_validation_asks_each_user_by_statistics_that_leave_them_out():
    run = trainer()
    users = [user for _, cases in run.validation_cases for user in cases.users.tolist()]
    assert sorted(users) == sorted(TARGET.valid.users.tolist())
    for fold, (statistics, cases) in zip(run.folds, run.validation_cases, strict=True):
        assert statistics is fold.statistics and set(cases.users) <= set(fold.query_users)
    losses = [
        float(run.scorer.loss(run.averaged, {}, statistics.cases(one(cases, i), cases.targets[i : i + 1])).detach())
        for statistics, cases in run.validation_cases
        for i in range(len(cases))
    ]
    assert run.validate() == pytest.approx(np.mean(losses), rel=1e-5)
    statistics, cases = run.validation_cases[0]
    whole = mean_loss(run.scorer, run.averaged, statistics, cases)
    assert mean_loss(run.scorer, run.averaged, statistics, cases, batch=3) == pytest.approx(whole, rel=1e-5)


def one(cases, i) -> Sequences:
    return packed([cases.histories[i].tolist()], cases.histories.num_items)


# planted structure


@pytest.mark.parametrize("method", ["metarec", "joint", "target_only"])
def test_what_sources_teach_holds_on_the_target(method):
    """Loss below that of the start by far more than steps apart differ, and below that of no knowledge at all."""
    domains = synthetic(source_users=150, source_items=60, target_users=60, target_items=50)
    options = config(
        train={"method": method},
        cooccurrence={"hidden": 16, "warmup_steps": 80, "meta_steps": 10, "finetune_steps": 20, "batch_size": 32},
    )
    sources = {} if method == "target_only" else {d.name: leave_one_out(d) for d in domains.sources}
    run = trainer(options, sources, leave_one_out(domains.target))
    before = run.validate()
    run.run()
    assert run.progress.best < min(before, math.log(50)) - 0.3


@pytest.mark.parametrize("lengths", [[3], [1, 4], [2, 1, 1, 1]], ids=str)
def test_a_source_of_few_users_still_has_query_users(lengths):
    items = np.arange(sum(lengths), dtype=np.int32) % 5
    train = Sequences(np.cumsum([0, *lengths]).astype(np.int64), items, 5)
    for seed in range(8):
        for episode in source_episodes(train, 3, (0.5, 2.0), seed=(seed,)):
            assert len(episode.batch(4, seed=(0,)).targets) == 4
