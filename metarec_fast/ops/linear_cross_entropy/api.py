"""The public function: arguments, their checks, and which path runs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metarec_fast.ops.linear_cross_entropy.autograd import Loss, WeightedSum
from metarec_fast.ops.register import Backend, check_tensor, choose_backend, traced_transform
from metarec_fast.reference.linear_cross_entropy import linear_cross_entropy as reference_linear_cross_entropy

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0,  # no float: torch.compile would make a symbol of it, and trace twice
    backend: Backend = "auto",
) -> Tensor:
    """Softmax cross-entropy of every row over all items, without a [T, V] tensor in memory.

    loss_t = log sum_v exp(logit_tv) - logit_(t, target_t), with logit_tv = <h_t, table_v> + bias_v.

    h: [T, D] float32 or float64, for example the packed states of an encoder. States of several batches over one
        table are cheapest as one call: h.flatten(0, 1), which is also what vmap over h does.
    table: [V, D] item vectors, V >= 1, dtype of h.
    targets: [T] int64 in [0, V), or ignore_index.
    bias: [V], dtype of h, or None. An item of bias -inf is left out.
    row_weight: [T], dtype of h, multiplies the losses.
    reduction: "none"; "sum" of the weighted losses; or "mean", the sum over the sum of the weights (without
        row_weight, over the number) of rows that are not ignored, NaN if there is none. The gradients
        of a scalar are computed in the forward pass already, with a quarter less arithmetic: prefer it to reducing
        the losses afterwards.
    ignore_index: rows of this target have loss and gradients 0 and cost nothing.
    label_smoothing: in [0, 1], the part of the target's probability that is spread evenly over all items.
    backend: "auto", "reference", "cpu" or "triton".

    Returns loss: [T], or [] if reduced. Rows whose loss gets a gradient of zero cost nothing in the first backward
    pass of reduction "none".

    The fused paths are for float32. They are differentiable twice in h, table, bias and row_weight, also under
    torch.func and, with backward(), under torch.compile; a third derivative raises RuntimeError. The CPU path needs
    memory of order (T + V) D and up to 16 MB for a block of rows, and does not depend on the number of threads. The
    Triton path repeats to the bit; its second derivative is composed of torch's products, for a few rows at a time.

    float64 runs the reference composition, which keeps [T, V] tensors and is differentiable any number of times. So
    does "auto" where torch.compile traces a torch.func transform, as torch would lose the gradient of the fused path
    there; "cpu" and "triton" then raise RuntimeError.

    Raises TypeError or ValueError for arguments of another dtype, shape or device, and on the fused CPU path ValueError
    for a target outside [0, V) that is not ignore_index; on a GPU targets are trusted, as a look would wait for it.
    """
    _check(h, table, targets, bias, row_weight, reduction, label_smoothing)
    chosen = choose_backend(backend, h.device, operator="linear_cross_entropy", triton=True)
    if chosen != "reference" and traced_transform():
        if backend != "auto":
            raise RuntimeError(
                f"linear_cross_entropy: backend={backend!r} has no gradient where torch.compile traces torch.func; use "
                "backend='auto' or 'reference', or leave this part out of the compiled code"
            )
        chosen = "reference"
    of_nothing = reduction == "mean" and h.shape[0] == 0  # NaN, as the sum of no weights divides
    if chosen == "reference" or h.dtype == torch.float64 or of_nothing:
        return reference_linear_cross_entropy(
            h,
            table,
            targets,
            bias,
            row_weight=row_weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    if reduction == "none":
        loss, _ = Loss.apply(h, table, targets, bias, ignore_index)
        if label_smoothing:
            loss = loss + label_smoothing * _target_excess(h, table, targets, bias, ignore_index)
        return loss if row_weight is None else row_weight * loss
    weight = (targets != ignore_index).to(h.dtype)
    if row_weight is not None:
        weight = weight * row_weight
    if reduction == "mean":
        weight = weight / weight.sum()
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (h, table, bias)]
    loss = WeightedSum.apply(h, table, targets, bias, weight, ignore_index, *needs)[0]
    if label_smoothing:
        loss = loss + label_smoothing * (weight * _target_excess(h, table, targets, bias, ignore_index)).sum()
    return loss


def _target_excess(h: Tensor, table: Tensor, targets: Tensor, bias: Tensor | None, ignored: int) -> Tensor:
    """The target's logit over the mean of all items': [T], 0 where ignored. It needs no other logits."""
    keep = targets != ignored
    target = targets.where(keep, 0)
    direction = torch.nn.functional.embedding(target, table) - table.mean(0)
    excess = (h.masked_fill(~keep[:, None], 0.0) * direction).sum(1)
    return (excess if bias is None else excess + (bias[target] - bias.mean())).masked_fill(~keep, 0.0)


def _check(
    h: Tensor,
    table: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    check_tensor(h, "h", dtypes=(torch.float32, torch.float64), dims=2)
    check_tensor(table, "table", dtypes=(h.dtype,), dims=2, device=h.device)
    check_tensor(targets, "targets", dtypes=(torch.int64,), dims=1, device=h.device)
    (T, D), V = h.shape, table.shape[0]
    if table.shape[1] != D:
        raise ValueError(f"table must be [V, {D}] to match h, got {tuple(table.shape)}")
    if V == 0:
        raise ValueError(f"table must have at least one row, got {tuple(table.shape)}")
    if targets.shape[0] != T:
        raise ValueError(f"targets must be [{T}] to match h, got {tuple(targets.shape)}")
    if bias is not None:
        check_tensor(bias, "bias", dtypes=(h.dtype,), dims=1, device=h.device)
        if bias.shape[0] != V:
            raise ValueError(f"bias must be [{V}] to match table, got {tuple(bias.shape)}")
    if row_weight is not None:
        check_tensor(row_weight, "row_weight", dtypes=(h.dtype,), dims=1, device=h.device)
        if row_weight.shape[0] != T:
            raise ValueError(f"row_weight must be [{T}] to match h, got {tuple(row_weight.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
