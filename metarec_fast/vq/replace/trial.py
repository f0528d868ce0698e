"""Comparison of two quantizers on random rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_TRIES = 3  # rows near to a tie may decide otherwise: one agreement of several is enough


def difference(old: nn.Module, new: nn.Module) -> str | None:
    """The first result in which ``new`` differs from ``old``, in eval mode or after a training step, or None.

    Changes both modules: pass copies. Training is compared only where it draws nothing at random.
    """
    what = None
    with torch.random.fork_rng(devices=()):
        for seed in range(_TRIES):
            torch.manual_seed(seed)
            what = _difference(old, new)
            if what is None:
                return None
    return what


def _difference(old: nn.Module, new: nn.Module) -> str | None:
    first = new.layers[0] if hasattr(new, "layers") else new
    _init(old), _init(new)
    parameter = next(iter(new.parameters()), first._codebook.cluster_size)
    x = torch.randn(_shape(new), device=parameter.device, dtype=first._module_dtype.dtype)
    names = ("quantized", "indices", "loss")
    modes = ["eval mode"] if _draws(new) else ["eval mode", "training"]
    for mode in modes:
        results = []
        for module in (old, new):
            module.train(mode == "training")
            leaf = x.clone().requires_grad_(mode == "training")
            try:
                out = module(leaf)
            except Exception as error:  # the code of others
                return f"forward in {mode} ({type(error).__name__}: {error})"
            if not isinstance(out, tuple) or len(out) != 3 or not all(isinstance(part, Tensor) for part in out):
                return f"form of results in {mode}"
            if mode == "training":
                total = out[0].float().square().sum() + out[2].sum()
                if total.requires_grad:
                    total.backward()
            results.append((out, leaf.grad, [p.grad for p in module.parameters()]))
            module.zero_grad()
        for name, a, b in zip(names, results[0][0], results[1][0], strict=True):
            if not _close(a, b):
                return f"{name} in {mode}"
        if not _close(results[0][1], results[1][1]) or not _close(results[0][2], results[1][2]):
            return "gradient in training"
    a, b = old.state_dict(), new.state_dict()
    if a.keys() != b.keys():
        return "state_dict"
    return next((f"{name} after a step of training" for name in a if not _close(a[name], b[name])), None)


def _init(module: nn.Module) -> None:
    with torch.no_grad():
        for part in module.modules():
            if "initted" in part._buffers and not part.initted.all():
                part.initted.fill_(True)
                torch.manual_seed(0)
                part.embed.copy_(nn.functional.normalize(torch.randn(part.embed.shape), dim=-1))


def _shape(new: nn.Module) -> tuple[int, ...]:
    layout = new._layout
    if layout.image:
        return 2, layout.dim, 2, 4
    if layout.volume:
        return 2, layout.dim, 2, 2, 2
    return (2, layout.dim, 8) if not layout.channel_last else (2, 8, layout.dim)


def _draws(new: nn.Module) -> bool:
    layers = new.layers if hasattr(new, "layers") else [new]
    return getattr(new, "quantize_dropout", False) or any(
        layer.stochastic_sample_codes
        or layer.directional_reparam
        or layer.in_place_codebook_optimizer is not None
        or layer._codebook.has_dead_code_replacement
        for layer in layers
    )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_close, a, b))
    if a is None or b is None:
        return a is b or not (b if a is None else a).any()
    if a.shape != b.shape:
        return a.numel() == b.numel() == 1 and _close(a.reshape(()), b.reshape(()))
    if not a.is_floating_point():
        return torch.equal(a, b)
    half = a.dtype in (torch.float16, torch.bfloat16) or b.dtype in (torch.float16, torch.bfloat16)
    rtol, atol = (0.05, 0.05) if half else (1e-3, 1e-4)
    a, b = a.detach().float(), b.detach().float()
    return torch.allclose(a, b, rtol=rtol, atol=atol * max(1.0, float(a.abs().max()) if a.numel() else 1.0))
