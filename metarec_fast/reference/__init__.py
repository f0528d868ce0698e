"""The plain definition of every operator and of the meta step, on torch and numpy alone."""

from metarec_fast.reference.linear_scan import linear_scan
from metarec_fast.reference.meta_step import meta_step

__all__ = ["linear_scan", "meta_step"]
