"""Modules that vectors pass through, in the precision in which they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype that ``module`` computes in: that of its weight, else of its first floating parameter.

    float32 if there is none: the weights of quantized layers are integers, or hidden behind a method.
    """
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    weight = getattr(first, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, with ``x`` as the module's weights need it; an Identity leaves ``x`` alone."""
    return x if isinstance(module, nn.Identity) else module(x.to(compute_dtype(module)))
