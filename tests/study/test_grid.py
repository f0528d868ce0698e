"""A study as its description: what it asks for, what tells cells apart, and what is refused."""

import dataclasses
import json

import pytest

from metarec_fast.config import metaadapt_literal
from metarec_fast.study import PRESETS, Arm, Cell, Comparison, Study
from tests.study.problems import ARMS, study

DATA = {"target": "t", "source0": "a", "source1": "b"}


def cell(name, fraction=0.5, seed=0, arms=ARMS):
    return Cell(next(arm for arm in arms if arm.name == name), "target", fraction, seed)


def test_cells_cover_the_grid_seed_after_seed():
    cells = list(study().cells())
    assert len(cells) == len(set(map(str, cells))) == 5 * 2 * 2
    assert [c.seed for c in cells] == [0] * 10 + [1] * 10
    assert [c.fraction for c in cells[:10]] == [0.5] * 5 + [1.0] * 5
    assert str(cells[3]) == "target 0.5 ours seed 0"


def test_options_of_the_arm_come_after_those_of_the_study():
    changed = study(options={"train": {"lr": 0.5, "method": "pretrain"}})
    (config,) = changed.configs(cell("alone", 0.5, 1))
    assert (config.train.lr, config.train.method, config.train.seed) == (0.5, "target_only", 1)
    assert config.data.target_fraction == 0.5


def test_tuning_makes_every_combination_for_trained_arms():
    tuned = study(tune={"model.dropout": (0.1, 0.4), "train.lr": (1e-3, 1e-2)})
    tried = [(c.model.dropout, c.train.lr) for c in tuned.configs(cell("ours"))]
    assert tried == [(0.1, 1e-3), (0.1, 1e-2), (0.4, 1e-3), (0.4, 1e-2)]
    assert len(tuned.configs(cell("popularity"))) == 1


def test_a_hash_is_of_everything_the_figures_depend_on():
    plain = study()
    base = plain.hash(cell("ours"), DATA)
    assert base == study(name="other", seeds=(0,)).hash(cell("ours"), DATA)  # where a cell stands does not count
    others = [
        plain.hash(cell("ours", seed=1), DATA),
        plain.hash(cell("ours", fraction=1.0), DATA),
        plain.hash(cell("shuffled"), DATA),
        plain.hash(cell("ours"), DATA | {"source1": "c"}),
        plain.hash(cell("ours"), DATA | {"target": "c"}),
        study(sources=("source1", "source0")).hash(cell("ours"), DATA),
        study(tune={"model.dropout": (0.1,)}).hash(cell("ours"), DATA),
    ]
    assert len({base, *others}) == 8
    # sources that an arm does not look at do not count
    for name in ("alone", "popularity"):
        assert plain.hash(cell(name), DATA) == plain.hash(cell(name), {"target": "t"} | {"source0": "", "source1": ""})


def test_a_target_is_no_source_of_itself():
    assert study(targets=("target", "source0")).sources_of("source0") == ["source1"]


def test_an_arm_leaves_sources_out():
    part = Arm(name="without-1", group="ablation", without=("source1",))
    plan = study(arms=(*ARMS, part))
    assert plan.sources_of("target", part) == ["source0"] and plan.sources_of("target") == ["source0", "source1"]
    hashed = plan.hash(cell("without-1", arms=plan.arms), {"target": "t", "source0": "a"})
    # the same cell as a study of that source alone has
    assert hashed == study(sources=("source0",)).hash(cell("ours"), DATA) != plan.hash(cell("ours"), DATA)
    with pytest.raises(ValueError, match="arm 'odd' leaves out 'it', which is no source of the study"):
        study(arms=(*ARMS, Arm(name="odd", group="ours", without=("it",))))


def test_cells_train_no_target_only_model_beside():
    assert all(not config.train.compare_target_only for c in study().cells() for config in study().configs(c))


def test_only_keeps_a_part_and_the_comparisons_that_it_has():
    part = study().only(arms=["ours", "best-baseline"], seeds=[1], fractions=(), targets=())
    assert [c.arm.name for c in part.cells()] == ["best-baseline", "ours"] * 2
    assert [(c.arm, c.against) for c in part.comparisons] == [("ours", ("best-baseline",))]
    with pytest.raises(ValueError, match="study 'tiny' has no seed 7; seeds are 0, 1"):
        study().only(seeds=[7])


@pytest.mark.parametrize("made", [study, *PRESETS.values()])
def test_json_gives_the_same_study(made):
    first = made()
    again = Study.from_json(first.to_json())
    cells = list(zip(first.cells(), again.cells(), strict=True))
    assert cells and all(first.configs(a) == again.configs(b) for a, b in cells[:40])
    assert (again.comparisons, again.targets, again.synthetic) == (first.comparisons, first.targets, first.synthetic)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": (ARMS[0], ARMS[0])}, "arms must be at least one and all different, got popularity, popularity"),
        ({"targets": ()}, "targets must be at least one"),
        ({"fractions": (0.0,)}, r"study.fractions\[0\] must be in \(0, 1\], got 0.0"),
        ({"comparisons": (Comparison(arm="ours", against=("it",)),)}, "a comparison names 'it', which is no arm"),
        ({"options": {"model": {"wings": 2}}}, "model has no option 'wings'"),
        ({"options": {"wings": {}}}, "configuration has no section 'wings'"),
        ({"tune": {"model.wings": (1,)}}, "arm 'alone': model has no option 'wings'"),
        ({"fractions": (0.5, 0.5)}, "fractions must be at least one and all different"),
        ({"fractions": ()}, "fractions must be at least one"),
        ({"fractions": ("all",)}, r"study.fractions\[0\] must be a number, got 'all'"),
        ({"seeds": (0, -1)}, r"study.seeds\[1\] must be in \[0, 2\*\*63\), got -1"),
        ({"seeds": 3}, "study.seeds must be a list, got 3"),
        ({"targets": "target"}, "study.targets must be a list, got 'target'"),
        ({"shuffle_ties": "no"}, "study.shuffle_ties must be True or False, got 'no'; did you mean False"),
        ({"options": {"model": {"encoder": "LRU"}}}, "arm 'popularity': model.encoder must be .*did you mean 'lru'"),
        ({"options": {"model": 3}}, "study.options.model must be an object"),
        ({"tune": {"train.loss": ("full", "fulll")}}, "train.loss must be .*did you mean 'full'"),
        ({"tune": {"dropout": (0.1,)}}, "study.tune must name options as section.option, got 'dropout'"),
        ({"tune": {"model.dropout": ()}}, "study.tune must have values of 'model.dropout' to try, got none"),
        ({"synthetic": {"num_source": 1}}, "study.synthetic has no option 'num_source'; .*did you mean 'num_sources'"),
        ({"synthetic": {"noise": 2}}, r"noise must be in \[0, 1\], got 2"),
    ],
    ids=str,
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        study(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "the name of an arm must be letters"),
        ({"group": "our"}, "arm 'a': group must be 'baseline', .*, got 'our'; did you mean 'ours'"),
        ({"sources": ("related", "shufled")}, r"arm 'a': sources\[1\] must be .*; did you mean 'shuffled'"),
        ({"sources": "related"}, "arm 'a': sources must be a list, got 'related'"),
        ({"options": {"train": 3}}, "arm 'a': options.train must be an object"),
        ({"baseline": "item-knn"}, "arm 'a': baseline must be 'best', .*; did you mean 'item-kNN'"),
    ],
    ids=str,
)
def test_an_arm_that_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Arm(**{"name": "a", "group": "ours", **change})
    assert Arm(name="a", group="ours", sources=["copy"]).sources == ("copy",)


def test_a_comparison_needs_something_to_compare_with():
    with pytest.raises(ValueError, match=r"comparison\.against must name what arm 'a' is compared with, got none"):
        Comparison(arm="a", against=())


def test_options_that_fit_only_together_may_come_from_study_arm_and_tuning():
    """Eight heads of codes, the default, do not divide 12."""
    arms = (dataclasses.replace(ARMS[3], options={"model": {"dim": 12}}),)
    made = study(arms=arms, comparisons=(), options={}, tune={"model.codebook_heads": (3, 6)})
    assert [c.model.codebook_heads for c in made.configs(cell("ours", arms=arms))] == [3, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(seeds=["0"]), r"study.seeds\[0\] must be an integer, got '0'"),
        (lambda s: s.update(arms={"name": "a"}), "arms must be a list"),
        (
            lambda s: s["arms"][3].update(options={"train": {"method": "metrec"}}),
            "arm 'ours': .*did you mean 'metarec'",
        ),
        (lambda s: s["arms"][0].update(gruop="ours"), "arm has no key 'gruop'; .*did you mean 'group'"),
        (lambda s: s.update(wings=1), "study has no key 'wings'"),
        (lambda s: s.pop("targets"), "study needs the key 'targets'"),
        (lambda s: s["arms"][0].pop("group"), "arm needs the key 'group'"),
        (lambda s: s["arms"].append(3), "arm must be a JSON object, got 3"),
    ],
    ids=lambda value: None if callable(value) else value,  # an address is another in each process
)
def test_a_file_that_is_no_study_is_named(tmp_path, change, message):
    record = json.loads(study().to_json())
    change(record)
    (tmp_path / "s.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"s.json is no study: {message}"):
        Study.load(tmp_path / "s.json")


def test_the_published_grid_has_every_arm_of_the_issue_once():
    published = PRESETS["published"]()
    first = {arm.name: published.configs(Cell(arm, published.targets[0], 0.1, 0))[0] for arm in published.arms}
    assert len(list(published.cells())) == len(published.arms) * 3 * 4 * 3
    trained = [
        name
        for name, arm in zip(first, published.arms, strict=True)
        if not arm.baseline and arm.sources == ("related",)
    ]
    assert len({json.dumps(dataclasses.asdict(first[name])) for name in trained}) == len(trained)
    assert first["metaadapt-literal"].meta == metaadapt_literal().meta
    plain = first["sasrec"]
    assert (plain.model.encoder, plain.model.vq, plain.model.init, plain.model.cooccurrence) == (
        *("sasrec", "none", "random"),
        "none",
    )
    steps = {sum((c.train.warmup_steps, c.train.meta_steps, c.train.finetune_steps)) for c in first.values()}
    assert len(steps) == 1  # the same budget for every arm
    assert [c for c in published.comparisons if c.arm == "ours"]
