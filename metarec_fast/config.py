"""Every option of a run, as frozen dataclasses. Presets are functions that return a whole configuration.

Whatever an option comes from, it is checked when its section is made: a value of another kind, none of the choices or
out of range is a ValueError that names the option. Numbers are finite and at least 0; the tables of ranges say more.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from metarec_fast.checks import (
    DECAY,
    POSITIVE,
    POSITIVE_COUNT,
    SEED,
    SHARE,
    Checked,
    Range,
    check_names,
    check_options,
    parse_json,
    shown,
)

RANGES = {
    "model": {
        **dict.fromkeys(("dim", "heads", "codebook_heads"), Range(1, 2**16)),
        "layers": Range(1, 256),
        "dropout": DECAY,
        "max_length": Range(1, 2**20),
        "codebook_size": Range(1, 2**24),
    },
    "meta": {
        "inner_steps": POSITIVE_COUNT,
        "temperature": POSITIVE,
        "similarity_decay": DECAY,
    },
    "train": {
        **dict.fromkeys(("batch_size", "negatives", "evaluate_every", "patience"), POSITIVE_COUNT),
        "clip": POSITIVE,
        "seed": SEED,
        "threads": Range(0, 1024),
    },
    "cooccurrence": {
        **dict.fromkeys(("similarity_inits", "similarity_batches", "batch_size", "evaluate_every"), POSITIVE_COUNT),
        "hidden": Range(1, 2**16),
        "sizes": POSITIVE,
        "folds": Range(2, 2**20),
        "average_decay": DECAY,
    },
    "data": {"target_fraction": SHARE},
}
DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """The recommender: private item tables, a shared codebook, a shared encoder."""

    dim: int = 64
    encoder: Literal["lru", "sasrec"] = "lru"
    layers: int = 2
    heads: int = 2
    """Attention heads (sasrec)."""
    dropout: float = 0.5
    max_length: int = 50
    """Most recent events that the encoder reads."""
    init: Literal["random", "spectral", "aligned"] = "aligned"
    """Item table: small random numbers, or the leading singular vectors of the domain's own co-occurrence, as they are
    or turned so that coordinates go with how items are used (`data.descriptors`) as in the first domain."""
    init_scale: float = 0.5
    """Length of an item row at a spectral or aligned initialisation."""
    vq: Literal["residual", "quantized", "none"] = "residual"
    """What the encoder reads: z + q, q alone, or z alone (z: normalised item rows, q: their codes)."""
    codebook_heads: int = 8
    codebook_size: int = 256
    commitment_weight: float = 0.25
    vq_loss_weight: float = 1.0
    vq_gradient: Literal["straight_through", "rotation"] = "straight_through"
    unique_items: Literal["auto", "always", "never"] = "auto"
    """Find the codes of each item of a batch once, however often it occurs: the same result, with less work where
    items repeat. auto: for batches of more positions than the catalogue has items. On a GPU: of each item of the
    catalogue, since how many a batch has would have to be waited for."""
    cooccurrence: Literal["learned", "transitions", "none"] = "learned"
    """What stands beside the encoder's scores, by a weight chosen on validation. learned: a network over what the
    domain's statistics say of each candidate, trained on all domains alike. transitions: its own transitions as they
    are."""

    def check(self) -> None:
        check_options(self, prefix="model.", ranges=RANGES["model"])
        if self.vq != "none":
            self._check_divides("codebook_heads")
        if self.encoder == "sasrec":
            self._check_divides("heads")

    def _check_divides(self, name: str) -> None:
        parts = getattr(self, name)
        if self.dim % parts:
            divisors = [n for n in range(1, self.dim + 1) if self.dim % n == 0]
            near = min(divisors, key=lambda n: abs(n - parts))
            raise ValueError(
                f"model.dim must be a multiple of model.{name}, got dim {self.dim} and {name} {parts}; "
                f"the nearest that divides it is {near}"
            )


@dataclass(frozen=True, kw_only=True)
class MetaConfig(Checked):
    """The meta step: what is taken from each source, and how the target decides."""

    order: Literal[1, 2] = 1
    """1: first order. 2: exact, differentiating through the inner steps; a compiled encoder has no second
    derivatives."""
    inner_steps: int = 1
    inner_lr: float = 0.1
    same_batch: bool = False
    """All inner steps on one batch instead of a fresh one each."""
    temperature: float = 0.1
    """Of the softmax over similarities. This, weighting, similarity_scope and similarity_sign are the encoder's and the
    co-occurrence scorer's alike."""
    weighting: Literal["softmax", "uniform"] = "softmax"
    similarity_scope: Literal["flat", "tensor_mean"] = "flat"
    """Cosine over all shared parameters at once, or the mean of the cosines of each tensor."""
    similarity_decay: float = 0.95
    """Smoothing of both gradients over steps before the cosine; 0 compares single batches."""
    similarity_sign: Literal["descent", "ascent"] = "descent"
    """descent: theta - phi, so that a helpful source scores high. ascent: phi - theta, as MetaAdapt's code has it."""
    source_loss_weight: float = 100.0
    """How much of each source's own descent direction joins its rescaled meta gradient. Few target users overfit an
    encoder: their gradient selects sources well and directs the encoder badly (docs/log/alignment.md). The
    co-occurrence scorer has a weight of its own."""
    target_pass: Literal["loop", "vmap"] = "loop"
    """The target's losses after adaptation to each source: one after the other, or vmapped into one pass of few and
    large operations, which suits a GPU and keeps a gradient of the target's table for each source."""
    target_loss_weight: float = 1.0
    """How much the target's gradient after adaptation counts; 0, with uniform weighting, leaves Reptile's step."""

    def check(self) -> None:
        check_options(self, prefix="meta.", ranges=RANGES["meta"])


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """The three stages: warm-up on the sources (none by default), meta-transfer, fine-tuning on the target."""

    method: Literal["metarec", "pretrain", "joint", "target_only"] = "metarec"
    """metarec: all three stages. pretrain: the source steps are all of the warm-up's kind. joint: all steps train all
    domains together. target_only: fine-tuning alone, of everything."""
    warmup_steps: int = 0
    """On all sources alike, before the target weighs them."""
    meta_steps: int = 400
    finetune_steps: int = 800
    """At most, unless ``finetune_passes`` asks for more; target_only and joint may use the steps of all stages."""
    finetune_passes: float = 10.0
    """Fine-tuning may take as many steps as show it each of the target's users so often, if these are more."""
    finetune_scope: Literal["gradual", "all", "table"] = "gradual"
    """What fine-tuning moves. table: the target's item table alone, the shared parameters stay as the sources made
    them. gradual: the table alone for half of the steps, then, from the best of these, everything. target_only, with
    none that sources made, trains everything; joint has no fine-tuning."""
    batch_size: int = 128
    lr: float = 1e-3
    finetune_lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the shared parameters' gradient."""
    loss: Literal["full", "sampled"] = "full"
    """Softmax over the whole catalogue, or over shared negatives with logQ correction."""
    negatives: int = 512
    negative_distribution: Literal["uniform", "popularity"] = "popularity"
    window: Literal["last", "sliding", "crop"] = "last"
    evaluate_every: int = 25
    patience: int = 10
    """Evaluations without a better validation NDCG@10 before fine-tuning stops, in each half of a gradual one."""
    compare_target_only: bool = True
    """After training with sources, train on the target alone with as many steps too, and return what validation likes
    better: never worse than target only."""
    seed: int = 0
    compile: bool = False
    """torch.compile the encoder."""
    capture: bool = False
    """Run meta steps as one CUDA graph each, on batches filled to a fixed size. Only on a GPU; not yet run on one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's setting."""
    device: str = "cpu"

    def check(self) -> None:
        check_options(self, prefix="train.", ranges=RANGES["train"])
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"train.device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class CooccurrenceConfig(Checked):
    """Training of the co-occurrence scorer: the stages of ``train.method``, over evaluation cases, not windows."""

    hidden: int = 64
    similarity_inits: int = 5
    """Fresh scorers in which the first descent directions of sources and target are compared, for the weights."""
    similarity_batches: int = 8
    """Of each domain and start."""
    warmup_steps: int = 2000
    """Of one source each, as often as its weight says."""
    meta_steps: int = 50
    source_loss_weight: float = 1.0
    """As ``meta.source_loss_weight``, for the scorer, which has few parameters that a target could overfit."""
    finetune_steps: int = 150
    """At most, unless ``finetune_passes`` asks for more; the target alone may use the steps of all stages."""
    finetune_passes: float = 5.0
    """As many steps on the target as it takes to draw each of its users so often: with more users, more steps."""
    batch_size: int = 64
    lr: float = 3e-3
    """Falls linearly over warm-up and meta stage."""
    finetune_lr: float = 1e-3
    weight_decay: float = 1e-3
    sizes: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Users whose events make a source's statistics, in numbers of the target's, which a source should look like."""
    folds: int = 5
    """Groups of the target's users, each scored with the statistics of the others."""
    evaluate_every: int = 25
    patience: int = 6
    """Evaluations without a better validation loss before training on the target stops; fewer in proportion where the
    target is trained on alone, at ``lr``."""
    average_decay: float = 0.95
    """On the target, the parameters that count are an exponential average over steps; 0 takes them as they are."""

    def check(self) -> None:
        check_options(self, prefix="cooccurrence.", ranges=RANGES["cooccurrence"])
        if not self.sizes:
            raise ValueError("cooccurrence.sizes must be one number or more, got none")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """How the target is split and questioned."""

    split: Literal["leave_one_out", "time"] = "leave_one_out"
    target_fraction: float = 1.0
    """Share of the target's users whose events may be trained on."""
    mask_history: bool = False
    """Leave items of the user's history out of the ranking."""
    catalogue: Literal["training", "all"] = "training"
    """What is ranked, recommended and chosen by. training: the items of the target's training events. all: every item
    of the domain, also those that are known from held-out events alone, of which nothing was learned."""

    def check(self) -> None:
        check_options(self, prefix="data.", ranges=RANGES["data"])


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    model: ModelConfig = field(default_factory=ModelConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    cooccurrence: CooccurrenceConfig = field(default_factory=CooccurrenceConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        for name in SECTIONS:
            section = getattr(self, name)
            if isinstance(section, SECTIONS[name]):
                section.check()
        check_options(self, only=Config)
        train = self.train
        if train.capture and train.device == "cpu":
            raise ValueError("train.capture needs train.device 'cuda', got 'cpu'")
        if train.compile and train.method == "metarec" and train.meta_steps and self.meta.order == 2:
            raise ValueError("train.compile needs meta.order 1, got 2: a compiled encoder has no second derivatives")

    def replace(self, /, **sections: Mapping[str, Any]) -> Config:
        """A copy with options changed: ``config.replace(train={"seed": 1}, model={"dim": 32})``.

        Raises ValueError for a section or option that does not exist, and for values that cannot be.
        """
        check_names(sections, SECTIONS, owner="configuration", what="section", plural="sections")
        changed = {}
        for name, values in sections.items():
            if isinstance(values, SECTIONS[name]):
                changed[name] = values
                continue
            if not isinstance(values, Mapping):
                raise ValueError(f"{name} must be an object of options and their values, got {shown(values)}")
            known = [f.name for f in dataclasses.fields(SECTIONS[name])]
            check_names(values, known, owner=name, what="option", plural="options")
            changed[name] = dataclasses.replace(getattr(self, name), **values)
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Config:
        """Raises ValueError for a section or option that does not exist, and for values that cannot be."""
        given = parse_json(text)
        if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
            raise ValueError("configuration must be a JSON object of sections, each an object of options")
        return Config().replace(**given)

    @staticmethod
    def load(path: str | Path) -> Config:
        """Raises ValueError naming the file if it is no configuration."""
        try:
            return Config.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no configuration: {error}") from error


SECTIONS = {
    "model": ModelConfig,
    "meta": MetaConfig,
    "train": TrainConfig,
    "cooccurrence": CooccurrenceConfig,
    "data": DataConfig,
}


def default() -> Config:
    return Config()


def abstract() -> Config:
    """Nearest to what the MetaRec abstract says: codes alone carry items over, second order, no source loss."""
    return Config(
        model=ModelConfig(vq="quantized"),
        meta=MetaConfig(order=2, source_loss_weight=0.0, similarity_decay=0.0),
        cooccurrence=CooccurrenceConfig(source_loss_weight=0.0),
        train=TrainConfig(warmup_steps=100, meta_steps=300, finetune_scope="all"),
    )


def metaadapt_literal() -> Config:
    """The weighting rule of MetaAdapt's published code, its sign and constants, for comparison."""
    return Config(
        meta=MetaConfig(
            order=2,
            inner_steps=3,
            inner_lr=1e-5,
            same_batch=True,
            temperature=0.01,
            similarity_scope="tensor_mean",
            similarity_decay=0.0,
            similarity_sign="ascent",
            source_loss_weight=0.0,
        ),
        cooccurrence=CooccurrenceConfig(source_loss_weight=0.0),
        train=TrainConfig(warmup_steps=100, meta_steps=300, finetune_scope="all"),
    )


def demo() -> Config:
    """Small enough to train on the synthetic domains within three minutes on two cores."""
    return Config(
        model=ModelConfig(dim=32, codebook_heads=4, codebook_size=64),
        train=TrainConfig(
            meta_steps=300,
            finetune_steps=400,
            batch_size=64,
            lr=3e-3,
            finetune_lr=3e-3,
            evaluate_every=25,
        ),
        data=DataConfig(target_fraction=0.15),
    )


PRESETS = {"default": default, "abstract": abstract, "metaadapt_literal": metaadapt_literal, "demo": demo}
