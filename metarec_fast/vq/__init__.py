"""Vector quantization: FastVQ, residual quantizers, the functional form, and the verification of codes."""

from metarec_fast.ops.gradient_estimators import rotate_to, straight_through
from metarec_fast.vq.assignments import AssignmentStats, CodebookAssignments
from metarec_fast.vq.fast_vq import FastVQ, LossBreakdown
from metarec_fast.vq.functional import quantize, quantize_learned
from metarec_fast.vq.parts.health import CodebookHealth
from metarec_fast.vq.replace import replace_vector_quantize
from metarec_fast.vq.residual_vq import FastGroupedResidualVQ, FastResidualVQ
from metarec_fast.vq.verify import Verification, verify

__all__ = [
    "AssignmentStats",
    "CodebookAssignments",
    "CodebookHealth",
    "FastGroupedResidualVQ",
    "FastResidualVQ",
    "FastVQ",
    "LossBreakdown",
    "Verification",
    "quantize",
    "quantize_learned",
    "replace_vector_quantize",
    "rotate_to",
    "straight_through",
    "verify",
]
