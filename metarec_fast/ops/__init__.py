"""The operators: one file each, with schema, checks, dispatch to CPU, Triton or reference, and gradient."""

from metarec_fast.ops._register import backend_info
from metarec_fast.ops.linear_cross_entropy import linear_cross_entropy
from metarec_fast.ops.linear_scan import linear_scan
from metarec_fast.ops.nearest_codeword import NearestCodeword, nearest_codeword
from metarec_fast.ops.vq_commit import VQCommit, vq_commit
from metarec_fast.ops.vq_ema_update import vq_ema_update_
from metarec_fast.ops.vq_statistics import VQStatistics, vq_statistics

__all__ = [
    "NearestCodeword",
    "VQCommit",
    "VQStatistics",
    "backend_info",
    "linear_cross_entropy",
    "linear_scan",
    "nearest_codeword",
    "vq_commit",
    "vq_ema_update_",
    "vq_statistics",
]
