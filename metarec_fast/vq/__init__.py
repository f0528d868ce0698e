"""Vector quantization: the module FastVQ, what is built from it, and its parts as functions."""

from metarec_fast.ops.gradient_estimators import rotate_to, straight_through
from metarec_fast.vq.fast_vq import FastVQ, LossBreakdown
from metarec_fast.vq.functional import quantize
from metarec_fast.vq.replace import replace_vector_quantize
from metarec_fast.vq.residual_vq import FastGroupedResidualVQ, FastResidualVQ

__all__ = [
    "FastGroupedResidualVQ",
    "FastResidualVQ",
    "FastVQ",
    "LossBreakdown",
    "quantize",
    "replace_vector_quantize",
    "rotate_to",
    "straight_through",
]
