"""The operators: one file each, with schema, checks, dispatch to CPU, Triton or reference, and gradient."""

from metarec_fast.ops._register import backend_info
from metarec_fast.ops.linear_scan import linear_scan

__all__ = ["backend_info", "linear_scan"]
