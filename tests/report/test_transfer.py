"""The transfer report: whole, plain, and in words that its figures bear out."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from metarec_fast.evaluation import Metrics, paired_bootstrap
from metarec_fast.report.transfer import code_overlap, html, lines, noise_floor, transfer_report, verdict

SVG = "{http://www.w3.org/2000/svg}"


def metrics(ranks) -> Metrics:
    ranks = np.asarray(ranks)
    return Metrics("leave one out; valid", False, 50, np.arange(len(ranks)), ranks, np.zeros(len(ranks), np.int64))


GOOD, POOR = metrics([0] * 30 + [20] * 10), metrics([0] * 10 + [20] * 30)


ONE, OTHER = metrics([0] * 12 + [30] * 11), metrics([30] * 12 + [0] * 11)  # 12 users against 11


def entry(step, a, b):
    return {
        "step": step,
        "similarity": {"a": a, "b <c>": b},
        "weight": {"a": 0.75, "b <c>": 0.25},
        "noise": 0.02,
        "draws": 20,
        "descent": 0.5,
        "descent_without": {"a": 0.4, "b <c>": 0.55},
    }


TRACE = [entry(10, 0.9, 0.9), entry(20, -0.5, 0.0), entry(30, 0.05, -0.05), entry(40, 0.03, 0.01)]
LOSSES = [
    ["warmup", 600, 6.6],
    ["meta", 0, 6.6],
    ["meta", 25, 6.4],
    ["meta", 50, 6.5],
    ["finetune", 0, 6.5],
    ["finetune", 25, float("nan")],
    ["finetune", 50, 6.45],
]
# of the co-occurrence scorer: other values than the encoder's
FOUND = {
    "validation_loss": LOSSES,
    "best": 6.4,
    "best_at": "meta 25",
    "skipped_steps": 1,
    "sources": {
        "a": {"weight": 0.7, "similarity": 0.85, "deviation": 0.02},
        "b <c>": {"weight": 0.3, "similarity": -0.125, "deviation": 0.25},
    },
    "transfer": [{**one, "noise": 0.1} for one in (entry(10, 0.3, 0.1), entry(20, -0.5, 0.25))],
}
MIXTURES = {
    "transferred": {"beside": "learned", "encoder": 0.0, "cooccurrence": 1.0},
    "target_only": {"beside": "learned", "encoder": 0.5, "cooccurrence": 1.0},
}
CODES = {"a": np.array([[0, 0, 1, 1]]), "b <c>": np.array([[2, 3]]), "target": np.array([[0, 1, 2, 2]])}


def report(transferred=GOOD, alone=POOR, **changes):
    of_encoder = {"trace": TRACE, "codes": CODES, "codebook_size": 4}
    given = {"method": "metarec", "sources": ["a", "b <c>"], "mixtures": MIXTURES, "cooccurrence": FOUND, **of_encoder}
    return transfer_report(transferred, alone, **{**given, **changes})


def test_the_report_is_whole_and_plain_json():
    found = report()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    difference = paired_bootstrap(GOOD.per_user("ndcg@10"), POOR.per_user("ndcg@10"), seed=0)
    validation = found["validation"]
    assert [validation[key] for key in ("difference", "low", "high", "p")] == list(difference)
    assert validation["gain"] == pytest.approx(2.0) and validation["gain_low"] < 2 < validation["gain_high"]
    assert (validation["cases"], validation["target_only"], validation["transferred"]) == (40, 0.25, 0.75)
    assert found["noise_floor"] == {"similarity": pytest.approx(0.04), "draws": 80}
    a, b = found["sources"].values()
    # the later half: two entries, of which one of a's lies above .04
    assert (a["similarity"], a["above_noise_floor"], a["late_entries"]) == (pytest.approx(0.04), 1, 2)
    assert (b["similarity"], b["above_noise_floor"]) == (pytest.approx(-0.02), 0)
    assert a["leaving_out_costs"] == pytest.approx(0.2) and b["leaving_out_costs"] == pytest.approx(-0.1)
    assert found["over_time"] == TRACE and found["method"] == "metarec"
    cooccurrence = found["cooccurrence"]
    assert cooccurrence["noise_floor"] == {"similarity": pytest.approx(0.2), "draws": 40}
    assert {name: source["similarity"] for name, source in cooccurrence["sources"].items()} == {
        "a": -0.5,
        "b <c>": 0.25,
    }
    assert [source["above_noise_floor"] for source in cooccurrence["sources"].values()] == [0, 1]
    assert cooccurrence["over_time"] == FOUND["transfer"] and cooccurrence["skipped_steps"] == 1
    assert (cooccurrence["best"], cooccurrence["best_at"]) == (6.4, "meta 25")
    losses = cooccurrence["validation_loss"]
    assert losses[5] == ["finetune", 25, None] and [*losses[:5], losses[6]] == [*LOSSES[:5], LOSSES[6]]
    assert found["mixture"] == MIXTURES
    assert cooccurrence["first"] == FOUND["sources"]


def test_first_similarities_are_reported_where_sources_were_weighed():
    found = report()
    (line,) = [line for line in lines(found) if line.startswith("  co-occurrence, b <c>")]
    assert line == "  co-occurrence, b <c>: weight 0.30, similarity of first descent -0.125 ± 0.250"
    assert "<td>b &lt;c&gt;</td><td>0.300</td><td>-0.125 ± 0.250</td>" in html(found, title="t")
    unweighed = report(cooccurrence={**FOUND, "sources": {}})
    assert "first similarity" not in html(unweighed, title="t") and len(lines(unweighed)) == len(lines(found)) - 2


@pytest.mark.parametrize(
    ("beside", "encoder", "cooccurrence", "words"),
    [
        ("learned", 0.0, 1.0, "The encoder got weight 0: what is returned is the co-occurrence scorer alone."),
        ("learned", 1.0, 0.0, "The co-occurrence scorer got weight 0: what is returned is the encoder alone."),
        (
            "learned",
            0.25,
            1.0,
            "What is returned is encoder and co-occurrence scorer together: "
            "weight 0.25 for the encoder, 1 for the co-occurrence scorer.",
        ),
        ("transitions", 1.0, 0.0, "The transition counts got weight 0: what is returned is the encoder alone."),
        (
            "transitions",
            1.0,
            1.5,
            "What is returned is encoder and transition counts together: "
            "weight 1 for the encoder, 1.5 for the transition counts.",
        ),
        ("none", 1.0, 0.0, "What is returned is the encoder alone: no co-occurrence scores are added."),
    ],
)
def test_words_name_the_parts_of_the_returned_model(beside, encoder, cooccurrence, words):
    made = {"beside": beside, "encoder": encoder, "cooccurrence": cooccurrence}
    other = {"beside": "learned", "encoder": 6.0, "cooccurrence": 1.0}
    assert report(GOOD, POOR, mixtures={"transferred": made, "target_only": other})["returned_parts"] == words
    assert report(POOR, GOOD, mixtures={"transferred": other, "target_only": made})["returned_parts"] == words
    kept = report(POOR, GOOD, mixtures={"transferred": made, "target_only": other}, replaces=False)
    assert kept["returned_parts"] == words
    assert lines(kept)[0].strip() == words and f"<p>{words}</p>" in html(kept, title="t")


@pytest.mark.parametrize(
    ("transferred", "alone", "returned", "words"),
    [
        (
            GOOD,
            POOR,
            "transferred",
            r"^Transfer helped on validation: \+200\.0% NDCG@10 \(\+\d.* to \+\d.*%, p 0.0002",
        ),
        (ONE, OTHER, "transferred", r"^No significant gain .* It is not worse"),
        (
            GOOD,
            GOOD,
            "target_only",
            r"^No sign that transfer helped: \+0\.0% .*target-only model is returned\.$",
        ),
        (OTHER, ONE, "target_only", r"^No sign .* -\d.*target-only model is ret"),
        (POOR, GOOD, "target_only", r"^Transfer harmed on validation: -66\.7% .*target-only model is returned\.$"),
        (
            GOOD,
            metrics([20] * 40),
            "transferred",
            r"^Transfer helped on validation: NDCG@10 \+0\.7500 \(\+0\.\d{4} ",
        ),
    ],
)
def test_the_better_on_validation_is_returned_and_words_say_how_sure_it_is(transferred, alone, returned, words):
    found = report(transferred, alone)
    assert found["returned"] == found["better"] == returned
    assert re.search(words, found["verdict"])
    # without the rule the words only advise
    kept = report(transferred, alone, replaces=False)
    assert kept["returned"] == "transferred" and kept["better"] == returned
    assert ("is the one to take" in kept["verdict"]) == (returned == "target_only")
    assert kept["verdict"] == verdict(kept["validation"], replaces=False)


FEW, FEWER = metrics([0] * 9 + [30] * 31), metrics([30] * 40)
TIED = Metrics("valid", False, 50, np.arange(40), np.zeros(40, np.int64), np.full(40, 30))


@pytest.mark.parametrize(
    ("transferred", "alone", "better", "reason"),
    [
        (FEW, FEWER, "transferred", "9.0 of 40 targets are expected among the first 10 of either model, fewer than 10"),
        (FEWER, FEW, "target_only", "9.0 of 40 targets are expected among the first 10"),
        (metrics([0] * 40), metrics([0] * 33 + [9] * 7), "transferred", "7.0 of 40 cases make the difference"),
        (TIED, metrics([5] * 40), "target_only", r"the order of ties alone moves the difference in ndcg@10 from -0.3"),
        (metrics([5] * 40), TIED, "transferred", "the order of ties alone moves the difference"),
    ],
)
def test_where_few_cases_or_ties_decide_there_is_no_verdict(transferred, alone, better, reason):
    """The bootstrap is sure in all of them."""
    assert paired_bootstrap(transferred.per_user("ndcg@10"), alone.per_user("ndcg@10"), seed=0).p < 0.01
    found = report(transferred, alone)
    assert found["validation"]["p"] is None and reason in found["validation"]["no_verdict"]
    assert found["verdict"].startswith(f"No verdict on transfer: {found['validation']['no_verdict']}. The ")
    assert found["returned"] == found["better"] == better and "may be chance" in found["verdict"]
    assert "%" not in found["verdict"] and ", p " not in found["verdict"]
    text = html(found, title="t")
    assert found["verdict"] in text and "Gain in NDCG@10" not in text and json.loads(json.dumps(found)) == found
    kept = report(transferred, alone, replaces=False)
    assert kept["returned"] == "transferred" and kept["verdict"].endswith("Which of the two is better is open.")


def test_no_figure_is_called_higher_where_both_are_equal():
    found = report(metrics([30] * 40), metrics([30] * 40))
    assert found["verdict"].endswith("The target-only model is returned; both figures are equal.")


def test_a_stage_that_did_not_run_gets_no_verdict_and_steps_left_out_are_reported():
    ran = {"skipped_by_stage": {}, "stages_not_run": []}
    broken = {"skipped_by_stage": {"meta": 4, "finetune": 1}, "stages_not_run": ["meta"]}
    found = report(GOOD, POOR, left_out={"transferred": broken, "target_only": ran})
    assert found["returned"] == "target_only" and found["validation"]["p"] is None
    assert found["verdict"] == (
        "No verdict on transfer: with sources no step of meta was finite. The target-only model is returned."
    )
    reported = "transferred: steps left out because they were not finite: meta 4, finetune 1"
    assert f"  {reported}" in lines(found) and reported in html(found, title="t")
    kept = report(GOOD, POOR, left_out={"transferred": broken, "target_only": ran}, replaces=False)
    assert kept["returned"] == "transferred" and kept["verdict"].endswith("The target-only model is the one to take.")
    alone = report(GOOD, POOR, left_out={"transferred": ran, "target_only": broken})
    assert alone["returned"] == "transferred" and "on the target alone no step of meta was finite" in alone["verdict"]
    # some steps alone leave the verdict as it is
    some = report(GOOD, POOR, left_out={"transferred": ran | {"skipped_by_stage": {"meta": 4}}, "target_only": ran})
    assert some["verdict"] == report()["verdict"] and len(lines(some)) == len(lines(report())) + 1


def test_the_report_has_the_figures_among_all_items_beside():
    both = [dataclasses.replace(m, num_ranked=40, among_all=other) for m, other in ((GOOD, POOR), (POOR, FEWER))]
    found = report(*both)
    assert found["validation"]["all_items"] == {"transferred": 0.25, "target_only": 0.0}
    assert "among all items" in html(found, title="t") and "the 40 items of training events" in html(found, title="t")
    assert report()["validation"]["all_items"] is None and "among all items" not in html(report(), title="t")


def test_without_a_meta_stage_or_codes_nothing_is_made_up():
    found = report(trace=[], codes=None, cooccurrence=None)
    assert found["noise_floor"] is None and found["code_overlap"] is None and found["cooccurrence"] is None
    assert found["sources"] == {"a": None, "b <c>": None}
    assert lines(found) == [f"  {found['returned_parts']}"] and "<table>" in html(found, title="t")
    assert noise_floor([]) is None
    # pretraining: the scorer was learned, without a meta stage
    found = report(trace=[], codes=None, cooccurrence={**FOUND, "transfer": [], "sources": {}})
    assert (
        found["cooccurrence"]["sources"] == {"a": None, "b <c>": None} and found["cooccurrence"]["noise_floor"] is None
    )
    assert titles_of(html(found, title="t"))[1:] == ["Co-occurrence scorer: validation loss by step and stage"]
    # and nothing that could be drawn
    bad = {"validation_loss": [["start", 0, float("nan")]], "best": None, "best_at": ""}
    found = report(trace=[], codes=None, cooccurrence={**FOUND, **bad, "transfer": [], "sources": {}})
    assert found["cooccurrence"]["best"] is None and len(lines(found)) == 1
    assert len(titles_of(html(found, title="t"))) == 1


def test_overlap_of_identical_domains_is_one_and_of_disjoint_ones_zero():
    codes = {"a": np.array([[0, 1, 1], [2, 2, 2]]), "same": np.array([[1, 0, 1], [2, 2, 2]]), "other": [[3], [0]]}
    found = code_overlap(codes, codebook_size=4)
    np.testing.assert_allclose(found["overlap"], [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    assert found["used"] == {"a": 1.5, "same": 1.5, "other": 1.0}
    mixed = report()["code_overlap"]
    np.testing.assert_allclose(mixed["overlap"], [[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]])
    assert mixed["overlap_by_head"][0][2] == [0.5]


def test_lines_hold_the_key_figures():
    reported = "\n".join(lines(report()))
    assert "encoder, a: weight 0.75, similarity +0.040 (1 of 2 late values above the noise floor of 0.040)" in reported
    assert "co-occurrence, b <c>: weight 0.30, similarity of first descent -0.125 ± 0.250" in reported
    assert (
        "co-occurrence: least validation loss by stage warmup 6.600, meta 6.400, finetune 6.450 (best at meta 25)"
        in reported
    )
    assert "leaving it out would cost +20.0% of the descent (estimate)" in reported
    assert "overlap of codes with target: a 0.50, b <c> 0.50" in reported


def charts_of(text):
    return [ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>") for part in text.split("<svg")[1:]]


def titles_of(text):
    return [next(chart.iter(SVG + "text")).text for chart in charts_of(text)]


class Tags(HTMLParser):
    """Open elements are closed again, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_file_is_whole_and_says_what_the_report_says():
    text = html(report(), title="Transfer to <target>")
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and "script" not in tags.seen
    said = "".join(tags.text)
    assert report()["verdict"] in said and "Transfer to <target>" in said and "b <c>" in said
    assert "noise floor, ±0.040" in said and "noise floor, ±0.200" in said and "+20.0%" in said
    assert titles_of(text) == [
        "Gain in NDCG@10 on validation, 95 % interval",
        "Encoder: similarity of sources by meta step",
        "Encoder: weight of sources by meta step",
        "Co-occurrence scorer: similarity of sources by meta step",
        "Co-occurrence scorer: weight of sources by meta step",
        "Co-occurrence scorer: validation loss by step and stage",
        "Overlap of the use of codes",
    ]


def test_the_curve_of_validation_losses_runs_over_all_stages_and_marks_the_best():
    chart = charts_of(html(report(), title="t"))[5]
    texts = [text.text for text in chart.iter(SVG + "text")]
    # steps of all stages: the meta stage begins where warm-up ended
    assert [text for text in texts if text.isdigit()] == ["600", "625", "650", "700"]
    assert texts[-4:] == ["warmup", "meta", "finetune", "best: meta 25, loss 6.4000"]
    curves = [line.get("points").split() for line in chart.iter(SVG + "polyline")]
    assert [len(points) for points in curves] == [1, 3, 2, 1]  # a loss that is not finite has no place
    assert curves[3] == [curves[1][1]] and curves[0][0] == curves[1][0] and curves[1][2] == curves[2][0]
