"""Did transfer help? What a run with sources found out, as plain JSON, as lines of text, and as one HTML file."""

from __future__ import annotations

import html as entities
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metarec_fast.evaluation import Metrics, no_verdict, paired_bootstrap
from metarec_fast.evaluation.verdict import FEWEST
from metarec_fast.report.plot import Band, Interval, Point, heat_map, interval_chart, line_chart
from metarec_fast.text import printable

METRIC = "ndcg@10"
LEVEL = 0.05  # of the paired bootstrap's p
SPREADS = 2  # of the noise's draws that make its floor: 1 draw in 20 of a normal distribution lies outside


def transfer_report(
    transferred: Metrics,
    alone: Metrics,
    *,
    method: str,
    sources: Sequence[str],
    mixtures: Mapping[str, Mapping[str, Any]],
    trace: Sequence[Mapping[str, Any]] = (),
    cooccurrence: Mapping[str, Any] | None = None,
    codes: Mapping[str, np.ndarray] | None = None,
    codebook_size: int = 0,
    left_out: Mapping[str, Mapping[str, Any]] | None = None,
    replaces: bool = True,
) -> dict[str, Any]:
    """What transfer gave over the target-only model of the same budget, and what each source had to do with it.

    transferred, alone: of the two models on the same validation cases. method: how the first was trained.
    mixtures: what "transferred" and "target_only" are made of: "beside", what ``model.cooccurrence`` put beside the
        encoder, and the weights "encoder" and "cooccurrence" that validation chose.
    trace: of the encoder's meta stage (``Trainer.progress.trace``), empty without one.
    cooccurrence: ``train.history.CooccurrenceHistory`` of the scorer's training as a dict, None without a scorer.
    codes: of each domain's items, [H, V] each; the target is the last.
    left_out: training steps of both models that were not finite: "skipped_by_stage", and "stages_not_run", those of
        which every step was.
    replaces: whether the target-only model takes the place of one that is not better; otherwise only the words say so.

    There is no verdict, and no p, where few cases or the order of ties decide (`evaluation.no_verdict`) or where a
    stage did not run. What is returned is then still what has the higher NDCG@10 on validation, ties as their
    expectation; the target-only model, if a stage of the other did not run.
    """
    left_out = left_out or {}
    not_run = {name: list(of["stages_not_run"]) for name, of in left_out.items() if of["stages_not_run"]}
    difference = paired_bootstrap(transferred.per_user(METRIC), alone.per_user(METRIC), seed=0)
    baseline = alone[METRIC]
    relative = {
        key: value / baseline if baseline else None
        for key, value in (("gain", difference.mean), ("gain_low", difference.low), ("gain_high", difference.high))
    }
    better = difference.mean > 0 and "transferred" not in not_run
    reason = _not_run(not_run) or no_verdict(
        [(transferred.greater, transferred.equal)], [(alone.greater, alone.equal)], difference, metric=METRIC
    )
    validation = {
        "metric": METRIC,
        "cases": len(alone),
        "protocol": alone.protocol,
        "targets_outside": alone.outside,
        "transferred": transferred[METRIC],
        "target_only": baseline,
        "all_items": _among_all(transferred, alone),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "p": None if reason else difference.p,
        "no_verdict": reason,
        **relative,
    }
    returned = "target_only" if replaces and not better else "transferred"
    return {
        "method": method,
        "better": "transferred" if better else "target_only",
        "returned": returned,
        "verdict": verdict(validation, better=better, replaces=replaces),
        "mixture": {name: dict(mixture) for name, mixture in mixtures.items()},
        "returned_parts": parts_in_words(mixtures[returned]),
        "validation": validation,
        **_meta_stage(trace, sources),
        "left_out": {name: dict(of["skipped_by_stage"]) for name, of in left_out.items()},
        "cooccurrence": None if cooccurrence is None else _cooccurrence(cooccurrence, sources),
        "code_overlap": None if codes is None else code_overlap(codes, codebook_size=codebook_size),
    }


def _among_all(transferred: Metrics, alone: Metrics) -> dict[str, float] | None:
    """The figures among all items, where both models have them beside those of a catalogue."""
    if transferred.among_all is None or alone.among_all is None:
        return None
    return {"transferred": transferred.among_all[METRIC], "target_only": alone.among_all[METRIC]}


def _not_run(stages: Mapping[str, Sequence[str]]) -> str | None:
    names = {"transferred": "with sources", "target_only": "on the target alone"}
    lines = [f"{names[name]} no step of {', '.join(of)} was finite" for name, of in stages.items()]
    return "; ".join(lines) or None


def verdict(validation: Mapping[str, Any], *, better: bool | None = None, replaces: bool = True) -> str:
    """One sentence on the validation figures of a report, or why there is none.

    better: whether the transferred model is, by default as its NDCG@10 says.
    """
    better = validation["difference"] > 0 if better is None else better
    if validation.get("no_verdict") is not None:
        model = "transferred" if better or not replaces else "target-only"
        choice = f"The {model} model is returned; that its figure is higher may be chance."
        if not validation["difference"]:
            choice = f"The {model} model is returned; both figures are equal."
        if not better and validation["difference"] > 0:
            choice = "The target-only model is returned." if replaces else "The target-only model is the one to take."
        elif not replaces:
            choice = "Which of the two is better is open."
        return f"No verdict on transfer: {validation['no_verdict']}. {choice}"
    figures = f"{_change(validation)} against target only on the same budget"
    clear = validation["p"] < LEVEL
    if better:
        if clear:
            return f"Transfer helped on validation: {figures}."
        return f"No significant gain from transfer: {figures}. It is not worse, so the transferred model is kept."
    choice = "is returned" if replaces else "is the one to take"
    what = "Transfer harmed on validation" if clear else "No sign that transfer helped"
    return f"{what}: {figures}. The target-only model {choice}."


def _change(validation: Mapping[str, Any]) -> str:
    if validation["gain"] is None:
        low, mean, high = (validation[key] for key in ("low", "difference", "high"))
        return f"NDCG@10 {mean:+.4f} ({low:+.4f} to {high:+.4f}, p {validation['p']:.4f})"
    low, gain, high = (validation[key] for key in ("gain_low", "gain", "gain_high"))
    return f"{gain:+.1%} NDCG@10 ({low:+.1%} to {high:+.1%}, p {validation['p']:.4f})"


def parts_in_words(mixture: Mapping[str, Any]) -> str:
    """One sentence on the parts of the returned model: encoder, co-occurrence scorer, or both."""
    if mixture["beside"] == "none":
        return "What is returned is the encoder alone: no co-occurrence scores are added."
    cooccurrence = {"learned": "co-occurrence scorer", "transitions": "transition counts"}[mixture["beside"]]
    if not mixture["encoder"]:
        return f"The encoder got weight 0: what is returned is the {cooccurrence} alone."
    if not mixture["cooccurrence"]:
        return f"The {cooccurrence} got weight 0: what is returned is the encoder alone."
    weights = f"weight {mixture['encoder']:.3g} for the encoder, {mixture['cooccurrence']:.3g} for the {cooccurrence}"
    return f"What is returned is encoder and {cooccurrence} together: {weights}."


def _meta_stage(trace: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> dict[str, Any]:
    noise = noise_floor(trace)
    return {
        "noise_floor": noise,
        "sources": {name: _source(name, trace, noise) for name in sources},
        "over_time": list(trace),
    }


def _cooccurrence(found: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """The co-occurrence scorer's first similarities, meta stage and validation losses; None for one not finite."""
    losses = [[stage, step, loss if math.isfinite(loss) else None] for stage, step, loss in found["validation_loss"]]
    return {
        "first": found["sources"],
        **_meta_stage(found["transfer"], sources),
        "validation_loss": losses,
        "best": found["best"],
        "best_at": found["best_at"],
        "skipped_steps": found["skipped_steps"],
    }


def noise_floor(trace: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Twice the root mean square of all draws of the noise (``meta.NoiseFloor``); None without a meta stage."""
    draws = sum(entry["draws"] for entry in trace)
    if not draws:
        return None
    square = sum(entry["draws"] * entry["noise"] ** 2 for entry in trace) / draws
    return {"similarity": SPREADS * square**0.5, "draws": draws}


def _source(name: str, trace: Sequence[Mapping[str, Any]], noise: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Over the later half of the meta stage; None without one."""
    late = trace[len(trace) // 2 :]
    if not late or noise is None:
        return None
    similarities = [entry["similarity"][name] for entry in late]
    descent, without = (float(np.mean(values)) for values in zip(*_descents(name, late), strict=True))
    return {
        "weight": float(np.mean([entry["weight"][name] for entry in late])),
        "similarity": float(np.mean(similarities)),
        "late_entries": len(late),
        "above_noise_floor": sum(value > noise["similarity"] for value in similarities),
        # of the target's loss, to first order and by a step of given length
        "leaving_out_costs": 1 - without / descent if descent > 0 else None,
    }


def _descents(name: str, trace: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(entry["descent"], entry["descent_without"][name]) for entry in trace]


def code_overlap(codes: Mapping[str, np.ndarray], *, codebook_size: int) -> dict[str, Any]:
    """How far domains use the same codes: for each pair and head, the sum over codes of the smaller share of items.

    codes: [H, V] of each domain's items. 1: the same histogram; 0: no code in common. "overlap": the mean over heads.
    "used": the mean number of codes of a head that have an item.
    """
    shares = {
        name: np.stack([np.bincount(head, minlength=codebook_size) / len(head) for head in np.asarray(indices)])
        for name, indices in codes.items()
    }
    by_head = [[np.minimum(a, b).sum(1) for b in shares.values()] for a in shares.values()]
    return {
        "domains": list(codes),
        "codebook_size": codebook_size,
        "overlap": [[float(pair.mean()) for pair in row] for row in by_head],
        "overlap_by_head": [[pair.tolist() for pair in row] for row in by_head],
        "used": {name: float((share > 0).sum(1).mean()) for name, share in shares.items()},
    }


def lines(report: Mapping[str, Any]) -> list[str]:
    """The key figures under the verdict, for a terminal."""
    lines = [f"  {report['returned_parts']}", *_left_out_lines(report), *_source_lines("encoder", report)]
    cooccurrence = report["cooccurrence"]
    if cooccurrence is not None:
        lines += [
            f"  co-occurrence, {printable(name)}: weight {source['weight']:.2f}, similarity of first descent "
            f"{source['similarity']:+.3f} ± {source['deviation']:.3f}"
            for name, source in cooccurrence["first"].items()
        ]
        if cooccurrence["best"] is not None:
            least = ", ".join(f"{stage} {loss:.3f}" for stage, loss in _least_by_stage(cooccurrence).items())
            lines.append(f"  co-occurrence: least validation loss by stage {least} (best at {cooccurrence['best_at']})")
    if report["code_overlap"] is not None and len(report["code_overlap"]["domains"]) > 1:
        *others, target = report["code_overlap"]["domains"]
        shared = report["code_overlap"]["overlap"][-1]
        listed = ", ".join(f"{printable(name)} {share:.2f}" for name, share in zip(others, shared, strict=False))
        lines.append(f"  overlap of codes with {printable(target)}: {listed}")
    return lines


def _left_out_lines(report: Mapping[str, Any]) -> list[str]:
    """Of each model the steps that were left out, by stage; none if all were taken."""
    return [
        f"  {name.replace('_', ' ')}: steps left out because they were not finite: "
        + ", ".join(f"{stage} {count:,}" for stage, count in of.items())
        for name, of in report["left_out"].items()
        if of
    ]


def _source_lines(part: str, stage: Mapping[str, Any]) -> list[str]:
    """Of each source in the meta stage of a part of the model; none without one."""
    lines = []
    for name, source in stage["sources"].items():
        if source is not None:
            above = f"{source['above_noise_floor']} of {source['late_entries']} late values above the noise floor"
            lines.append(
                f"  {part}, {printable(name)}: weight {source['weight']:.2f}, similarity {source['similarity']:+.3f} "
                f"({above} of {stage['noise_floor']['similarity']:.3f}){_costs(source)}"
            )
    return lines


def _least_by_stage(cooccurrence: Mapping[str, Any]) -> dict[str, float]:
    least: dict[str, float] = {}
    for stage, _, loss in cooccurrence["validation_loss"]:
        if loss is not None:
            least[stage] = min(loss, least.get(stage, math.inf))
    return least


def _costs(source: Mapping[str, Any]) -> str:
    costs = source["leaving_out_costs"]
    return "" if costs is None else f", leaving it out would cost {costs:+.1%} of the descent (estimate)"


NOTES = {
    "First similarity": "of the descent directions of a source and of the target in untrained co-occurrence scorers: "
    "mean and deviation over several, each with another part of the target's users. The weights follow from it, "
    "after similarities that differ by no more than this noise are drawn together. Later similarities say how far a "
    "domain's co-occurrence may be trusted, and no longer which source is related.",
    "Noise floor": "twice the spread of the similarity of gradients that have nothing to do with each other, drawn "
    "from this run's own: the deviations of a source's and of the target's from their averages, at different steps. "
    "Independent gradients lie inside it 19 times in 20. A similarity above it is more than chance, not yet of use: "
    "gradients agree too in what any source has, popular items and the pull of codes, even one of random items.",
    "Cost of leaving a source out": "an estimate, to first order: how much less a meta step of the same length would "
    "descend the target's loss with the weights of the other sources alone, in the later half of the meta stage. "
    "Negative: the step would descend more. Where steps hardly descend at all, as after a warm-up that came to rest, "
    "it is a share of next to nothing and says little. Any source evens out the noise of batches, and this counts too; "
    "of warm-up and of what item tables learn it knows nothing. "
    "metarec-fast audit-transfer --leave-out trains without each source.",
    "Encoder and co-occurrence scorer": "two models, mixed by weights chosen on validation. The encoder reads an item "
    "table of its own domain, the scorer its statistics. Each has a meta stage; figures of a part with weight 0 "
    "are of nothing that is returned. Near convergence, gradients of source and target oppose each other whatever they "
    "have in common: a negative similarity alone does not condemn a source.",
    "Validation loss of the co-occurrence scorer": "mean cross-entropy of the target's validation items over the whole "
    "catalogue, with statistics that leave the users of the cases out; by the steps of all stages so far. The scorer "
    "of the least is kept. Warm-up is validated at its end; on the target the parameters are averaged over steps.",
    "Overlap of codes": "the sum over codes of the smaller of two domains' shares of items, mean over the heads of the "
    "codebook. 1: the same use of codes. Catalogues smaller than the codebook overlap less for that alone.",
    "Interval": "paired bootstrap over validation users, 10,000 resamples. Validation also chose both models' steps.",
    "No verdict": f"given where fewer than {FEWEST} cases have their target within the cutoff or make the difference, "
    "where the order of ties alone decides its sign, or where a stage of training did not run.",
}


def html(report: Mapping[str, Any], *, title: str) -> str:
    """The report as one file: no script, nothing loaded from elsewhere."""
    validation = report["validation"]
    words = f"<p><strong>{escape(report['verdict'])}</strong></p><p>{escape(report['returned_parts'])}</p>"
    words += "".join(f"<p>{escape(line.strip())}</p>" for line in _left_out_lines(report))
    parts = [words, _figures(validation)]
    if validation["gain"] is not None and validation["no_verdict"] is None:
        gain = Interval(
            "transferred against target only",
            *(validation[key] for key in ("gain", "gain_low", "gain_high")),
            strong=validation["p"] < LEVEL,
        )
        parts.append(interval_chart([gain], title="Gain in NDCG@10 on validation, 95 % interval", percent=True))
    parts += _drawn_sources("Encoder", report)
    if report["cooccurrence"] is not None:
        parts += _first(report["cooccurrence"]["first"])
        parts += _drawn_sources("Co-occurrence scorer", report["cooccurrence"])
        parts += _drawn_losses(report["cooccurrence"])
    codes = report["code_overlap"]
    if codes is not None and len(codes["domains"]) > 1:
        parts.append(heat_map(codes["domains"], codes["overlap"], title="Overlap of the use of codes"))
        used = ", ".join(f"{escape(name)} {count:.0f}" for name, count in codes["used"].items())
        parts.append(f"<p>Codes in use, of {codes['codebook_size']} a head: {used}.</p>")
    notes = "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in NOTES.items())
    head = f'<meta charset="utf-8">{VIEWPORT}<title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts, f"<dl>{notes}</dl>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def escape(text: str) -> str:
    return entities.escape(printable(text))


VIEWPORT = '<meta name="viewport" content="width=device-width">'
STYLE = (
    "body{font-family:sans-serif;max-width:900px;margin:2em auto;padding:0 1em}svg{display:block;max-width:100%;"
    "height:auto;margin:1em 0}table{border-collapse:collapse;"
    "display:block;overflow-x:auto}td,th{padding:.2em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}dt{font-weight:bold}dd{margin:0 0 .6em}"
)


def _figures(validation: Mapping[str, Any]) -> str:
    models = {"transferred": "transferred", "target_only": "target only"}
    columns = {"NDCG@10, validation": validation}
    if validation["all_items"] is not None:
        columns["among all items"] = validation["all_items"]
    rows = [(name, *(f"{figures[key]:.4f}" for figures in columns.values())) for key, name in models.items()]
    table = _table(("model", *columns), rows)
    return f"{table}<p>{escape(validation['protocol'])}</p>"


def _drawn_sources(part: str, stage: Mapping[str, Any]) -> list[str]:
    """The sources of a part's meta stage, as a table and over time; nothing without one."""
    if stage["noise_floor"] is None:
        return []
    floor = stage["noise_floor"]["similarity"]
    drawn = [f"<h2>{part}: sources in the meta stage</h2>", _sources(stage)]
    bands = {"similarity": Band(f"noise floor, ±{floor:.3f}", -floor, floor), "weight": None}
    for key, band in bands.items():
        over_time = {
            name: [Point(str(entry["step"]), entry[key][name]) for entry in stage["over_time"]]
            for name in stage["sources"]
        }
        drawn.append(line_chart(over_time, title=f"{part}: {key} of sources by meta step", band=band))
    return drawn


def _first(sources: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the co-occurrence scorer's sources weigh, and why; nothing for a method that does not weigh them."""
    if not sources:
        return []
    rows = [
        (name, f"{of['weight']:.3f}", f"{of['similarity']:+.3f} ± {of['deviation']:.3f}")
        for name, of in sources.items()
    ]
    return ["<h2>Co-occurrence scorer: sources</h2>", _table(("source", "weight", "first similarity"), rows)]


def _drawn_losses(cooccurrence: Mapping[str, Any]) -> list[str]:
    """Validation losses by stage over the steps of all stages, and where the best was; nothing if none was finite."""
    if cooccurrence["best"] is None:
        return []
    curves: dict[str, list[Point]] = {}
    begin = end = 0
    best = f"best: {cooccurrence['best_at']}, loss {cooccurrence['best']:.4f}"
    for stage, step, loss in cooccurrence["validation_loss"]:
        if stage not in curves:
            curves[stage], begin = [], end
        end = begin + step
        if loss is not None:
            curves[stage].append(Point(str(end), loss))
        if f"{stage} {step}" == cooccurrence["best_at"]:
            found = curves[stage][-1]
    drawn = {stage: points for stage, points in curves.items() if points} | {best: [found]}
    return [line_chart(drawn, title="Co-occurrence scorer: validation loss by step and stage")]


def _sources(stage: Mapping[str, Any]) -> str:
    head = ("source", "weight", "similarity", "above the noise floor", "cost of leaving it out (estimate)")
    rows = []
    for name, source in stage["sources"].items():
        costs = source["leaving_out_costs"]
        above = f"{source['above_noise_floor']} of {source['late_entries']}"
        figures = (f"{source['weight']:.3f}", f"{source['similarity']:+.4f}", above)
        rows.append((name, *figures, "" if costs is None else f"{costs:+.1%}"))
    return f"{_table(head, rows)}<p>Means over the later half of the meta stage.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"
    others = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{first}{''.join(others)}</table>"
