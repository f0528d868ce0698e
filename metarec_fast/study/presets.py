"""The studies that come with the package, each a JSON file in ``descriptions``.

smoke: every kind of arm on small synthetic domains, in less than a minute. published: three targets of Amazon, five
sources, four fractions, three seeds, every arm. short: the same grid with small budgets and nothing tuned.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from metarec_fast.study.grid import Study

DESCRIPTIONS = Path(__file__).parent / "descriptions"


def preset(name: str) -> Study:
    return Study.load(DESCRIPTIONS / f"{name}.json")


PRESETS = {name: partial(preset, name) for name in ("smoke", "short", "published")}
