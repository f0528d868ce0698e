"""The plain definition of every operator and of the meta step, on torch and numpy alone."""

from metarec_fast.reference.linear_scan import linear_scan

__all__ = ["linear_scan"]
