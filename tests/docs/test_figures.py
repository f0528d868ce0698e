"""Figures of quality in README and the guide to reproducing are those of the published results."""

import csv
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAIN = ("sasrec", "sasrec-vq", "lru", "lru-vq")
ROW = re.compile(r"^\| (office|tools|beauty)(?:, (\d+) % \([\d,]+\))? \|(.*)\|$", re.MULTILINE)


def means(experiment):
    """NDCG@10 by arm, target and share of users: the mean over seeds."""
    found = defaultdict(list)
    with (ROOT / "experiments" / experiment / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["arm"], row["target"].removeprefix("amazon14_"), float(row["fraction"])
            found[key].append(float(row["ndcg@10"]))
    return {key: sum(values) / len(values) for key, values in found.items()}


MEANS = means("all_users") | means("headline")


def gains(experiment):
    """Of MetaRec against target only, by target and share of users: gain, interval and adjusted p."""
    with (ROOT / "experiments" / experiment / "comparisons.csv").open(newline="", encoding="utf-8") as file:
        return {
            (row["target"].removeprefix("amazon14_"), float(row["fraction"])): row
            for row in csv.DictReader(file)
            if row["arm"] == "ours" and row["baseline"] == "target-only"
        }


GAINS = gains("all_users") | gains("headline")


def is_rounded(text, value):
    """``text`` is the value to as many digits as it has; a half may go either way."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


def rows(page):
    for target, share, rest in ROW.findall((ROOT / page).read_text(encoding="utf-8")):
        yield target, float(share or 5) / 100, [cell.strip() for cell in rest.split("|")]


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/guides/reproduce.md", 12)])
def test_ndcg_by_target_and_share_of_users(page, count):
    table = list(rows(page))
    assert len(table) == count
    for target, share, (plain, alone, pretrained, ours, gain, *p) in table:
        known = {arm: value for (arm, *where), value in MEANS.items() if where == [target, share]}
        best = max(known[arm] for arm in PLAIN)
        for cell, value in ((plain, best), (alone, known["target-only"]), (ours, known["ours"])):
            assert cell == f"{value:.4f}"[1:], (page, target, share)
        assert pretrained == (f"{known['pretrain']:.4f}"[1:] if "pretrain" in known else "")
        compared = GAINS[target, share]
        for quoted, column in zip(re.findall(r"[+-]?[\d.]+", gain), ("gain", "gain_low", "gain_high"), strict=True):
            assert is_rounded(quoted, 100 * float(compared[column])), (target, share, column)
        for quoted in p:
            assert is_rounded(f"0{quoted}", float(compared["p_holm"])), (target, share)
