"""Schemas of the passes, and what runs each."""

from __future__ import annotations

from metarec_fast.ops.linear_cross_entropy import cpu, cuda
from metarec_fast.ops.linear_cross_entropy.shapes import gradient_shapes
from metarec_fast.ops.linear_cross_entropy.vmap import batched, batched_sum
from metarec_fast.ops.register import define

_NEEDS = "bool need_h, bool need_table, bool need_bias"
_GRADS = "Tensor grad_h, Tensor grad_table, Tensor grad_bias"

forward = define(
    "linear_cross_entropy(Tensor h, Tensor table, Tensor targets, Tensor? bias, int ignored) -> (Tensor loss, "
    "Tensor lse)",
    cpu=cpu.forward,
    cuda=cuda.forward,
    fake=lambda h, table, targets, bias, ignored: (h.new_empty(h.shape[0]), h.new_empty(h.shape[0])),
    vmap=batched(lambda: forward, rows="0 2", needs=False),
)
backward = define(
    "linear_cross_entropy_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, Tensor lse, "
    f"int ignored, {_NEEDS}) -> ({_GRADS})",
    cpu=cpu.backward,
    cuda=cuda.backward,
    fake=lambda grad, h, table, targets, bias, lse, ignored, *needs: tuple(
        map(h.new_empty, gradient_shapes(h, table, *needs))
    ),
    vmap=batched(lambda: backward, rows="0 1 3 5"),
)
double_backward = define(
    "linear_cross_entropy_double_backward(Tensor grad, Tensor h, Tensor table, Tensor targets, Tensor? bias, "
    f"Tensor lse, Tensor? u, Tensor? w, Tensor? c, int ignored, {_NEEDS}) -> (Tensor grad_grad, {_GRADS})",
    cpu=cpu.double_backward,
    cuda=cuda.double_backward,
    fake=lambda grad, h, table, targets, bias, lse, u, w, c, ignored, *needs: (
        h.new_empty(h.shape[0]),
        *map(h.new_empty, gradient_shapes(h, table, *needs)),
    ),
    vmap=batched(lambda: double_backward, rows="0 1 3 5 6"),
)
weighted_sum = define(
    "linear_cross_entropy_sum(Tensor h, Tensor table, Tensor targets, Tensor? bias, Tensor weight, int ignored, "
    f"{_NEEDS}) -> (Tensor total, Tensor loss, Tensor lse, {_GRADS})",
    cpu=cpu.weighted_sum,
    cuda=cuda.weighted_sum,
    fake=lambda h, table, targets, bias, weight, ignored, *needs: (
        h.new_empty(()),
        h.new_empty(h.shape[0]),
        h.new_empty(h.shape[0]),
        *map(h.new_empty, gradient_shapes(h, table, *needs)),
    ),
    vmap=batched_sum(lambda: weighted_sum),
)
