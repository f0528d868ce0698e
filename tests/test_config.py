"""Configurations survive JSON, and say what they do not know."""

import dataclasses
import json

import pytest

from metarec_fast.config import PRESETS, Config, ModelConfig
from metarec_fast.models.recommender import Recommender


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_round_trips_and_builds(name, tmp_path):
    preset = PRESETS[name]()
    assert Config.from_json(preset.to_json()) == preset
    (tmp_path / "config.json").write_text(preset.to_json())
    assert Config.load(tmp_path / "config.json") == preset
    assert Recommender(preset.model, {"a": 5}).config == preset.model


def test_presets_differ_from_one_another():
    texts = {preset().to_json() for preset in PRESETS.values()}
    assert len(texts) == len(PRESETS)


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 1.0  # a share stays one
    return value + {int: 1, str: "x", tuple: (3.0,)}[type(value)]


def test_every_option_round_trips():
    """Each option changed to something else than its default."""
    changed = {}
    for section in dataclasses.fields(Config):
        values = dataclasses.asdict(getattr(Config(), section.name))
        changed[section.name] = {k: another(v) for k, v in values.items()}
    config = Config().replace(**changed)
    assert dataclasses.asdict(config) == changed
    assert json.loads(config.to_json()) == json.loads(json.dumps(changed))
    assert Config.from_json(config.to_json()) == config


def test_a_list_from_a_study_is_the_tuple_that_it_stands_for():
    assert Config().replace(evidence={"sizes": [0.5, 1.0, 2.0]}) == Config()


def test_options_left_out_have_their_defaults():
    assert Config.from_json("{}") == Config()
    assert Config.from_json('{"model": {"dim": 32}}') == Config(model=ModelConfig(dim=32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"modell": {}}', "no section 'modell'; sections are model, meta, train, evidence, data"),
        ('{"model": {"dims": 3}}', "model has no option 'dims'; options are .*dim"),
        ("[]", "must be a JSON object"),
        ('{"model": 3}', "must be a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_what_is_unknown_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(text)


def test_replace_changes_what_it_names_and_nothing_else():
    config = Config().replace(train={"seed": 3}, model={"dim": 16})
    assert (config.train.seed, config.model.dim) == (3, 16)
    assert config.replace(train={"seed": 0}, model={"dim": 64}) == Config()


def test_metaadapt_literal_has_the_published_constants():
    literal = PRESETS["metaadapt_literal"]()
    meta = literal.meta
    assert (meta.order, meta.inner_steps, meta.inner_lr, meta.temperature) == (2, 3, 1e-5, 0.01)
    assert (meta.similarity_scope, meta.similarity_sign, meta.weighting) == ("tensor_mean", "ascent", "softmax")
    assert meta.same_batch and meta.similarity_decay == 0
    assert meta.source_loss_weight == literal.evidence.source_loss_weight == 0


def test_options_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("evidence", "similarity_starts", 0, "evidence.similarity_starts must be at least 1, got 0"),
        ("evidence", "similarity_batches", -3, "evidence.similarity_batches must be at least 1, got -3"),
        ("evidence", "folds", 1, "evidence.folds must be at least 2, got 1"),
        ("evidence", "evaluate_every", 0, "evidence.evaluate_every must be at least 1, got 0"),
        ("evidence", "batch_size", 0, "evidence.batch_size must be at least 1, got 0"),
        ("evidence", "hidden", 0, "evidence.hidden must be at least 1, got 0"),
        ("evidence", "warmup_steps", -1, "evidence.warmup_steps must be at least 0, got -1"),
        ("evidence", "finetune_passes", -1.0, "evidence.finetune_passes must be at least 0, got -1"),
        ("evidence", "finetune_passes", float("inf"), "evidence.finetune_passes must be finite, got inf"),
        ("evidence", "source_loss_weight", -0.5, "evidence.source_loss_weight must be at least 0, got -0.5"),
        ("evidence", "source_loss_weight", float("inf"), "evidence.source_loss_weight must be finite, got inf"),
        ("train", "finetune_passes", -1.0, "train.finetune_passes must be finite and at least 0, got -1.0"),
        ("meta", "source_loss_weight", -1.0, "meta.source_loss_weight must be finite and at least 0, got -1.0"),
        ("evidence", "lr", float("nan"), "evidence.lr must be at least 0, got nan"),
        ("evidence", "sizes", (), r"evidence.sizes must be one positive number or more, got \(\)"),
        ("evidence", "sizes", (1.0, -1.0), r"evidence.sizes must be .* got \(1.0, -1.0\)"),
        ("evidence", "average_decay", 2.0, r"evidence.average_decay must be in \[0, 1\), got 2.0"),
        ("meta", "temperature", 0.0, "meta.temperature must be above 0, got 0.0"),
    ],
)
def test_values_that_cannot_be_are_named(section, option, value, message):
    with pytest.raises(ValueError, match=message):
        Config().replace(**{section: {option: value}})
