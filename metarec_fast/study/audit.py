"""Does transfer help on these domains, and is it what the sources know that helps? A study, and words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from metarec_fast.config import Config
from metarec_fast.evaluation import holm
from metarec_fast.study.grid import SAFE, Arm, Comparison, Study
from metarec_fast.study.results import LEVEL, Contrast, Results

ALONE = "target-only"
# sources that should not help, one that should help most, and all kinds together for their weights
CONTROLS = (
    Arm(name="shuffled-sources", group="control", sources=("shuffled",)),
    Arm(name="random-sources", group="control", sources=("random",)),
    Arm(name="target-copy", group="control", sources=("copy",)),
    Arm(name="all-kinds", group="control", sources=("related", "shuffled", "random", "copy")),
)


def audit_study(
    target: str,
    sources: Sequence[str],
    config: Config,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    weights: bool = True,
    leave_out: bool = False,
) -> Study:
    """Target only, the sources, and the controls made of them, all with the options of ``config``.

    weights: one more arm with all kinds of sources together, for the weights that they get.
    leave_out: one more arm for each source, trained without it.
    Raises ValueError without sources, with a target among them, or to leave out the only one.
    """
    if not sources or target in sources:
        raise ValueError(f"an audit needs sources that are not the target, got {', '.join(sources) or 'none'}")
    if leave_out and len(sources) < 2:
        raise ValueError("leave_out needs at least two sources, got one: without it there is the target alone")
    arms = (
        Arm(name=ALONE, group="structure", options={"train": {"method": "target_only"}}),
        Arm(name="ours", group="ours"),
        *CONTROLS[: 4 if weights else 3],
    )
    compared = (
        *((arm.name, ALONE) for arm in arms[1:5]),
        *(("ours", control) for control in ("shuffled-sources", "random-sources")),
    )
    parts = tuple(_without(source) for source in sources) if leave_out else ()
    return Study(
        name="audit",
        targets=(target,),
        sources=tuple(sources),
        fractions=(config.data.target_fraction,),
        seeds=tuple(seeds),
        arms=(*arms, *parts),
        comparisons=tuple(
            Comparison(arm=arm, against=(against,))
            for arm, against in (*compared, *(("ours", part.name) for part in parts))
        ),
        options=dataclasses.asdict(config),
    )


def _without(source: str) -> Arm:
    name = Path(source).name.partition(".")[0]
    return Arm(name="without-" + "".join(c if c in SAFE else "_" for c in name), group="ablation", without=(source,))


def audit_verdict(results: Results) -> list[str]:
    """Sentences on a finished audit. Raises ValueError if cells are missing."""
    if not results.complete:
        raise ValueError(f"the audit has {len(results.records)} of {results.expected} cells; run it to the end")
    study = results.study
    found = {(c.arm, c.against[0]): results.contrasts(c)[0] for c in study.comparisons}
    helps, order, content = (found["ours", name] for name in (ALONE, "shuffled-sources", "random-sources"))
    copy = found["target-copy", ALONE]
    sentences = [f"The sources {_effect(helps)} the target: {_figures(helps)} against target only."]
    if helps.no_verdict is not None:
        sentences = [f"No verdict on the sources against target only: {helps.no_verdict}."]
    if copy.no_verdict is not None:
        sentences.append(f"No verdict on what an ideal source, a copy of the target, could give: {copy.no_verdict}.")
    elif copy.wins:
        sentences.append(f"A copy of the target as source gives {_figures(copy)}: what an ideal source could give.")
    else:
        sentences.append(
            f"Even a copy of the target as source gives no clear gain ({_figures(copy)}): with this configuration and "
            "this much target data there is nothing for a source to add."
        )
    if helps.wins:
        for control, what in ((order, "the order of their events"), (content, "what their users choose together")):
            if control.no_verdict is not None:
                sentences.append(f"No verdict on whether the gain is due to {what}: {control.no_verdict}.")
            elif control.wins:
                sentences.append(f"The gain is due to {what}: {_figures(control)} over sources without it.")
            else:
                sentences.append(
                    f"It cannot be shown that the gain is due to {what}: {_figures(control)} over sources without it."
                )
    for name in ("shuffled-sources", "random-sources"):
        control = found[name, ALONE]
        if control.clear:
            verb = _effect(control)
            sentences.append(f"Caution: {name} should equal target only, and {verb} it: {_figures(control)}.")
    parts = [found["ours", arm.name] for arm in study.arms if arm.without]
    for part, p in zip(parts, holm([part.p for part in parts]), strict=True):
        source = part.baseline.removeprefix("without-")
        if part.no_verdict is not None:
            sentences.append(f"No verdict on {source} beside the other sources: {part.no_verdict}.")
            continue
        what = f"{_figures(part, p)} with it over training without it"
        if p >= LEVEL:
            sentences.append(f"It cannot be shown that {source} matters beside the other sources: {what}.")
        else:
            sentences.append(
                f"{source} {'helps' if part.difference.mean > 0 else 'harms'} beside the other sources: {what}."
            )
    weights = results.source_means("all-kinds", study.targets[0], study.fractions[0], "weight")
    if weights:
        ranked = sorted(weights, key=lambda name: -weights[name])
        sentences.append("Weights, all kinds together: " + ", ".join(f"{n} {weights[n]:.3f}" for n in ranked) + ".")
    return sentences


def _effect(contrast: Contrast) -> str:
    if not contrast.clear:
        return "make no significant difference to"
    return "help" if contrast.difference.mean > 0 else "harm"


def _figures(contrast: Contrast, p: float | None = None) -> str:
    """p: adjusted, in place of the comparison's own."""
    low, high = contrast.interval
    return (
        f"{contrast.gain:+.1%} NDCG@10 ({low:+.1%} to {high:+.1%}, p {contrast.difference.p if p is None else p:.4f})"
    )
