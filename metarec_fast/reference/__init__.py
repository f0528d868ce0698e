"""The plain definition of every operator and of the meta step, on torch and numpy alone."""

from metarec_fast.reference.gather_cooccurrence import gather_cooccurrence
from metarec_fast.reference.linear_cross_entropy import linear_cross_entropy
from metarec_fast.reference.linear_scan import linear_scan
from metarec_fast.reference.meta_step import meta_step
from metarec_fast.reference.missed_steps import missed_steps_
from metarec_fast.reference.nearest_codeword import nearest_codeword
from metarec_fast.reference.target_ranks import linear_scores, linear_target_ranks, target_ranks
from metarec_fast.reference.vq_backward import vq_backward
from metarec_fast.reference.vq_commit import vq_commit
from metarec_fast.reference.vq_ema_update import vq_ema_update_
from metarec_fast.reference.vq_statistics import vq_statistics

__all__ = [
    "gather_cooccurrence",
    "linear_cross_entropy",
    "linear_scan",
    "linear_scores",
    "linear_target_ranks",
    "meta_step",
    "missed_steps_",
    "nearest_codeword",
    "target_ranks",
    "vq_backward",
    "vq_commit",
    "vq_ema_update_",
    "vq_statistics",
]
