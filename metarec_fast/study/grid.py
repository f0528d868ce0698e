"""What a study is: a description in frozen dataclasses, and the cells that it consists of."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from metarec_fast.checks import SEED, SHARE, Checked, check_choice, check_names, check_options, nearest, parse_json
from metarec_fast.config import Config
from metarec_fast.data.synthetic import check_sizes, synthetic
from metarec_fast.evaluation.baselines import BASELINES

FORMAT = 2  # of what a cell's hash covers, and of its file
Group = Literal["baseline", "plain", "recipe", "structure", "transfer", "ours", "ablation", "control", "mixed"]
Sources = Literal["related", "shuffled", "random", "copy"]
Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arm(Checked):
    """One way to make a recommender of the target."""

    name: str
    group: Group
    """What it is to the study: baseline, plain or structure (target only, without and with the target's own structure),
    recipe (an encoder alone, transferred as is usual), transfer (baseline of our architecture), ours, ablation,
    control, or mixed (sources of several kinds)."""
    baseline: str = ""
    """An untrained baseline by its name in ``evaluation.baselines``, or "best" for the best by validation."""
    options: Options = field(default_factory=dict)
    """Changes of the configuration by section, after the study's."""
    sources: tuple[Sources, ...] = ("related",)
    """related: the study's sources as they are. shuffled: each user's items in random order. random: all items in
    random order. copy: the target under other ids."""
    without: tuple[str, ...] = ()
    """Of the study's sources, those that this arm leaves out."""

    def check(self) -> None:
        named = f"arm {self.name!r}: "
        check_options(self, prefix=named)
        if not self.name or not set(self.name) <= SAFE:
            raise ValueError(f"the name of an arm must be letters, digits and any of '.+-_', got {self.name!r}")
        if self.baseline:
            check_choice(self.baseline, f"{named}baseline", ("best", *BASELINES))


@dataclass(frozen=True, kw_only=True)
class Comparison(Checked):
    """``arm`` against another; of several, in each cell against the one of the highest validation NDCG@10."""

    arm: str
    against: tuple[str, ...]
    title: str = ""

    def check(self) -> None:
        check_options(self, prefix="comparison.")
        if not self.against:
            raise ValueError(f"comparison.against must name what arm {self.arm!r} is compared with, got none")


@dataclass(frozen=True)
class Cell:
    """One arm on one target, with a share of its users and a seed."""

    arm: Arm
    target: str
    fraction: float
    seed: int

    def __str__(self) -> str:
        return f"{self.target} {self.fraction:g} {self.arm.name} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Study(Checked):
    """A grid of arms x targets x fractions x seeds, and the comparisons that it is made for.

    Raises ValueError for names that are repeated or unknown, and for options that no configuration has.
    """

    name: str
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    """A target that is among them is left out where it is the target."""
    arms: tuple[Arm, ...]
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    comparisons: tuple[Comparison, ...] = ()
    options: Options = field(default_factory=dict)
    """Changes of the default configuration by section, for every arm."""
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Values to try of options, such as {"model.dropout": (0.2, 0.5)}: every trained arm is trained once for each
    combination, and validation chooses. All of it counts as its cost."""
    synthetic: Mapping[str, Any] | None = None
    """Arguments of ``data.synthetic``, whose target, control and sources are then the domains."""
    shuffle_ties: bool = False
    """Events of one user at one time in random order, in all domains that have times."""

    def check(self) -> None:
        check_options(self, prefix="study.", ranges={"seeds": SEED, "fractions": SHARE})
        names = [arm.name for arm in self.arms]
        axes = {"arms": names, "targets": self.targets, "fractions": self.fractions, "seeds": self.seeds}
        for what, values in axes.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must be at least one and all different, got {', '.join(map(str, values))}")
        for arm in self.arms:
            if unknown := set(arm.without) - set(self.sources):
                raise ValueError(
                    f"arm {arm.name!r} leaves out {min(unknown)!r}, which is no source of the study"
                    + nearest(min(unknown), self.sources)
                )
        for comparison in self.comparisons:
            if unknown := {comparison.arm, *comparison.against} - set(names):
                raise ValueError(
                    f"a comparison names {min(unknown)!r}, which is no arm; arms are {', '.join(names)}"
                    + nearest(min(unknown), names)
                )
        for name, values in self.tune.items():
            if name.count(".") != 1:
                raise ValueError(f"study.tune must name options as section.option, got {name!r}")
            if not values:
                raise ValueError(f"study.tune must have values of {name!r} to try, got none")
        if self.synthetic is not None:
            known = signature(synthetic)
            check_names(self.synthetic, known.parameters, owner="study.synthetic", what="option", plural="options")
            given = known.bind(**self.synthetic)
            given.apply_defaults()
            check_sizes(given.arguments)
        for arm in self.arms:
            try:
                self.configs(Cell(arm, self.targets[0], self.fractions[0], self.seeds[0]))
            except ValueError as error:
                raise ValueError(f"arm {arm.name!r}: {error}") from error

    def cells(self) -> Iterator[Cell]:
        """Seed after seed, small fractions first: what is there early covers the whole grid."""
        for seed, fraction, target, arm in itertools.product(
            self.seeds, sorted(self.fractions), self.targets, self.arms
        ):
            yield Cell(arm, target, fraction, seed)

    def configs(self, cell: Cell) -> list[Config]:
        """The configurations of a cell, one for each combination of tuned values."""
        # a study has its own target-only arms
        own = {
            "train": {"seed": cell.seed, "compare_target_only": False},
            "data": {"target_fraction": cell.fraction},
        }
        tuned = {} if cell.arm.baseline else self.tune
        made = []
        for values in itertools.product(*tuned.values()):
            tried: dict[str, dict[str, Any]] = {}
            for name, value in zip(tuned, values, strict=True):
                section, _, option = name.partition(".")
                tried.setdefault(section, {})[option] = value
            made.append(Config().replace(**merged(self.options, cell.arm.options, own, tried)))
        return made

    def kinds(self, cell: Cell) -> tuple[Sources, ...]:
        """The kinds of sources that the cell's arm looks at: none for a baseline or a target-only model."""
        if cell.arm.baseline or all(config.train.method == "target_only" for config in self.configs(cell)):
            return ()
        return cell.arm.sources

    def sources_of(self, target: str, arm: Arm | None = None) -> list[str]:
        """The study's sources for a target, less those that the arm leaves out."""
        without = {target, *(() if arm is None else arm.without)}
        return [name for name in self.sources if name not in without]

    def hash(self, cell: Cell, fingerprints: Mapping[str, str]) -> str:
        """16 hexadecimal digits of all that a cell's figures depend on, the code's version aside.

        fingerprints: of every domain by its name (``data.fingerprint``).
        """
        kinds = self.kinds(cell)
        sources = self.sources_of(cell.target, cell.arm) if set(kinds) - {"copy"} else []
        record = {
            "format": FORMAT,
            "baseline": cell.arm.baseline,
            "configs": [dataclasses.asdict(config) for config in self.configs(cell)],
            "target": fingerprints[cell.target],
            "kinds": kinds,
            "sources": [fingerprints[name] for name in sources],
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    def only(self, **kept: Sequence[Any]) -> Study:
        """The part of the grid with these arms (by name), targets, fractions and seeds; empty sequences keep all.

        Raises ValueError for a value that the study does not have.
        """
        changes: dict[str, Any] = {}
        for axis, values in kept.items():
            if not values:
                continue
            by_name = {arm.name: arm for arm in self.arms} if axis == "arms" else {v: v for v in getattr(self, axis)}
            for value in values:
                if value not in by_name:
                    known = ", ".join(map(str, by_name))
                    raise ValueError(f"study {self.name!r} has no {axis[:-1]} {value!r}; {axis} are {known}")
            changes[axis] = tuple(whole for key, whole in by_name.items() if key in values)
        names = {arm.name for arm in changes.get("arms", self.arms)}
        comparisons = []
        for comparison in self.comparisons:
            against = tuple(name for name in comparison.against if name in names)
            if comparison.arm in names and against:
                comparisons.append(dataclasses.replace(comparison, against=against))
        return dataclasses.replace(self, **changes, comparisons=tuple(comparisons))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Study:
        """Raises ValueError for what is no study."""
        given = parse_json(text)
        if not isinstance(given, dict):
            raise ValueError("study must be a JSON object")
        for name, kind in (("arms", Arm), ("comparisons", Comparison)):
            many = given.get(name, [])
            if not isinstance(many, list):
                raise ValueError(f"{name} must be a list, got {many!r}")
            given[name] = [_made(kind, one) for one in many]
        return _made(Study, given)

    @staticmethod
    def load(path: str | Path) -> Study:
        """Raises ValueError naming the file if it is no study."""
        try:
            return Study.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no study: {error}") from error


SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.+-_")  # arms name files


def merged(*changes: Options) -> dict[str, dict[str, Any]]:
    """Changes of a configuration as one, later ones over earlier: together they may be what one alone may not."""
    made: dict[str, dict[str, Any]] = {}
    for options in changes:
        for section, values in options.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"{section} must be an object of options and their values, got {values!r}")
            made.setdefault(section, {}).update(values)
    return made


def _made(kind: type, given: Any) -> Any:
    """A dataclass from a JSON object. Raises ValueError for keys it has not or lacks."""
    name = kind.__name__.lower()
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be a JSON object, got {given!r}")
    fields = dataclasses.fields(kind)
    check_names(given, [f.name for f in fields], owner=name, what="key", plural="keys")
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"{name} needs the key {missing[0]!r}")
    return kind(**given)
