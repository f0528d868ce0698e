"""The operators: one file or folder each, with schema, checks, dispatch to CPU, Triton or reference, and gradient."""

from metarec_fast.ops.register import backend_info  # first: it says why an extension cannot be loaded

# isort: split
from metarec_fast.ops.bounded_lookup import LookupWork, RowBounds, bounded_lookup_
from metarec_fast.ops.epoch_order import epoch_order
from metarec_fast.ops.gather_cooccurrence import CooccurrenceGraph, gather_cooccurrence
from metarec_fast.ops.linear import linear
from metarec_fast.ops.linear_cross_entropy import linear_cross_entropy
from metarec_fast.ops.linear_scan import linear_scan
from metarec_fast.ops.nearest_codeword import NearestCodeword, nearest_codeword
from metarec_fast.ops.pack_windows import pack_windows
from metarec_fast.ops.pad_packed import pad_packed
from metarec_fast.ops.sample_negatives import (
    PopularityTable,
    popularity_table,
    sample_negatives,
    sample_shared_negatives,
)
from metarec_fast.ops.sampled_cross_entropy import sampled_cross_entropy
from metarec_fast.ops.target_ranks import TargetRanks, target_ranks
from metarec_fast.ops.vq_commit import VQCommit, vq_commit
from metarec_fast.ops.vq_ema_update import vq_ema_update_
from metarec_fast.ops.vq_statistics import VQStatistics, vq_statistics

__all__ = [
    "CooccurrenceGraph",
    "LookupWork",
    "NearestCodeword",
    "PopularityTable",
    "RowBounds",
    "TargetRanks",
    "VQCommit",
    "VQStatistics",
    "backend_info",
    "bounded_lookup_",
    "epoch_order",
    "gather_cooccurrence",
    "linear",
    "linear_cross_entropy",
    "linear_scan",
    "nearest_codeword",
    "pack_windows",
    "pad_packed",
    "popularity_table",
    "sample_negatives",
    "sample_shared_negatives",
    "sampled_cross_entropy",
    "target_ranks",
    "vq_commit",
    "vq_ema_update_",
    "vq_statistics",
]
