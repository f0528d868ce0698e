"""linear_cross_entropy: softmax cross-entropy over an item table, in tiles, without a [T, V] tensor."""

from metarec_fast.ops.linear_cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
