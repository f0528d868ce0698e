"""Vector quantization: the module FastVQ, its parts as functions, and the proof that codes are the nearest."""

from metarec_fast.ops.gradient_estimators import rotate_to, straight_through
from metarec_fast.vq.assignments import AssignmentStats, CodebookAssignments
from metarec_fast.vq.fast_vq import FastVQ, LossBreakdown
from metarec_fast.vq.functional import quantize
from metarec_fast.vq.verify import Verification, verify

__all__ = [
    "AssignmentStats",
    "CodebookAssignments",
    "FastVQ",
    "LossBreakdown",
    "Verification",
    "quantize",
    "rotate_to",
    "straight_through",
    "verify",
]
