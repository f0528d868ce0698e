"""Learning to transfer: inner adaptation, similarity, source weights, the outer step."""

from metarec_fast.meta.captured import CapturedStep, FixedStep
from metarec_fast.meta.signals import NoiseFloor, keep_trace, leaving_out, signals
from metarec_fast.meta.step import (
    GradientAverages,
    OuterStep,
    Source,
    inner_adapt,
    outer_step,
    source_weights,
)

__all__ = [
    "CapturedStep",
    "FixedStep",
    "GradientAverages",
    "NoiseFloor",
    "OuterStep",
    "Source",
    "inner_adapt",
    "keep_trace",
    "leaving_out",
    "outer_step",
    "signals",
    "source_weights",
]
