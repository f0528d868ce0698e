"""Fit, ask, save, load: what people do with MetaRec."""

import json
import shutil

import numpy as np
import pytest
import torch

from metarec_fast import MetaRec
from metarec_fast.api import compare
from metarec_fast.data import Domain, Sequences, Vocabulary
from tests.tiny import DOMAINS, config

FILES = ("metarec.json", "model.safetensors", "domain/domain.json", "domain/items.npy")
SOURCES, TARGET = DOMAINS.sources, DOMAINS.target


@pytest.fixture(scope="module")
def fitted():
    return MetaRec.fit(SOURCES, TARGET, config=config())


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    fitted.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def items_of(answers):
    return [[item for item, _ in answer] for answer in answers]


def test_a_saved_model_is_the_model(fitted, saved):
    loaded = MetaRec.from_pretrained(saved)
    for split in ("valid", "test"):
        want, got = fitted.evaluate(split), loaded.evaluate(split)
        assert np.array_equal(got.greater, want.greater) and np.array_equal(got.equal, want.equal)
    users = list(TARGET.users)
    assert loaded.recommend(users, k=5) == fitted.recommend(users, k=5)
    assert loaded.config == fitted.config
    assert loaded.history == fitted.history
    assert loaded.evidence_weight == fitted.evidence_weight
    assert loaded.domain.name == "target"


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


def test_another_format_is_refused(copy):
    facts = json.loads((copy / "metarec.json").read_text())
    (copy / "metarec.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        MetaRec.from_pretrained(copy)


def test_a_folder_saved_again_is_not_whole_until_it_is(fitted, copy, monkeypatch):
    monkeypatch.setattr("metarec_fast.api.save_domain", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fitted.save_pretrained(copy)
    with pytest.raises(ValueError, match=r"metarec\.json is missing"):
        MetaRec.from_pretrained(copy)


def test_recommendations_are_the_best_scores_of_the_catalogue(fitted):
    users = ["target-u3", "target-u0"]
    answers = fitted.recommend(users, k=7, exclude_seen=False)
    rows = [TARGET.sequences[3], TARGET.sequences[0]]
    read = Sequences(np.cumsum([0, *map(len, rows)]), np.concatenate(rows).astype(np.int64), TARGET.num_items)
    scores = fitted.scorer().prepare(read)(0, TARGET.num_items)
    for answer, row in zip(answers, scores, strict=True):
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


def test_k_beyond_the_catalogue(fitted):
    (items,) = items_of(fitted.recommend(["target-u1"], k=10_000, exclude_seen=False))
    assert sorted(items) == sorted(TARGET.items)


def test_a_user_is_their_history(fitted):
    history = TARGET.items.decode(TARGET.sequences[4])
    (by_user,), (by_history,) = fitted.recommend(["target-u4"]), fitted.recommend(histories=[history])
    assert items_of([by_user]) == items_of([by_history])
    assert np.allclose([s for _, s in by_user], [s for _, s in by_history])


def test_an_empty_history_is_answered_by_bias_and_does_not_touch_others(fitted):
    history = list(TARGET.items)[:3]
    alone = fitted.recommend(histories=[[]], k=3)
    beside = fitted.recommend(histories=[history, []], k=3)
    bias = fitted.model.table("target").bias
    assert [s for _, s in alone[0]] == pytest.approx(bias.topk(3).values.tolist())
    assert items_of(alone)[0] == items_of(beside)[1]
    assert items_of(fitted.recommend(histories=[history], k=3))[0] == items_of(beside)[0]


def test_nobody_asked(fitted):
    assert fitted.recommend(users=[]) == []


@pytest.mark.parametrize(
    ("asked", "message"),
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
def test_recommend_says_what_is_wrong(fitted, asked, message):
    with pytest.raises(ValueError, match=message):
        fitted.recommend(**asked)


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


def test_the_weight_of_evidence_is_the_best_on_validation(fitted):
    tried = fitted.history["evidence_weight"]["validation_ndcg@10"]
    assert fitted.evaluate("valid").ndcg[10] == max(tried.values())
    assert tried["0.0"] == fitted.evaluate("valid", transitions=False).ndcg[10]


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
    with pytest.raises(ValueError, match="methods must be among target_only, pretrain, joint, metarec, got 'magic'"):
        compare(SOURCES, TARGET, config=config(), methods=("magic",))


def test_another_configuration_leaves_the_run_folder_as_it_was(tmp_path):
    MetaRec.fit(SOURCES, TARGET, config=config(), run_dir=tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        MetaRec.fit(SOURCES, TARGET, config=config(train={"seed": 5}), run_dir=tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["seed"] == 0


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        MetaRec.fit(SOURCES, TARGET, config=config(train={"threads": 1, "finetune_steps": 1}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
