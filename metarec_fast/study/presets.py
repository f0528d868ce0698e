"""The arms by name, and the studies that come with the package."""

from __future__ import annotations

import dataclasses

from metarec_fast.config import metaadapt_literal
from metarec_fast.study.grid import Arm, Comparison, Study

PLAIN = {"init": "random", "cooccurrence": "none"}
"""Without the target's own structure: random item tables, nothing beside the encoder."""
STRUCTURE = {"cooccurrence": "transitions"}
"""Spectral item tables, and the target's own transitions as they are beside the encoder."""
TARGET_ONLY = {"method": "target_only"}
AS_USUAL = {"method": "pretrain", "finetune_scope": "all"}
NO_SOURCE_LOSS = {"meta": {"source_loss_weight": 0.0}, "cooccurrence": {"source_loss_weight": 0.0}}


def baselines() -> tuple[Arm, ...]:
    return (
        Arm(name="popularity", group="baseline", baseline="popularity"),
        Arm(name="last-item-transitions", group="baseline", baseline="transitions, window 1, last item"),
        Arm(name="item-knn", group="baseline", baseline="item-kNN"),
        Arm(name="best-baseline", group="baseline", baseline="best"),
    )


def target_only() -> tuple[Arm, ...]:
    """Two encoders with and without codes, plain and with the target's own structure; and the architecture of ours."""
    encoders = tuple(
        Arm(
            name=f"{encoder}{'' if vq == 'none' else '-vq'}{suffix}",
            group=group,
            options={"model": {"encoder": encoder, "vq": vq, **structure}, "train": TARGET_ONLY},
        )
        for group, suffix, structure in (("plain", "", PLAIN), ("structure", "-structure", STRUCTURE))
        for encoder in ("sasrec", "lru")
        for vq in ("none", "residual")
    )
    return (*encoders, Arm(name="target-only", group="structure", options={"train": TARGET_ONLY}))


def recipes() -> tuple[Arm, ...]:
    """Pretraining on the sources and fine-tuning on the target, of an encoder alone."""
    return tuple(
        Arm(
            name=f"{encoder}-pretrain",
            group="recipe",
            options={"model": {"encoder": encoder, "vq": "none", **PLAIN}, "train": AS_USUAL},
        )
        for encoder in ("sasrec", "lru")
    )


def warmed_up(meta_steps: int) -> dict[str, int]:
    """The same number of steps, a quarter of them warm-up."""
    return {"warmup_steps": meta_steps // 4, "meta_steps": meta_steps - meta_steps // 4}


def transfer_baselines(*, meta_steps: int) -> tuple[Arm, ...]:
    """Known ways to use sources, with the architecture and the fine-tuning of ours.

    What has no loss of the sources in its meta step learns of them in a warm-up.
    """
    warm = {"train": warmed_up(meta_steps)}
    fomaml = {"weighting": "uniform", **NO_SOURCE_LOSS["meta"]}
    reptile = {"weighting": "uniform", "source_loss_weight": 1.0, "target_loss_weight": 0.0, "inner_steps": 3}
    literal = dataclasses.asdict(metaadapt_literal().meta)
    return (
        Arm(name="joint", group="transfer", options={"train": {"method": "joint"}}),
        Arm(name="pretrain", group="transfer", options={"train": {"method": "pretrain"}}),
        Arm(
            name="pretrain-frozen",
            group="transfer",
            options={"train": {"method": "pretrain", "finetune_scope": "table"}},
        ),
        Arm(name="fomaml", group="transfer", options=NO_SOURCE_LOSS | warm | {"meta": fomaml}),
        Arm(name="reptile", group="transfer", options={"meta": reptile, "cooccurrence": {"source_loss_weight": 1.0}}),
        Arm(name="metaadapt-literal", group="transfer", options=NO_SOURCE_LOSS | warm | {"meta": literal}),
    )


def ours() -> Arm:
    return Arm(name="ours", group="ours")


def ablations(*, meta_steps: int) -> tuple[Arm, ...]:
    """Ours with one part changed. ``meta_steps`` are those of the study: what warm-up gets, the meta stage loses."""
    changes = {
        "no-vq": {"model": {"vq": "none"}},
        "no-meta": {"meta": {"inner_lr": 0.0}},
        "uniform-weights": {"meta": {"weighting": "uniform"}},
        "wrong-sign": {"meta": {"similarity_sign": "ascent"}},
        "second-order": {"meta": {"order": 2}},
        "no-source-loss": NO_SOURCE_LOSS,
        "equal-source-loss": {"meta": {"source_loss_weight": 1.0}},
        "warm-up": {"train": warmed_up(meta_steps)},
        "finetune-at-once": {"train": {"finetune_scope": "all"}},
        "random-init": {"model": {"init": "random"}},
        "unaligned-init": {"model": {"init": "spectral"}},
        "transition-terms": {"model": {"cooccurrence": "transitions"}},
        "no-cooccurrence": {"model": {"cooccurrence": "none"}},
    }
    return tuple(Arm(name=name, group="ablation", options=options) for name, options in changes.items())


def controls() -> tuple[Arm, ...]:
    """Ours with sources that should not help, one that should help most, and all kinds together for their weights."""
    return (
        Arm(name="shuffled-sources", group="control", sources=("shuffled",)),
        Arm(name="random-sources", group="control", sources=("random",)),
        Arm(name="target-copy", group="control", sources=("copy",)),
        Arm(name="all-kinds", group="control", sources=("related", "shuffled", "random", "copy")),
    )


def mixed_sources() -> tuple[Arm, ...]:
    """Sources that should help among twice as many that should not: what choosing among them is worth."""
    changes = {
        "mixed-sources": {},
        "mixed-sources-pretrain": {"train": {"method": "pretrain"}},
        "mixed-sources-pretrain-frozen": {"train": {"method": "pretrain", "finetune_scope": "table"}},
        "mixed-sources-uniform-weights": {"meta": {"weighting": "uniform"}},
    }
    kinds = ("related", "shuffled", "random")
    return tuple(Arm(name=name, group="mixed", options=options, sources=kinds) for name, options in changes.items())


def comparisons(arms: tuple[Arm, ...], *, control: str) -> tuple[Comparison, ...]:
    """Ours against everything that is no baseline; controls against ``control``, which is target only."""

    def names(group: str) -> tuple[str, ...]:
        return tuple(arm.name for arm in arms if arm.group == group)

    made = [Comparison(arm="ours", against=(name,)) for name in (*names("plain"), *names("recipe"))]
    for group, title in (
        ("structure", "ours against the best target-only model with structure"),
        ("transfer", "ours against the best transfer baseline"),
        ("baseline", "ours against the best baseline"),
    ):
        if names(group):
            made.append(Comparison(arm="ours", against=names(group), title=title))
    made += [Comparison(arm="ours", against=(name,)) for name in names("ablation")]
    made += [Comparison(arm=name, against=(control,)) for name in names("control")]
    made += [Comparison(arm="mixed-sources", against=(name,)) for name in names("mixed") if name != "mixed-sources"]
    return tuple(made)


def all_arms(*, meta_steps: int) -> tuple[Arm, ...]:
    """Every arm that there is, for a study of these steps."""
    return (
        *baselines(),
        *target_only(),
        *recipes(),
        *transfer_baselines(meta_steps=meta_steps),
        ours(),
        *ablations(meta_steps=meta_steps),
        *controls(),
        *mixed_sources(),
    )


def published() -> Study:
    """The grid on the Amazon domains: three development targets, five sources, four fractions, three seeds."""
    train = {"meta_steps": 400, "finetune_steps": 800}
    arms = all_arms(meta_steps=train["meta_steps"])
    return Study(
        name="published",
        targets=("amazon14_office", "amazon14_tools", "amazon14_beauty"),
        sources=tuple(f"amazon14_{name}" for name in ("toys", "video_games", "health", "clothing", "sports")),
        fractions=(0.01, 0.05, 0.1, 1.0),
        seeds=(0, 1, 2),
        arms=arms,
        comparisons=comparisons(arms, control="target-only"),
        options={"train": train},
        tune={"model.dropout": (0.3, 0.5)},
    )


def short() -> Study:
    """The same grid with small budgets and nothing tuned: some fourteen hours a seed on two cores (an estimate)."""
    train = {"meta_steps": 60, "finetune_steps": 200, "patience": 4}
    arms = all_arms(meta_steps=train["meta_steps"])
    return dataclasses.replace(
        published(),
        name="short",
        arms=arms,
        comparisons=comparisons(arms, control="target-only"),
        options={"train": train},
        tune={},
    )


def smoke() -> Study:
    """Every kind of arm on small synthetic domains, in less than a minute."""
    train = {
        "meta_steps": 120,
        "finetune_steps": 80,
        "batch_size": 32,
        "lr": 3e-3,
        "finetune_lr": 3e-3,
        "evaluate_every": 20,
        "patience": 3,
    }
    arms = (
        *baselines(),
        *(arm for arm in target_only() if arm.name in ("lru", "lru-vq-structure", "target-only")),
        *(arm for arm in transfer_baselines(meta_steps=train["meta_steps"]) if arm.name == "pretrain"),
        ours(),
        *controls()[:3],
    )
    return Study(
        name="smoke",
        targets=("target",),
        sources=("source0", "source1"),
        fractions=(0.05,),
        seeds=(0,),
        arms=arms,
        comparisons=comparisons(arms, control="target-only"),
        options={
            "model": {"dim": 32, "codebook_heads": 4, "codebook_size": 32, "dropout": 0.2, "max_length": 20},
            "train": train,
            "cooccurrence": {"warmup_steps": 100, "meta_steps": 20, "finetune_steps": 60, "evaluate_every": 20},
        },
        synthetic={"source_users": 500, "source_items": 100, "target_users": 1000, "target_items": 80},
    )


PRESETS = {"smoke": smoke, "short": short, "published": published}
