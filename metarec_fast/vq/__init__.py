"""Vector quantization: the module FastVQ, and its parts as functions."""

from metarec_fast.vq.fast_vq import FastVQ, LossBreakdown
from metarec_fast.vq.functional import quantize
from metarec_fast.vq.gradient_estimators import rotate_to, straight_through
from metarec_fast.vq.health import CodebookHealth

__all__ = ["CodebookHealth", "FastVQ", "LossBreakdown", "quantize", "rotate_to", "straight_through"]
