"""Configurations survive JSON, and say what they do not know."""

import dataclasses
import json
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from metarec_fast.config import PRESETS, SECTIONS, Config, ModelConfig, TrainConfig
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


def another(value, kind):
    """Another value that an option of this kind may have."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 or 1.0  # a share stays one
    return {int: lambda: 2 * value or 1, str: lambda: "cuda:1", tuple: lambda: (*value, 3.0)}[type(value)]()


def test_every_option_round_trips():
    """Each option changed to something else than its default."""
    changed = {}
    for section in dataclasses.fields(Config):
        one = getattr(Config(), section.name)
        kinds = get_type_hints(type(one))
        changed[section.name] = {k: another(v, kinds[k]) for k, v in dataclasses.asdict(one).items()}
    changed["train"]["compile"] = False  # not together with order 2
    changed["model"]["heads"] = 4
    config = Config().replace(**changed)
    assert dataclasses.asdict(config) == changed
    assert json.loads(config.to_json()) == json.loads(json.dumps(changed))
    assert Config.from_json(config.to_json()) == config


def test_a_list_from_a_study_is_the_tuple_that_it_stands_for():
    assert Config().replace(cooccurrence={"sizes": [0.5, 1.0, 2.0]}) == Config()


def test_options_left_out_have_their_defaults():
    assert Config.from_json("{}") == Config()
    assert Config.from_json('{"model": {"dim": 32}}') == Config(model=ModelConfig(dim=32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"modell": {}}', "no section 'modell'; sections are model, meta, train, cooccurrence, data"),
        ('{"model": {"dims": 3}}', "model has no option 'dims'; options are .*dim"),
        ("[]", "must be a JSON object"),
        ('{"model": 3}', "must be a JSON object"),
        ("{", "Expecting"),
        ('{"trian": {}}', "did you mean 'train'"),
        ('{"model": {"encodr": "lru"}}', "did you mean 'encoder'"),
        ('{"model": {"dim": 8, "dim": 16}}', "key 'dim' stands twice"),
        ('{"self": {}}', "no section 'self'"),
        ("[" * 100_000, "nested too deeply"),
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
    assert meta.source_loss_weight == literal.cooccurrence.source_loss_weight == 0


def test_options_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.dim = 3


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("cooccurrence", "similarity_inits", 0, "cooccurrence.similarity_inits must be at least 1, got 0"),
        ("cooccurrence", "similarity_batches", -3, "cooccurrence.similarity_batches must be at least 1, got -3"),
        ("cooccurrence", "folds", 1, "cooccurrence.folds must be at least 2, got 1"),
        ("cooccurrence", "evaluate_every", 0, "cooccurrence.evaluate_every must be at least 1, got 0"),
        ("cooccurrence", "batch_size", 0, "cooccurrence.batch_size must be at least 1, got 0"),
        ("cooccurrence", "hidden", 0, "cooccurrence.hidden must be at least 1, got 0"),
        ("cooccurrence", "warmup_steps", -1, "cooccurrence.warmup_steps must be at least 0, got -1"),
        ("cooccurrence", "finetune_passes", -1.0, "cooccurrence.finetune_passes must be at least 0, got -1"),
        ("cooccurrence", "finetune_passes", float("inf"), "cooccurrence.finetune_passes must be finite, got inf"),
        ("cooccurrence", "source_loss_weight", -0.5, "cooccurrence.source_loss_weight must be at least 0, got -0.5"),
        ("cooccurrence", "source_loss_weight", float("inf"), "cooccurrence.source_loss_weight must be finite, got inf"),
        ("train", "finetune_passes", -1.0, "train.finetune_passes must be at least 0, got -1.0"),
        ("meta", "source_loss_weight", -1.0, "meta.source_loss_weight must be at least 0, got -1.0"),
        ("cooccurrence", "lr", float("nan"), "cooccurrence.lr must be at least 0, got nan"),
        ("cooccurrence", "sizes", (), "cooccurrence.sizes must be one number or more, got none"),
        ("cooccurrence", "sizes", (1.0, -1.0), r"cooccurrence.sizes\[1\] must be above 0, got -1.0"),
        ("cooccurrence", "sizes", "12", "cooccurrence.sizes must be a list, got '12'"),
        ("cooccurrence", "sizes", np.array(1.0), "cooccurrence.sizes must be a list, got array"),
        ("model", "encoder", "LRU", "model.encoder must be 'lru' or 'sasrec', got 'LRU'; did you mean 'lru'?"),
        ("model", "encoder", "xyz", "got 'xyz'$"),
        ("model", "vq", "residul", "did you mean 'residual'"),
        ("meta", "similarity_sign", "desent", "did you mean 'descent'"),
        ("meta", "order", True, "meta.order must be 1 or 2, got True"),
        ("meta", "order", "2", "did you mean 2?"),
        ("data", "split", "leave-one-out", "did you mean 'leave_one_out'"),
        ("data", "mask_history", "false", "data.mask_history must be True or False, got 'false'; did you mean False?"),
        ("data", "mask_history", 0, "must be True or False, got 0"),
        ("data", "target_fraction", 0, r"data.target_fraction must be in \(0, 1\], got 0"),
        ("model", "layers", True, "model.layers must be an integer, got True"),
        ("model", "layers", 2.5, "model.layers must be an integer, got 2.5"),
        ("model", "layers", "2", "model.layers must be an integer, got '2'"),
        ("model", "layers", 10**9, "model.layers must be at most 256"),
        ("model", "dropout", 1.0, r"model.dropout must be in \[0, 1\), got 1.0"),
        ("model", "dropout", "0.5", "model.dropout must be a number, got '0.5'"),
        ("model", "dropout", None, "model.dropout must be a number, got None"),
        ("train", "seed", 2**63, r"train.seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
        ("train", "seed", -1, r"train.seed must be in \[0, 2\*\*63\), got -1"),
        ("train", "lr", True, "train.lr must be a number, got True"),
        pytest.param("train", "lr", 10**400, r"train.lr must be finite, got 10+\.\.\.$", id="train-lr-huge"),
        ("train", "patience", 0, "train.patience must be at least 1, got 0"),
        ("train", "device", "gpu", "train.device must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ("train", "device", 0, "train.device must be a string, got 0"),
        ("train", "capture", True, "train.capture needs train.device 'cuda'"),
        ("model", "dim", 12, "model.dim must be a multiple of model.codebook_heads, got dim 12 and codebook_heads 8"),
        ("cooccurrence", "average_decay", 2.0, r"cooccurrence.average_decay must be in \[0, 1\), got 2.0"),
        ("meta", "temperature", 0.0, "meta.temperature must be above 0, got 0.0"),
    ],
)
def test_values_that_cannot_be_are_named(section, option, value, message):
    with pytest.raises(ValueError, match=message):
        Config().replace(**{section: {option: value}})


NUMBERS = [(section, f.name) for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(("section", "option"), NUMBERS, ids=lambda x: x)
def test_no_option_takes_what_is_of_another_kind(section, option):
    """From Python, from replace and from a file alike, and always by its full name."""
    wrong = ["no such value", None, {}, [], -1, float("nan"), float("inf"), 10**400, object()]
    if option == "sizes":
        wrong = [*wrong[:3], *([value] for value in wrong)]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"^{section}\.{option}\b.* (must be|needs) "):
            SECTIONS[section](**{option: value})
        with pytest.raises(ValueError, match=rf"^{section}\.{option}\b"):
            Config().replace(**{section: {option: value}})
        if "object" not in repr(value):
            with pytest.raises(ValueError, match=rf"{section}\.{option}\b"):
                Config.from_json(json.dumps({section: {option: value}}))


def test_what_numpy_and_files_write_is_converted():
    config = Config().replace(
        model={"dim": np.int64(32), "layers": 1e0, "dropout": np.float32(0.5), "encoder": np.str_("sasrec")},
        meta={"order": np.int32(2), "inner_lr": 1},
        train={"seed": np.uint64(2**40), "compare_target_only": np.False_},
    )
    assert Config.from_json(config.to_json()) == config
    values = (config.model.dim, config.model.layers, config.model.dropout, config.model.encoder, config.meta.order)
    assert values == (32, 1, 0.5, "sasrec", 2)
    assert [type(v) for v in values] == [int, int, float, str, int]
    assert type(config.meta.inner_lr) is float and type(config.train.seed) is int
    assert config.train.compare_target_only is False


def test_options_that_fit_together_alone_may_be_changed_together():
    together = Config().replace(model={"dim": 12, "codebook_heads": 3})
    assert together.model.dim == 12
    with pytest.raises(ValueError, match=r"heads 2; the nearest that divides it is [13]"):
        Config().replace(model={"dim": 9, "codebook_heads": 3, "encoder": "sasrec"})
    assert Config().replace(model={"dim": 9, "vq": "none"}).model.codebook_heads == 8  # which nothing reads


def test_what_cannot_go_together_across_sections():
    with pytest.raises(ValueError, match=r"train\.compile needs meta\.order 1, got 2"):
        Config().replace(train={"compile": True}, meta={"order": 2})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trian": {"seed": 1}}, "no section 'trian'; sections are model, .*; did you mean 'train'"),
        ({"train": {"sed": 1}}, "train has no option 'sed'; options are .*; did you mean 'seed'"),
        ({"train": 3}, "train must be an object of options and their values, got 3"),
        ({"model": TrainConfig()}, "model must be an object"),
    ],
    ids=str,
)
def test_replace_names_what_it_does_not_know(sections, message):
    with pytest.raises(ValueError, match=message):
        Config().replace(**sections)


def test_a_section_of_another_kind_is_named():
    assert Config().replace(model=ModelConfig(dim=8)) == Config(model=ModelConfig(dim=8))
    with pytest.raises(ValueError, match=r"model must be ModelConfig, got \{'dim': 8\}"):
        Config(model={"dim": 8})
