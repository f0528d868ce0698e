"""A study small enough to run within a second."""

import dataclasses

from metarec_fast.study import Arm, Comparison, Study
from tests.tiny import config

SYNTHETIC = {"source_users": 60, "source_items": 40, "target_users": 40, "target_items": 30}
TRAIN = {**dataclasses.asdict(config().train), "meta_steps": 10, "threads": 1}  # long enough for a trace
ARMS = (
    Arm(name="popularity", group="baseline", baseline="popularity"),
    Arm(name="best-baseline", group="baseline", baseline="best"),
    Arm(name="alone", group="structure", options={"train": {"method": "target_only"}}),
    Arm(name="ours", group="ours"),
    Arm(name="shuffled", group="control", sources=("shuffled",)),
)


def study(**changes) -> Study:
    given = {
        "name": "tiny",
        "targets": ("target",),
        "sources": ("source0", "source1"),
        "arms": ARMS,
        "fractions": (0.5, 1.0),
        "seeds": (0, 1),
        "comparisons": (
            Comparison(arm="ours", against=("alone",)),
            Comparison(arm="ours", against=("popularity", "best-baseline"), title="ours against baselines"),
        ),
        "options": {**dataclasses.asdict(config()), "train": TRAIN},
        "synthetic": SYNTHETIC,
    }
    return Study(**{**given, **changes})
