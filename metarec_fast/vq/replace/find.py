"""Which modules are a VectorQuantize, or a residual quantizer of them, whatever package defines the class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from metarec_fast.vq.fast_vq import FastVQ
from metarec_fast.vq.residual_vq import FastGroupedResidualVQ, FastResidualVQ

_PACKAGE = "vector_quantize_pytorch"
_CODEBOOKS = ("Codebook", "EuclideanCodebook", "CosineSimCodebook")
_FAST = (FastVQ, FastResidualVQ, FastGroupedResidualVQ)


def is_vector_quantize(module: nn.Module) -> bool:
    """Whether ``module`` is built as VectorQuantize is: a codebook with averages between two projections."""
    codebook = module._modules.get("_codebook")
    return (
        not isinstance(module, _FAST)
        and codebook is not None
        and all(isinstance(getattr(codebook, name, None), Tensor) for name in ("embed", "cluster_size", "initted"))
        and {"project_in", "project_out"} <= module._modules.keys()
        and all(hasattr(module, name) for name in ("codebook_size", "heads", "commitment_weight"))
    )


def is_residual(module: nn.Module) -> bool:
    """Whether ``module`` is built as ResidualVQ is: levels in ``layers``, of which dropout may leave out the last."""
    return _is_list_of(is_vector_quantize, module, "layers", "num_quantizers", "quantize_dropout")


def is_grouped(module: nn.Module) -> bool:
    """Whether ``module`` is built as GroupedResidualVQ is."""
    return _is_list_of(is_residual, module, "rvqs", "groups")


def _is_list_of(kind: Callable[[nn.Module], bool], module: nn.Module, name: str, *attributes: str) -> bool:
    parts = module._modules.get(name)
    return (
        not isinstance(module, _FAST)
        and isinstance(parts, nn.ModuleList)
        and len(parts) > 0
        and all(map(kind, parts))
        and all(hasattr(module, attribute) for attribute in attributes)
    )


def upstream_class(module: nn.Module) -> type | None:
    """The class of vector_quantize_pytorch that ``module`` has or derives from."""
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == _PACKAGE:
            return cls
    return None


def why_not(module: nn.Module) -> str | None:
    """Why ``module``, built as a quantizer, is not one whose behaviour is known; None if it may be."""
    base, cls = upstream_class(module), type(module)
    if base is not None and base is not cls:
        known = {name for name, _ in inspect.getmembers(base) if name not in vars(nn.Module)} | {"forward"}
        own = [
            name
            for derived in cls.__mro__[: cls.__mro__.index(base)]
            for name in vars(derived)
            if name in known and not name.startswith("__")
        ]
        if own:
            return f"{cls.__name__} overrides {', '.join(sorted(own))} of {base.__name__}"
    codebook = module._modules.get("_codebook")
    upstreams = type(codebook).__name__ in _CODEBOOKS and upstream_class(codebook) is type(codebook)
    if codebook is not None and base is not None and not upstreams:
        return f"its codebook is a {type(codebook).__name__} of its own"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    return None


def own_quantizers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of modules that look like quantizers of other kinds, and what they look like."""
    for name, module in model.named_modules():
        parts, buffers = module._modules, module._buffers
        if {"cluster_size", "embed"} <= buffers.keys() or {"cluster_usage", "embed_sum"} <= buffers.keys():
            if not isinstance(module, nn.ModuleList) and not _inside_fast(model, name):
                yield name, "a codebook of moving averages"
        elif isinstance(parts.get("codebook"), nn.Embedding) and "out_proj" in parts:
            yield name, "a factorised codebook"
        elif isinstance(parts.get("embedding"), nn.Embedding) and (hasattr(module, "beta") or "quant" in name):
            yield name, "an embedding as codebook"


def _inside_fast(model: nn.Module, name: str) -> bool:
    parent, _, last = name.rpartition(".")
    return last == "_codebook" and isinstance(model.get_submodule(parent), FastVQ)
