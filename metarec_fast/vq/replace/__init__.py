"""FastVQ and the fast composites in the place of VectorQuantize and its composites, in models that exist."""

from __future__ import annotations

import copy
import gc
import types
import warnings
from typing import Any

from torch import nn

from metarec_fast.vq.replace.convert import (
    converted,
    converted_grouped,
    converted_mlp,
    converted_residual,
    loss_has_axis,
)
from metarec_fast.vq.replace.find import (
    is_grouped,
    is_residual,
    is_vector_quantize,
    own_quantizers,
    upstream_class,
    why_not,
)
from metarec_fast.vq.replace.stand_in import become
from metarec_fast.vq.replace.trial import difference


def replace_vector_quantize(model: nn.Module, **overrides: Any) -> nn.Module:
    """Turn every ``VectorQuantize``, ``ResidualVQ`` and ``GroupedResidualVQ`` inside ``model`` into its fast class.

    model: any module, changed in place. Classes are those of vector_quantize_pytorch from 0.10 on, classes derived
        from them that only add to them, and copies of them in other packages, which are first compared with their
        replacement on random rows. Inside other composites (RandomProjectionQuantizer, HierarchicalVQ) each
        VectorQuantize is turned into a FastVQ.
    overrides: arguments of FastVQ in place of what a layer was built with, such as strict_upstream=True.

    Each module stays the same object, so that every reference to it has the fast one, and an instance of its old
    class, for ``isinstance``. Settings, state_dict names, training mode of each part, requires_grad, device, dtype,
    projections, hooks, sharing and other attributes stay; parameters stay the same objects, so that an existing
    optimizer still updates them. Averages of half precision become float32. Ranks share statistics whenever
    torch.distributed is running, unless sync_codebook=False is given.

    Returns ``model``. Warns with the names of modules that are not replaced, and why (a derived class that overrides a
    method, a copy that computes something else), of those that will train otherwise, and of bound methods of replaced
    modules that are referenced somewhere. Raises ValueError if there is nothing to replace.

    >>> rvq = replace_vector_quantize(ResidualVQ(dim=64, num_quantizers=8, codebook_size=1024))
    """
    remarks: dict[nn.Module, str] = {}
    replaced = _replace(model, overrides, remarks, trusts_copies=False)
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, repr(name) if name else "the model itself")
    notes = [f"{names[module]} ({type(module).__name__}) {what}" for module, what in remarks.items()]
    if not replaced:
        seen = notes or [f"{name!r} looks like {what}, which takes a patch" for name, what in own_quantizers(model)]
        hint = f" to replace: {'; '.join(seen)}; see docs/guides/replace.md" if seen else ""
        kind = type(model).__name__
        raise ValueError(f"model holds no vector_quantize_pytorch.VectorQuantize, got {kind}{hint}")
    notes += _bound_methods(replaced, names)
    if notes:
        warnings.warn("replace_vector_quantize: " + "; ".join(notes), stacklevel=2)
    return model


def _replace(
    model: nn.Module, overrides: dict[str, Any], notes: dict[nn.Module, str], *, trusts_copies: bool
) -> set[nn.Module]:
    """Replaces what it can in ``model``, notes the rest in ``notes``, returns what is replaced."""
    modules = list(model.modules())
    layers = [m for m in modules if is_vector_quantize(m)]
    residuals, groups = [m for m in modules if is_residual(m)], [m for m in modules if is_grouped(m)]

    def serves(module: nn.Module) -> bool:
        reason = why_not(module)
        if reason is None and upstream_class(module) is None and not trusts_copies:
            reason = _differs(module, overrides)
        if reason is not None:
            notes[module] = f"stays as it is: {reason}"
        return reason is None

    codebooks, fast = {}, {}
    for layer in filter(serves, layers):
        try:
            fast[layer] = converted(layer, codebooks, overrides)
        except ValueError as error:
            notes[layer] = f"stays as it is: {error}"
            continue
        if not hasattr(layer._codebook, "embed_avg"):
            notes[layer] = (
                "of a version before 1.6 trains by today's rule for cosine codes: the loss compares directions, and "
                "averages start from codes times cluster sizes"
            )
    levels, within = {}, set()
    for residual in residuals:
        if not all(layer in fast for layer in residual.layers) or not serves(residual):
            continue
        try:
            levels[residual] = converted_residual(residual, [fast[layer] for layer in residual.layers])
        except ValueError as error:
            notes[residual] = f"keeps its own loop, around levels that are FastVQ: {error}"
            continue
        within |= set(residual.layers)
    # decided; from here on modules change
    axes = {module: loss_has_axis(module) for module in layers}
    axes |= {residual: axes[residual.layers[0]] for residual in levels}
    replaced = set(fast) | set(levels)
    for old, new in codebooks.items():
        become(old, new)
    for layer, new in fast.items():
        new._codebook = layer._codebook  # the same object, changed
        become(layer, new, loss_has_axis=axes[layer] and layer not in within)
    for residual, new in levels.items():
        for mlp in new.mlps or ():
            become(mlp, converted_mlp(mlp))
        become(residual, new, loss_has_axis=axes[residual])
    for group in groups:
        if all(rvq in levels for rvq in group.rvqs) and serves(group):
            become(group, converted_grouped(group))
            replaced.add(group)
    return replaced


def _differs(module: nn.Module, overrides: dict[str, Any]) -> str | None:
    twin = copy.deepcopy(module)
    notes: dict[nn.Module, str] = {}
    _replace(twin, overrides, notes, trusts_copies=True)
    if twin in notes:
        return notes[twin]
    what = difference(copy.deepcopy(module), twin)
    return None if what is None else f"a copy of the class, whose {what} differs from what the fast class computes"


def _bound_methods(replaced: set[nn.Module], names: dict[nn.Module, str]) -> list[str]:
    """References to methods of the old classes, which would run old code on a new module."""
    owners = {id(vars(m)): name for m, name in names.items()}
    notes = []
    for method in gc.get_referrers(*replaced):
        if isinstance(method, types.MethodType) and method.__self__ in replaced:
            current = getattr(type(method.__self__), method.__name__, None)
            if current is not method.__func__:
                where = _where(method, owners)
                notes.append(f"{where} holds the old {method.__name__} of {names[method.__self__]}: take it again")
    return notes


def _where(held: object, owners: dict[int, str], depth: int = 3) -> str:
    for holder in gc.get_referrers(held):
        if isinstance(holder, dict):
            key = next((k for k, v in holder.items() if v is held), None)
            if id(holder) in owners:
                return f"attribute {key!r} of {owners[id(holder)]}"
            if key is not None and isinstance(key, str) and "__builtins__" not in holder:
                return f"the entry {key!r} of a dict or object"
        elif isinstance(holder, types.CellType):
            functions = [f for c in gc.get_referrers(holder) if isinstance(c, tuple) for f in gc.get_referrers(c)]
            name = next((f.__qualname__ for f in functions if isinstance(f, types.FunctionType)), "a function")
            return f"the closure of {name}"
        elif isinstance(holder, list | tuple) and depth:
            return f"a {type(holder).__name__} in {_where(holder, owners, depth - 1)}"
    return "something"
