"""Fit, ask, save, load: what people do with MetaRec."""

import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from metarec_fast import MetaRec, api
from metarec_fast.api import compare
from metarec_fast.cooccurrence.mixture import FittedMixture, MixtureWeights
from metarec_fast.data import (
    Domain,
    Sequences,
    Vocabulary,
    load_domain,
    random_items,
    relabelled_copy,
    synthetic,
)
from metarec_fast.evaluation import Metrics, top_k_items
from metarec_fast.files import sealed
from metarec_fast.models.scorer import ModelScorer
from metarec_fast.persistence import load_model
from metarec_fast.statistics.descriptors import item_descriptors
from metarec_fast.statistics.spectral import moments, turned
from metarec_fast.train.loop import Silent
from metarec_fast.train.stop import Interrupted
from tests.examples import representative
from tests.killed import fails_with_little_room, killed
from tests.tiny import DOMAINS, config, shop

FILES = ("metarec.json", "model.safetensors", "domain/domain.json", "domain/items.npy")
SOURCES, TARGET = DOMAINS.sources, DOMAINS.target


@pytest.fixture(scope="module")
def fitted():
    return MetaRec.fit(SOURCES, TARGET, config=config())


@pytest.fixture(scope="module")
def with_transitions():
    return MetaRec.fit(SOURCES, TARGET, config=config(model={"cooccurrence": "transitions"}))


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    fitted.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def items_of(recommended):
    return [[item for item, _ in answer] for answer in recommended]


def test_a_saved_model_is_the_model(fitted, saved):
    loaded = MetaRec.from_pretrained(saved)
    for split in ("valid", "test"):
        want, got = fitted.evaluate(split), loaded.evaluate(split)
        assert np.array_equal(got.greater, want.greater) and np.array_equal(got.equal, want.equal)
    users = list(TARGET.users)
    assert loaded.recommend(users, k=5) == fitted.recommend(users, k=5)
    assert loaded.config == fitted.config
    assert loaded.history == fitted.history
    assert loaded.weights == fitted.weights
    assert loaded.domain.name == "target"


@pytest.mark.parametrize("cooccurrence", ["transitions", "none"])
def test_a_saved_model_has_the_cooccurrence_that_it_was_made_with(
    with_transitions, tmp_path, monkeypatch, cooccurrence
):
    model = with_transitions
    if cooccurrence == "none":
        options = config(model={"cooccurrence": "none"}, train={"method": "target_only"})
        model = MetaRec.fit([], TARGET, config=options)
    monkeypatch.setattr(model, "weights", MixtureWeights(1.0, 1.25 if cooccurrence == "transitions" else 0.0))
    model.save_pretrained(tmp_path)
    loaded = MetaRec.from_pretrained(tmp_path)
    assert (loaded.cooccurrence is None) == (cooccurrence == "none")
    users = list(TARGET.users)
    assert loaded.recommend(users, k=5) == model.recommend(users, k=5)
    assert loaded.history == model.history


def test_a_model_without_its_cooccurrence_is_refused(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("cooccurrence.")}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        MetaRec.from_pretrained(copy)


def test_saved_files_hold_no_code_and_no_source(saved):
    files = [p for p in saved.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors", ".npy"}
    assert not any(b"source0-i" in p.read_bytes() for p in files)


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_folder_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(ValueError, match=r"missing|damaged"):
        MetaRec.from_pretrained(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_refused(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        MetaRec.from_pretrained(copy)


@pytest.mark.parametrize(
    ("other", "message"), [(99, "format 99, this version reads 5: a newer"), (4, "format 4, .* reads 5: train again")]
)
def test_another_format_is_refused(copy, other, message):
    manifest = json.loads((copy / "metarec.json").read_text())
    manifest["config"]["meta"]["fd_epsilon"] = 5e-3  # an option that format 4 had: its format is named, not the option
    (copy / "metarec.json").write_text(json.dumps({**manifest, "format": other}))
    with pytest.raises(ValueError, match=message):
        MetaRec.from_pretrained(copy)


def test_saving_over_a_model_is_requested(fitted, with_transitions, copy):
    reported = r"holds a saved model already; .*overwrite=True.*target 'target', method (metarec|target_only), saved 20"
    with pytest.raises(ValueError, match=reported):
        with_transitions.save_pretrained(copy)
    assert MetaRec.from_pretrained(copy).history == fitted.history
    (copy / "README.md").write_text("about this model")
    with_transitions.save_pretrained(copy, overwrite=True)
    assert MetaRec.from_pretrained(copy).history == with_transitions.history
    assert (copy / "README.md").read_text() == "about this model"


def test_a_word_is_no_consent(fitted, copy):
    before = (copy / "metarec.json").read_bytes()
    with pytest.raises(ValueError, match="overwrite must be True or False, got 'false'; did you mean False"):
        fitted.save_pretrained(copy, overwrite="false")
    with pytest.raises(ValueError, match="verify must be True or False, got 0"):
        MetaRec.from_pretrained(copy, verify=0)
    assert (copy / "metarec.json").read_bytes() == before


def test_other_files_are_not_saved_over(fitted, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="holds files but no saved model"):
        fitted.save_pretrained(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("swap", ["exchange", "two renames"])
def test_a_model_survives_a_save_that_is_killed(fitted, with_transitions, copy, monkeypatch, swap):
    if swap == "two renames":
        monkeypatch.setattr("metarec_fast.files._exchange", lambda *_: False)
    seen, at, died = set(), 0, True
    histories = {json.dumps(m.history.to_dict()): name for name, m in (("old", fitted), ("new", with_transitions))}
    while died:
        at += 9
        died = killed(lambda: with_transitions.save_pretrained(copy, overwrite=True), at)
        seen.add(histories[json.dumps(load_model(copy).manifest["history"])])
        fitted.save_pretrained(copy, overwrite=True)
        assert os.listdir(copy.parent) == ["copy"]
    assert seen == {"old", "new"} and at > 40


def test_a_model_survives_a_full_disk(fitted, with_transitions, copy):
    reported = fails_with_little_room(lambda: with_transitions.save_pretrained(copy, overwrite=True), 2000)
    assert str(copy) in reported and "partial" not in reported
    assert load_model(copy).manifest["history"] == fitted.history.to_dict() and os.listdir(copy.parent) == ["copy"]


def test_every_malformed_field_is_named_and_nothing_is_allocated_for_it(copy):
    path = copy / "metarec.json"
    whole = json.loads(path.read_text())

    def refused(manifest, name):
        path.write_bytes(sealed({key: value for key, value in manifest.items() if key != "checksum"}))
        with pytest.raises(ValueError, match=rf"(?s)damaged: metarec\.json.*{name}"):
            MetaRec.from_pretrained(copy)

    for key in whole:
        if key != "checksum":
            refused({k: v for k, v in whole.items() if k != key}, key)
            refused({**whole, key: True}, key)
    refused({**whole, "colour": "red"}, "colour")
    refused({**whole, "weights": {"encoder": float("nan"), "cooccurrence": 1.0}}, "encoder")
    refused({**whole, "target": "other"}, "target")
    refused({**whole, "files": {**whole["files"], "../x": {}}}, "files")
    for section, options in whole["config"].items():
        refused({**whole, "config": {**whole["config"], section: 3}}, section)
        refused({**whole, "config": {**whole["config"], section: {**options, "colour": "red"}}}, "colour")
        for option in options:
            rest = {k: v for k, v in options.items() if k != option}
            refused({**whole, "config": {**whole["config"], section: rest}}, f"{section}.{option}")


@pytest.mark.parametrize("option", ["dim", "layers", "codebook_heads", "codebook_size", "max_length"])
def test_absurd_sizes_are_refused_before_they_are_allocated(copy, option):
    path = copy / "metarec.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["model"] |= {"encoder": "sasrec", option: 10**9}
    del manifest["checksum"]
    path.write_bytes(sealed(manifest))
    started = time.monotonic()
    with pytest.raises(ValueError, match="is damaged"):
        MetaRec.from_pretrained(copy)
    assert time.monotonic() - started < 5


def test_no_changed_byte_goes_unnoticed(copy):
    """Each file of a saved model with bytes changed, cut or added at random places."""
    random = np.random.default_rng(0)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for _ in range(12):
            data, at = bytearray(whole), int(random.integers(len(whole)))
            how = int(random.integers(4))
            if how == 0:
                data[at] ^= 1 << int(random.integers(8))
            elif how == 1:
                del data[at:]
            elif how == 2:
                data[at:at] = bytes([int(random.integers(256))])
            else:
                data[at : at + 8] = bytes(8)
            if bytes(data) == whole:
                continue
            path.write_bytes(data)
            try:
                loaded = load_model(copy)
            except ValueError as error:
                assert str(copy) in str(error)
            else:  # blanks between the fields of JSON say nothing, nor does what pads a NumPy header
                assert loaded.manifest == json.loads((copy / "metarec.json").read_text())
                assert path.suffix == ".json" or whole[at : at + 1] in b" \n" or at < 128, (path, how, at)
                assert load_domain(copy / "domain", verify=True).num_items == 30
        path.write_bytes(whole)
    load_model(copy)


def test_recommendations_are_the_best_scores_of_the_catalogue(fitted):
    users = ["target-u3", "target-u0"]
    recommended = fitted.recommend(users, k=7, exclude_seen=False)
    rows = [TARGET.sequences[3], TARGET.sequences[0]]
    read = Sequences(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int64), TARGET.num_items)
    scores = fitted.scorer().prepare(read)(0, TARGET.num_items)
    for answer, row in zip(recommended, scores, strict=True):
        best = row.topk(7)
        assert [s for _, s in answer] == best.values.tolist()
        assert [row[TARGET.items.encode([item])[0]].item() for item, _ in answer] == best.values.tolist()


def test_seen_items_are_left_out_on_request(fitted):
    users = list(TARGET.users)
    for u, items in enumerate(items_of(fitted.recommend(users, k=TARGET.num_items))):
        seen = set(TARGET.items.decode(TARGET.sequences[u]))
        assert not seen & set(items)
        assert len(items) == TARGET.num_items - len(seen)
    for items in items_of(fitted.recommend(users, k=TARGET.num_items, exclude_seen=False)):
        assert sorted(items) == sorted(TARGET.items)


@pytest.mark.parametrize("cooccurrence", ["learned", "transitions", "none"])
def test_items_that_nobody_in_training_touched_are_recommended_on_request_alone(cooccurrence, tmp_path):
    options = config(model={"cooccurrence": cooccurrence}, train={"method": "target_only"})
    model = MetaRec.fit([], shop(), config=options)
    trained = {f"i{i}" for i in range(20)}
    users, k = list(model.domain.users), 60
    for answer in items_of(model.recommend(users, k=k, exclude_seen=False)):
        assert set(answer) == trained
    for answer in items_of(model.recommend(users, k=k, exclude_seen=False, catalogue="all")):
        assert len(set(answer)) == 60
    for answer in items_of(model.recommend(histories=[["i40", "i3"]], k=k)):  # read, though it cannot be answered
        assert set(answer) == trained - {"i3"}
    found, everywhere = model.evaluate(), model.evaluate(catalogue="all")
    cold = model.split.test.targets >= 20
    assert found.outside == cold.sum() > 0 and not found.per_user("mrr")[cold].any()
    assert np.array_equal(found.among_all.greater, everywhere.greater) and everywhere.outside == 0
    assert (found.greater[~cold] <= everywhere.greater[~cold]).all()
    assert "the 20 items of training events ranked (of 60 known)" in found.protocol
    model.save_pretrained(tmp_path)
    loaded = MetaRec.from_pretrained(tmp_path)
    assert loaded.evaluate().to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="catalogue must be 'training' or 'all', got 'some'"):
        model.recommend(users, catalogue="some")


def test_of_a_share_of_the_users_the_catalogue_is_what_they_bought():
    options = config(train={"method": "target_only"}, data={"target_fraction": 0.1})
    model = MetaRec.fit([], shop(bought=60), config=options)
    trained = set(model.domain.items.decode(np.unique(model.split.train.items)))
    (answer,) = items_of(model.recommend(["u7"], k=60, exclude_seen=False))
    assert set(answer) == trained and len(trained) < 35


def test_where_training_holds_every_item_the_catalogue_changes_no_bit_of_training():
    models = [
        MetaRec.fit(SOURCES, TARGET, config=config(train={"compare_target_only": False}, data={"catalogue": catalogue}))
        for catalogue in ("training", "all")
    ]
    for ours, theirs in zip(*(model.model.state_dict().values() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (model.cooccurrence.scorer.state_dict() for model in models)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert models[0].history.mixture == models[1].history.mixture


def test_with_all_items_validation_chooses_among_all_of_them():
    """The best of training is what `evaluate` finds among all items, co-occurrence's weight too."""
    options = config(train={"method": "target_only"}, data={"catalogue": "all"})
    model = MetaRec.fit([], shop(), config=options)
    found = model.evaluate("valid", cooccurrence=False)
    assert found.ndcg[10] == model.history.best_validation_ndcg and found.catalogue == "all"
    assert model.evaluate("valid", cooccurrence=False, catalogue="training").outside > found.outside == 0


def test_users_are_read_a_batch_at_a_time(fitted, monkeypatch):
    users = list(TARGET.users)
    together = fitted.recommend(users, k=5)
    queries = []
    scorer = fitted.scorer()
    prepare = scorer.prepare
    monkeypatch.setattr(scorer, "prepare", lambda histories: queries.append(len(histories)) or prepare(histories))
    monkeypatch.setattr(fitted, "scorer", lambda: scorer)
    monkeypatch.setattr(api, "top_k_items", partial(top_k_items, batch_size=9))
    apart = fitted.recommend(users, k=5)
    assert queries == [9, 9, 9, 9, 4]
    assert items_of(apart) == items_of(together)
    for ours, theirs in zip(apart, together, strict=True):
        assert [s for _, s in ours] == pytest.approx([s for _, s in theirs], rel=1e-6)


def test_recommend_raises_for_scores_that_are_not_finite_as_evaluate_does():
    model = MetaRec.fit([], shop(), config=config(train={"method": "target_only"}, model={"cooccurrence": "none"}))
    with torch.no_grad():
        model.model.table("shop").bias[3] = torch.nan
    for ask, who in (
        (lambda: model.recommend(["u4", "u5"]), "user 'u4'"),
        (lambda: model.recommend(histories=[["i2"]]), "history 0"),
        (lambda: model.evaluate(), r"user \d+"),
    ):
        with pytest.raises(ValueError, match=rf"^{who}: scores must be finite, got .* item 3"):
            ask()


def test_k_beyond_the_catalogue(fitted):
    (items,) = items_of(fitted.recommend(["target-u1"], k=10_000, exclude_seen=False))
    assert sorted(items) == sorted(TARGET.items)


def test_a_user_is_their_history(fitted):
    history = TARGET.items.decode(TARGET.sequences[4])
    (by_user,), (by_history,) = fitted.recommend(["target-u4"]), fitted.recommend(histories=[history])
    assert items_of([by_user]) == items_of([by_history])
    assert np.allclose([s for _, s in by_user], [s for _, s in by_history])


def test_an_empty_history_is_answered_by_popularity_and_bias_and_does_not_touch_others(fitted):
    history = list(TARGET.items)[:3]
    k = TARGET.num_items
    (alone,) = fitted.recommend(histories=[[]], k=k)
    beside = fitted.recommend(histories=[history, []], k=k)
    assert items_of([alone])[0] == items_of(beside)[1]
    assert items_of(fitted.recommend(histories=[history], k=k))[0] == items_of(beside)[0]
    items = TARGET.items.encode([item for item, _ in alone])
    scores = torch.tensor([score for _, score in alone])
    rest = scores - fitted.weights.encoder * fitted.model.table("target").bias.detach()[items]
    levels = fitted.cooccurrence.statistics.level_of[items].numpy()
    for level in np.unique(levels):  # one score for all items of a popularity and place in order
        same = rest[levels == level]
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-5)


def test_an_empty_history_is_answered_by_bias_beside_transitions(with_transitions):
    fitted = with_transitions
    history = list(TARGET.items)[:3]
    alone = fitted.recommend(histories=[[]], k=3)
    beside = fitted.recommend(histories=[history, []], k=3)
    bias = fitted.model.table("target").bias
    assert [s for _, s in alone[0]] == pytest.approx(bias.topk(3).values.tolist())
    assert items_of(alone)[0] == items_of(beside)[1]
    assert items_of(fitted.recommend(histories=[history], k=3))[0] == items_of(beside)[0]


def test_no_query(fitted):
    assert fitted.recommend(users=[]) == []


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({"users": ["nobody"]}, "unknown id 'nobody'"),
        ({"histories": [["target-i0", "source0-i0"]]}, "unknown id 'source0-i0'"),
        ({"users": [3]}, "unknown id 3"),
        ({}, "either users or histories"),
        ({"users": ["target-u0"], "histories": [["target-i0"]]}, "either users or histories"),
        ({"users": ["target-u0"], "k": 0}, "k must be at least 1"),
    ],
    ids=str,
)
def test_recommend_says_what_is_wrong(fitted, queries, message):
    with pytest.raises(ValueError, match=message):
        fitted.recommend(**queries)


def test_integer_ids_come_back_as_integers():
    s = TARGET.sequences
    numbered = Domain("n", s, Vocabulary(range(100, 100 + len(s))), Vocabulary(range(7000, 7000 + s.num_items)))
    model = MetaRec.fit([], numbered, config=config(train={"method": "target_only", "finetune_steps": 1}))
    (answer,) = model.recommend([103], k=4)
    assert all(type(item) is int and 7000 <= item < 7030 for item, _ in answer)
    (answer,) = model.recommend(histories=[[7003, 7004]], k=4)
    assert not {7003, 7004} & {item for item, _ in answer}


def test_evaluate_refuses_an_unknown_split(fitted):
    with pytest.raises(ValueError, match="split must be 'valid' or 'test', got 'train'"):
        fitted.evaluate("train")


def test_the_history_of_the_user_is_masked_on_request(fitted):
    assert fitted.evaluate().history_masked is False
    masked = fitted.evaluate(mask_history=True)
    assert masked.history_masked is True
    assert (masked.greater <= fitted.evaluate().greater).all()


def test_the_mixture_says_what_it_was_made_by(fitted):
    found = fitted.history.mixture
    fit, weights = found.fitted, (found.encoder, found.cooccurrence)
    assert weights == astuple(fitted.weights) == (fit["encoder"] / fit["cooccurrence"], 1.0)
    assert found.validation_loss["mixture"] <= found.validation_loss["cooccurrence"]
    # without co-occurrence it is the encoder's own score, by which its steps were chosen
    assert fitted.evaluate("valid", cooccurrence=False).ndcg[10] == fitted.history.best_validation_ndcg


@pytest.mark.parametrize(
    ("fitted_weights", "weights"), [((0.5, 0.0), (1.0, 0.0)), ((0.0, 0.7), (0.0, 1.0)), ((0.6, 2.0), (0.3, 1.0))]
)
def test_scores_are_mixed_as_fitted_on_users_whom_the_statistics_leave_out(fitted_weights, weights, monkeypatch):
    queries = []

    def fit(scored_cases, *, catalogue):
        queries.extend(scored_cases)
        return FittedMixture(*fitted_weights, 1.0, 2.0)

    monkeypatch.setattr(api, "fit_mixture", fit)
    model = MetaRec.fit(SOURCES, TARGET, config=config(train={"compare_target_only": False}))
    assert astuple(model.weights) == pytest.approx(weights)
    histories, N = model.split.test.histories, TARGET.num_items
    parts = (ModelScorer(model.model, TARGET.name), model.cooccurrence)
    expected = sum(w * part.prepare(histories)(0, N) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(model.scorer().prepare(histories)(0, N), expected, rtol=1e-5, atol=1e-5)
    users = np.concatenate([cases.users for _, cases in queries])
    assert sorted(users) == sorted(model.split.valid.users)
    events = sum(int(scorer.cooccurrence.statistics.counts.sum()) for scorer, _ in queries)
    assert events == (len(queries) - 1) * len(model.split.train.items)  # each fold is left out by one


def test_the_weight_of_cooccurrence_is_the_best_on_validation(with_transitions):
    fitted = with_transitions
    tried = fitted.history.transition_weight.validation_ndcg
    assert fitted.evaluate("valid").ndcg[10] == max(tried.values())
    assert tried["0.0"] == fitted.evaluate("valid", cooccurrence=False).ndcg[10]


@pytest.mark.parametrize("method", ["pretrain", "metarec"])
def test_a_source_is_needed(method):
    with pytest.raises(ValueError, match="at least one source"):
        MetaRec.fit([], TARGET, config=config(train={"method": method}))


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names, got source0, source0, target"):
        MetaRec.fit([SOURCES[0], SOURCES[0]], TARGET, config=config())
    with pytest.raises(ValueError, match="different names"):
        MetaRec.fit(TARGET, TARGET, config=config())


def test_a_domain_that_cannot_be_trained_on_is_named():
    sequences = Sequences(np.array([0, 3]), np.array([0, 1, 2], np.int32), 3)  # one event is left to train on
    one = Domain("one", sequences, Vocabulary(["a"]), Vocabulary(["x", "y", "z"]))
    with pytest.raises(ValueError, match="'one' has no user with two training events"):
        MetaRec.fit(one, TARGET, config=config())


def test_a_fraction_of_the_target():
    options = config(data={"target_fraction": 0.25}, train={"finetune_steps": 2})
    model = MetaRec.fit(SOURCES[0], TARGET, config=options)
    assert (model.split.train.lengths > 0).sum() == 10
    assert len(model.split.test) == TARGET.num_users


def test_the_split_by_time():
    model = MetaRec.fit(SOURCES, TARGET, config=config(data={"split": "time"}, train={"finetune_steps": 2}))
    assert "time" in model.evaluate().split


def test_compare(tmp_path):
    begun = []

    class Reporter:
        def begin(self, title):
            begun.append(title)

        def step(self, *_): ...
        def evaluation(self, *_): ...

    rows, models = compare(
        SOURCES, TARGET, config=config(), methods=("target_only", "metarec"), run_dir=tmp_path, reporter=Reporter()
    )
    assert [row.trained for row in rows] == [False, True, True]
    assert [row.method for row in rows[1:]] == begun == ["target only", "MetaRec"]
    assert list(models) == ["target_only", "metarec"]
    assert {row.metrics.split for row in rows} == {f"{models['metarec'].split.protocol}; test"}
    assert len({len(row.metrics) for row in rows}) == 1
    for method, row in zip(models, rows[1:], strict=True):
        assert row.seconds > 0
        loaded = MetaRec.from_pretrained(tmp_path / method / "model")
        assert loaded.evaluate().ndcg[10] == row.metrics.ndcg[10]
        assert loaded.config.train.method == method
    # the same command with resume finds everything done
    again, _ = compare(
        SOURCES, TARGET, config=config(), methods=("target_only", "metarec"), run_dir=tmp_path, resume=True
    )
    assert [row.metrics.ndcg for row in again] == [row.metrics.ndcg for row in rows]


def test_compare_refuses_an_unknown_method():
    with pytest.raises(ValueError, match=r"methods\[0\] must be 'target_only', .* or 'metarec', got 'magic'"):
        compare(SOURCES, TARGET, config=config(), methods=("magic",))


def test_another_configuration_leaves_the_run_folder_as_it_was(tmp_path):
    MetaRec.fit(SOURCES, TARGET, config=config(), run_dir=tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        MetaRec.fit(SOURCES, TARGET, config=config(train={"seed": 5}), run_dir=tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 0


# the transfer report, and never worse than target only

LONG = config(train={"meta_steps": 20, "threads": 1})  # two entries in the trace


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run with sources in one go: the model, and its folder."""
    folder = tmp_path_factory.mktemp("straight")
    before = torch.get_num_threads()
    model = MetaRec.fit(SOURCES, TARGET, config=LONG, run_dir=folder)
    torch.set_num_threads(before)
    return model, folder


class Recorder:
    def __init__(self):
        self.begun, self.steps = [], []

    def begin(self, title):
        self.begun.append(title)

    def step(self, stage, step, total, manifest):
        self.steps.append((len(self.begun), stage))

    def evaluation(self, *_): ...


def test_fit_with_sources_reports_what_they_gave(straight):
    model, folder = straight
    report = model.history.transfer_report
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report["sources"]) == {"source0", "source1"} and report["method"] == "metarec"
    assert [entry["step"] for entry in report["over_time"]] == [10, 20] and model.history.transfer
    assert report["noise_floor"]["draws"] == 2 * 18 and 0 < report["noise_floor"]["similarity"] < 2
    for source in report["sources"].values():
        assert 0 < source["weight"] < 1 and source["late_entries"] == 1 and source["leaving_out_costs"] is not None
    codes = report["code_overlap"]
    assert codes["domains"] == ["source0", "source1", "target"] and all(
        0 < used <= 8 for used in codes["used"].values()
    )
    np.testing.assert_allclose(np.diag(codes["overlap"]), 1)
    text = (folder / "report.html").read_text()
    assert report["verdict"].split(":")[0] in text
    assert MetaRec.from_pretrained(folder / "model").history == model.history


def test_the_report_shows_the_cooccurrence_scorer_beside_the_encoder(tmp_path):
    options = config(train={"meta_steps": 10}, cooccurrence={"meta_steps": 20})
    model = MetaRec.fit(SOURCES, TARGET, config=options, run_dir=tmp_path)
    report, found = model.history.transfer_report, model.history.mixture
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    cooccurrence = report["cooccurrence"]
    assert [entry["step"] for entry in cooccurrence["over_time"]] == [10, 20] and cooccurrence["noise_floor"][
        "draws"
    ] == 2 * 18
    assert set(cooccurrence["sources"]) == set(report["sources"]) == {"source0", "source1"}
    assert cooccurrence["over_time"][0]["similarity"] != report["over_time"][0]["similarity"]
    assert {stage for stage, *_ in cooccurrence["validation_loss"]} == {"warmup", "meta", "finetune"}
    assert cooccurrence["best"] == min(loss for *_, loss in cooccurrence["validation_loss"])
    # what is returned is made of what the history of the same model says
    expected = {"beside": "learned", "encoder": found.encoder, "cooccurrence": found.cooccurrence}
    assert report["mixture"][report["returned"]] == expected
    text = (tmp_path / "report.html").read_text()
    assert report["returned_parts"] in text
    for part in ("Encoder: similarity", "Co-occurrence scorer: similarity", "Co-occurrence scorer: validation loss"):
        assert part in text


def test_the_target_only_run_beside_has_the_same_budget():
    seen = Recorder()
    MetaRec.fit(SOURCES, TARGET, config=config(train={"patience": 99}), reporter=seen)
    assert seen.begun == ["target only"]
    taken = [sum(at == part and "co-occurrence" not in stage for at, stage in seen.steps) for part in (0, 1)]
    beside = [sum(at == part and "co-occurrence" in stage for at, stage in seen.steps) for part in (0, 1)]
    assert taken == [13, 13] and beside == [10, 10]
    assert {stage for at, stage in seen.steps if at == 1} == {"finetune", "co-occurrence: target"}
    seen = Recorder()
    model = MetaRec.fit(SOURCES, TARGET, config=config(train={"compare_target_only": False}), reporter=seen)
    assert not seen.begun and model.history.transfer_report is None


@pytest.mark.parametrize(
    ("ranks", "method", "words"),
    [
        ({"metarec": 0, "target_only": 3}, "metarec", "Transfer helped"),
        ({"metarec": 3, "target_only": 3}, "target_only", "No sign that transfer helped"),
        ({"metarec": 3, "target_only": 0}, "target_only", "Transfer harmed"),
    ],
    ids=str,
)
def test_what_is_not_better_on_validation_gives_way_to_target_only(monkeypatch, tmp_path, ranks, method, words):
    """Every validation user's target at a known rank for either model: the rule alone decides."""

    def known(self, split="test", **_):
        users = self.split.valid.users
        return Metrics("", False, 30, users, np.full(len(users), ranks[self.config.train.method]), 0 * users)

    monkeypatch.setattr(MetaRec, "evaluate", known)
    model = MetaRec.fit(SOURCES, TARGET, config=config(model={"cooccurrence": "none"}), run_dir=tmp_path)
    report = model.history.transfer_report
    assert model.config.train.method == method
    assert report["returned"] == ("transferred" if method == "metarec" else "target_only")
    assert report["verdict"].startswith(words)
    assert set(model.model.domains) == ({"source0", "source1", "target"} if method == "metarec" else {"target"})
    loaded = MetaRec.from_pretrained(tmp_path / "model")
    assert loaded.config.train.method == method and loaded.history == model.history
    assert words in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("helps", [True, False])
def test_sources_that_teach_are_kept_and_random_ones_that_teach_nothing_are_not(helps):
    """One of the two runs cannot learn, by its rates alone, and keeps its random start: no seed comes near that."""
    domains = synthetic(num_sources=1, source_users=100, source_items=40, target_users=100, target_items=40)
    # with sources, warm-up and meta steps learn at lr; target only learns at finetune_lr throughout
    rates = {"lr": 5e-3, "finetune_lr": 0.0} if helps else {"lr": 0.0, "finetune_lr": 5e-3}
    train = {"warmup_steps": 10, "meta_steps": 90, "finetune_steps": 0, "batch_size": 32, **rates}
    options = config(model={"init": "random", "cooccurrence": "none", "dropout": 0.1}, train=train)
    source = domains.sources[0] if helps else random_items(domains.sources[0], seed=0)
    model = MetaRec.fit(source, domains.target, config=options)
    report = model.history.transfer_report
    assert report["returned"] == ("transferred" if helps else "target_only")
    gain = report["validation"]["difference"] * (1 if helps else -1)
    assert gain > 0.1 and report["validation"]["p"] < 0.001
    assert model.evaluate("valid").ndcg[10] == max(
        report["validation"]["transferred"], report["validation"]["target_only"]
    )


def after(calls):
    """Asks to stop at the call that follows ``calls`` others."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


# with sources: 3 + 20 + 6 steps of the encoder, then 5 starts and 10 steps of the scorer, which start again; then
# the target alone: 21 steps until it gets no better, and 10 of the co-occurrence
@pytest.mark.parametrize(
    ("calls", "kept"),
    representative([(15, 15), (26, 26), (35, 29), (44, 29), (55, 40), (70, 50)], [(26, 26), (44, 29)]),
)
def test_a_run_stopped_in_either_half_goes_on_as_if_it_had_not_been(straight, tmp_path, calls, kept):
    want, folder = straight
    before = torch.get_num_threads()
    with pytest.raises(Interrupted):
        MetaRec.fit(SOURCES, TARGET, config=LONG, run_dir=tmp_path, should_stop=after(calls))
    assert (tmp_path / "target_only").exists() == (calls >= 44) and not (tmp_path / "model").exists()
    seen = Recorder()
    model = MetaRec.fit(SOURCES, TARGET, config=LONG, run_dir=tmp_path, resume=True, reporter=seen)
    torch.set_num_threads(before)
    assert sum("co-occurrence" not in stage for _, stage in seen.steps) < 58 - kept + 2
    for name in ("transfer_report", "cooccurrence", "mixture"):
        assert getattr(model.history, name) == getattr(want.history, name)
    assert model.config == want.config
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    for name, tensor in want.cooccurrence.scorer.state_dict().items():
        assert torch.equal(model.cooccurrence.scorer.state_dict()[name], tensor), name
    assert (tmp_path / "report.html").read_text() == (folder / "report.html").read_text()


def test_compare_reports_against_its_own_target_only_row(tmp_path):
    seen = Recorder()
    methods = ("pretrain", "target_only", "metarec")
    rows, models = compare(SOURCES, TARGET, config=LONG, methods=methods, run_dir=tmp_path, reporter=seen)
    assert seen.begun == [row.method for row in rows[1:]] == ["pretrain, then fine-tune", "target only", "MetaRec"]
    assert models["target_only"].history.transfer_report is None
    alone = models["target_only"].evaluate("valid").ndcg[10]
    for method in ("pretrain", "metarec"):
        report = models[method].history.transfer_report
        assert (report["method"], report["returned"]) == (method, "transferred")
        assert report["validation"]["target_only"] == alone
        assert report["validation"]["transferred"] == models[method].evaluate("valid").ndcg[10]
        assert (tmp_path / method / "report.html").exists()
        assert MetaRec.from_pretrained(tmp_path / method / "model").history.transfer_report == report
    assert models["pretrain"].history.transfer_report["noise_floor"] is None


def test_compare_without_a_target_only_row_names_the_model_that_took_the_place(monkeypatch):
    monkeypatch.setattr("metarec_fast.api.transfer_report", lambda *_, **__: {"returned": "target_only"})
    rows, models = compare(SOURCES, TARGET, config=config(), methods=("metarec",))
    assert rows[1].method == "MetaRec (target only returned)"
    assert models["metarec"].config.train.method == "target_only"


# a new target from a saved model


NEW = synthetic(num_sources=0, target_users=50, target_items=35, seed=5).target


def test_adapt_needs_no_source_and_leaves_the_model_as_it_was(saved, tmp_path):
    model = MetaRec.from_pretrained(saved)
    kept = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    adapted = model.adapt(NEW, run_dir=tmp_path)
    assert adapted.domain is NEW and adapted.model.domains == ["target"]
    assert len(adapted.model.table("target").weight) == 35
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    assert adapted.history.adapted_from == "target" and adapted.history.transfer_report is None
    assert adapted.history.mixture.encoder == adapted.weights.encoder
    assert model.cooccurrence.scorer is not adapted.cooccurrence.scorer and adapted.cooccurrence.num_items == 35
    assert len(adapted.recommend(users=[next(iter(NEW.users))], k=3)[0]) == 3
    loaded = MetaRec.from_pretrained(tmp_path / "model")
    got, want = loaded.evaluate(), adapted.evaluate()
    assert np.array_equal(got.greater, want.greater) and loaded.history == adapted.history
    # an adapted model adapts in turn
    assert loaded.adapt(TARGET).domain is TARGET


def test_adapting_starts_from_the_cooccurrence_scorer_of_the_model(fitted):
    still = fitted.config.replace(cooccurrence={"finetune_steps": 0})
    adapted = fitted.adapt(NEW, config=still)
    for name, tensor in fitted.cooccurrence.scorer.state_dict().items():
        assert torch.equal(adapted.cooccurrence.scorer.state_dict()[name], tensor), name
    assert adapted.history.cooccurrence.best_at == "start 0"
    json.dumps(adapted.history.to_dict(), allow_nan=False)


def test_adapting_starts_from_the_shared_parameters_and_the_structure_of_the_new_domain(fitted):
    still = fitted.config.replace(train={"finetune_steps": 0})
    adapted = fitted.adapt(NEW, config=still)
    for name, tensor in fitted.model.shared.state_dict().items():
        assert torch.equal(adapted.model.shared.state_dict()[name], tensor), name
    rows = adapted.model.table("target").weight
    assert rows.norm(dim=1).tolist() == pytest.approx([fitted.config.model.init_scale] * 35, rel=1e-4)
    rows, frame = rows.detach(), fitted.model.shared.frame
    assert frame.any()  # rows stand as near to it as they can be turned
    again = turned(rows, moments(rows, item_descriptors(adapted.split.train)), frame)
    torch.testing.assert_close(again, rows, rtol=0, atol=1e-4)
    moved = fitted.adapt(NEW, config=fitted.config.replace(train={"finetune_steps": 20, "finetune_lr": 0.05}))
    assert moved.history.best_validation_ndcg >= adapted.history.best_validation_ndcg
    frozen = fitted.config.replace(train={"finetune_scope": "table", "finetune_lr": 0.05})
    kept = fitted.adapt(NEW, config=frozen).model.shared.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in fitted.model.shared.state_dict().items())


def test_adapting_uses_all_users_whatever_the_model_was_trained_on():
    few = config(data={"target_fraction": 0.25}, train={"finetune_steps": 2, "compare_target_only": False})
    adapted = MetaRec.fit(SOURCES[0], TARGET, config=few).adapt(NEW)
    assert (adapted.split.train.lengths > 0).sum() == NEW.num_users


def test_a_stopped_adaptation_goes_on(fitted, tmp_path):
    threads = torch.get_num_threads()
    options = fitted.config.replace(train={"threads": 1})
    want = fitted.adapt(NEW, config=options, compare_target_only=True)
    # three steps of the table, three of everything, four of the scorer; then the target-only run
    for calls, stage in (
        (1, "finetune table at step 1"),
        (4, "finetune at step 1"),
        (7, "co-occurrence"),
        (12, "finetune"),
    ):
        folder = tmp_path / str(calls)
        with pytest.raises(Interrupted, match=f"stopped in {stage}"):
            fitted.adapt(NEW, config=options, compare_target_only=True, run_dir=folder, should_stop=after(calls))
        assert (folder / "target_only").exists() == (calls == 12)
        got = fitted.adapt(NEW, config=options, compare_target_only=True, run_dir=folder, resume=True)
        assert got.history.transfer_report == want.history.transfer_report
        assert got.evaluate().ndcg == want.evaluate().ndcg
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rank", [0, 3])
def test_adapting_never_worse_on_request(fitted, monkeypatch, rank):
    def known(self, split="test", **_):
        users = self.split.valid.users
        return Metrics(
            "", False, 35, users, np.full(len(users), rank if self.history.adapted_from is not None else 1), 0 * users
        )

    monkeypatch.setattr(MetaRec, "evaluate", known)
    chosen = fitted.adapt(NEW, compare_target_only=True)
    report = chosen.history.transfer_report
    assert report["sources"] == {} and report["noise_floor"] is None
    assert (chosen.history.adapted_from is not None) == (rank == 0)
    assert (chosen.config.train.method == "target_only") == (rank == 3)


@pytest.mark.parametrize("method", ["joint", "target_only"])
def test_whatever_made_a_model_adapting_it_is_fine_tuning(method):
    made = MetaRec.fit(SOURCES, TARGET, config=config(train={"method": method, "compare_target_only": False}))
    frozen = made.config.replace(train={"finetune_scope": "table", "finetune_lr": 0.05})
    adapted = made.adapt(NEW, config=frozen)
    assert adapted.history.best_at.startswith("finetune table ") and adapted.config.train.method == "pretrain"
    for name, tensor in made.model.shared.state_dict().items():
        assert torch.equal(adapted.model.shared.state_dict()[name], tensor), name


def short(lengths):
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    items = (np.arange(offsets[-1]) % 3).astype(np.int32)
    return Domain("shop", Sequences(offsets, items, 3), Vocabulary(range(len(lengths))), Vocabulary(list("xyz")))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 1, 3], "domain 'shop' has no user with two training events"),
        ([2, 2, 2], "domain 'shop' has no validation case, by which the model is chosen"),
        ([4], "model.cooccurrence='learned' needs two users with training events, and domain 'shop' has 1"),
    ],
    ids=str,
)
def test_a_domain_that_cannot_be_adapted_to_is_named(fitted, lengths, message):
    with pytest.raises(ValueError, match=message):
        fitted.adapt(short(lengths))


def test_adapting_needs_the_architecture_of_the_model(fitted):
    with pytest.raises(ValueError, match=r"config\.model must be that of the model to adapt"):
        fitted.adapt(NEW, config=config(model={"dim": 16}))


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        MetaRec.fit(SOURCES, TARGET, config=config(train={"threads": 1, "finetune_steps": 1}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# what is refused before anything is read or trained


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_said_at_once():
    queries = config(train={"device": "cuda"})
    for call in (MetaRec.fit, compare):
        with pytest.raises(ValueError, match="'cuda', and no CUDA device is available; use 'cpu'"):
            call(DOMAINS.sources, DOMAINS.target, config=queries)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("target_only", "metrec"), r"methods\[1\] must be .*, got 'metrec'; did you mean 'metarec'"),
        (("metarec", "metarec"), "methods must be at least one and all different, got metarec, metarec"),
        ((), "methods must be at least one and all different, got none"),
        ("metarec", "methods must be a list of methods, got the string 'metarec'"),
    ],
)
def test_methods_are_checked_before_the_first_is_trained(monkeypatch, methods, message):
    monkeypatch.setattr(MetaRec, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        compare(DOMAINS.sources, DOMAINS.target, config=config(), methods=methods)


@pytest.mark.parametrize("seed", representative([2**24 - 1, 2**24, 2**63 - 1], [2**63 - 1]))
def test_any_seed_trains(seed):
    model = MetaRec.fit(DOMAINS.sources, DOMAINS.target, config=config(train={"seed": seed}))
    assert model.evaluate().ndcg[10] > 0


# what is no domain, and what looks like one that should not be a source


@pytest.mark.parametrize(
    ("sources", "target", "message"),
    [
        (["books.csv"], TARGET, r"sources\[0\] must be a Domain, got the path 'books.csv'; mf.read makes one"),
        ("books.csv", TARGET, "sources must be Domains, got the path 'books.csv'; mf.read makes one"),
        (
            SOURCES,
            Path("shop"),
            "target must be a Domain, got the path 'shop'; .* mf.load_domain of an imported folder",
        ),
        (pl.DataFrame({"user": [1]}), TARGET, "sources must be Domains, got a DataFrame of polars; write it to a"),
        ([pl.LazyFrame({"user": [1]})], TARGET, r"sources\[0\] must be a Domain, got a LazyFrame of polars"),
        (SOURCES, TARGET.sequences, "target must be a Domain, got Sequences"),
        (None, TARGET, "sources must be Domains, got NoneType"),
        ({"books": SOURCES[0]}, TARGET, "sources must be Domains, got dict"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_domain_is_named_with_what_makes_one(sources, target, message):
    for call in (MetaRec.fit, compare):
        with pytest.raises(TypeError, match=message):
            call(sources, target, config=config())


def test_a_configuration_is_a_config():
    with pytest.raises(TypeError, match="config must be a Config, got dict"):
        MetaRec.fit(SOURCES, TARGET, config={"train": {"seed": 1}})


@pytest.mark.parametrize(
    ("copy", "how"),
    [
        (replace(TARGET, name="again"), "source 'again' holds 100% of the target's events, by the ids"),
        (relabelled_copy(TARGET, seed=3), "source 'target copy' has as many events .* under other ids"),
    ],
    ids=["same ids", "other ids"],
)
def test_a_source_that_copies_the_target_is_reported(copy, how):
    with pytest.warns(
        RuntimeWarning, match=f"{how}.*: it looks like a copy of the target, and teaches what is held out"
    ):
        MetaRec.fit([SOURCES[0], copy], TARGET, config=config(train={"compare_target_only": False}))


# ids that nobody knows


def test_unknown_ids_are_reported_by_their_places(fitted):
    known = fitted.domain.users.decode([3, 5])
    with pytest.raises(
        ValueError, match=r"unknown id 'x' at users\[1\], unknown id 7 \(ids here are strings, got int\)"
    ):
        fitted.recommend([known[0], "x", known[1], 7])
    with pytest.raises(ValueError, match=r"at users\[9\] and 15 more; on_unknown='skip' goes on without"):
        fitted.recommend(["x"] * 25)
    item = fitted.domain.items.decode([0])[0]
    with pytest.raises(ValueError, match=r"^unknown id 'y' at histories\[1\]\[1\]; "):
        fitted.recommend(histories=[[item], [item, "y"]])


def test_unknown_ids_can_be_skipped_and_the_others_answered(fitted):

    def same(a, b):  # scores of another batch may be rounded otherwise
        return [i for i, _ in a] == [i for i, _ in b] and [s for _, s in a] == pytest.approx(
            [s for _, s in b], rel=1e-4
        )

    known = fitted.domain.users.decode([3, 5])
    with pytest.warns(RuntimeWarning, match=r"unknown id 'x' at users\[1\]: left out"):
        recommended = fitted.recommend([known[0], "x", known[1]], k=3, on_unknown="skip")
    assert recommended[1] == []
    assert all(map(same, [recommended[0], recommended[2]], fitted.recommend(known, k=3)))
    a, b = fitted.domain.items.decode([0, 4])
    with pytest.warns(RuntimeWarning, match="left out"):
        recommended = fitted.recommend(histories=[[a, "y", b], ["y"], []], k=2, on_unknown="skip")
    assert same(recommended[0], fitted.recommend(histories=[[a, b]], k=2)[0])
    assert recommended[1] == [] and same(recommended[2], fitted.recommend(histories=[[]], k=2)[0])
    with pytest.warns(RuntimeWarning, match="left out"):
        assert fitted.recommend(["x"], on_unknown="skip") == [[]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"users": "u1"}, TypeError, "users must be a list, got the single str 'u1'"),
        ({"users": 5}, TypeError, "users must be a list, got the single int 5"),
        ({"histories": ["i1", "i2"]}, TypeError, r"histories\[0\] must be a list, got the single str 'i1'"),
        ({"users": np.array("u1")}, TypeError, "users must be a list, got the single ndarray array"),
        ({"histories": [None]}, TypeError, r"histories\[0\] must be a list, got the single NoneType None"),
        ({"users": [], "k": 2.5}, ValueError, "k must be an integer, got 2.5"),
        ({"users": [], "k": True}, ValueError, "k must be an integer, got True"),
        ({"users": [], "exclude_seen": "no"}, ValueError, "exclude_seen must be True or False, got 'no'"),
        ({"users": [], "on_unknown": "skpi"}, ValueError, "on_unknown must be .*; did you mean 'skip'"),
    ],
    ids=str,
)
def test_options_of_recommend_are_checked(fitted, options, error, message):
    with pytest.raises(error, match=message):
        fitted.recommend(**options)


# progress and Ctrl-C


def interrupting(at, times=1):
    """A reporter that presses Ctrl-C at its ``at``-th step, as a terminal would."""

    class Interrupting(Silent):
        steps = 0

        def step(self, *_):
            self.steps += 1
            if self.steps == at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

    return Interrupting()


def test_ctrl_c_saves_says_how_to_go_on_and_resumes(tmp_path):
    options = {"config": config(), "run_dir": tmp_path / "run"}
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped in .* at step \d+ .*; saved in .*run; .* resume=True goes on"
    ):
        MetaRec.fit(SOURCES, TARGET, reporter=interrupting(5), **options)
    assert signal.getsignal(signal.SIGINT) is before
    resumed, whole = MetaRec.fit(SOURCES, TARGET, resume=True, **options), MetaRec.fit(SOURCES, TARGET, config=config())
    assert resumed.recommend(["target-u1"]) == whole.recommend(["target-u1"])


def test_ctrl_c_without_a_run_dir_says_that_nothing_is_kept(fitted):
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, for fit was given no run_dir"):
        MetaRec.fit(SOURCES, TARGET, config=config(), reporter=interrupting(2))
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, for adapt was given no run_dir"):
        fitted.adapt(SOURCES[0], reporter=interrupting(1))
    with pytest.raises(KeyboardInterrupt, match="nothing is kept, for compare was given no run_dir"):
        compare(SOURCES, TARGET, config=config(), methods=("target_only",), reporter=interrupting(1))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as end:
        MetaRec.fit(SOURCES, TARGET, config=config(), run_dir=tmp_path, reporter=interrupting(3, times=2))
    assert not str(end.value) and not (tmp_path / "checkpoint" / "checkpoint.json").exists()


def test_who_handles_ctrl_c_himself_keeps_it():
    queries = []
    before = signal.signal(signal.SIGINT, lambda *_: queries.append(True))
    try:
        MetaRec.fit([], TARGET, config=config(train={"method": "target_only"}), reporter=interrupting(2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert queries == [True]


def test_fit_works_outside_the_main_thread():
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(MetaRec.fit, [], TARGET, config=config(train={"method": "target_only"}), progress=True)
        assert job.result().history.best_validation_ndcg > 0


def test_progress_is_shown_where_it_is_requested_or_seen(capsys, monkeypatch):
    options = {"config": config(train={"method": "target_only"}, model={"cooccurrence": "none"})}
    MetaRec.fit([], TARGET, **options)
    assert capsys.readouterr() == ("", "")  # no terminal
    MetaRec.fit([], TARGET, progress=True, **options)
    reported = capsys.readouterr()
    assert not reported.out and reported.err.startswith("fit: target: 40 users") and "fit finetune 1/" in reported.err
    assert re.search(r"^fit: \d+ s$", reported.err, re.MULTILINE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    MetaRec.fit([], TARGET, **options)
    assert "fit: target: 40 users" in capsys.readouterr().err
    MetaRec.fit([], TARGET, progress=False, **options)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="progress must be True or False, got 'bar'"):
        MetaRec.fit([], TARGET, progress="bar", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": ""}, "run_dir must name a folder, got an empty string"),
        ({"resume": True}, "resume=True needs run_dir, the folder of the run to go on with, got None"),
    ],
    ids=str,
)
def test_a_run_needs_a_folder_to_be_kept_in_or_gone_on_with(options, message):
    with pytest.raises(ValueError, match=message):
        MetaRec.fit(SOURCES, TARGET, config=config(), **options)
