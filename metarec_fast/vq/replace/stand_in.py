"""Modules that take another module's place as the same object, and are instances of both classes."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn:
    """First base of a class that is ``fast_class`` in what it does and ``replaced_class`` for ``isinstance``.

    Pickles by the names of both classes; where the replaced one cannot be imported, the fast one alone is loaded.
    """

    fast_class: type[nn.Module]
    replaced_class: type[nn.Module]
    loss_has_axis: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # not by super(): the next class after the fast one is the replaced one
        object.__setattr__(self, "__dict__", self.fast_class(*args, **kwargs).__dict__)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        names = self.replaced_class.__module__, self.replaced_class.__qualname__
        return _blank, (self.fast_class, *names, self.loss_has_axis), self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


def _blank(fast_class: type[nn.Module], module: str, qualname: str, loss_has_axis: bool) -> nn.Module:
    try:
        replaced = functools.reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return object.__new__(fast_class)
    return object.__new__(stand_in_class(fast_class, replaced, loss_has_axis))


@functools.cache
def stand_in_class(
    fast_class: type[nn.Module], replaced_class: type[nn.Module], loss_has_axis: bool
) -> type[nn.Module]:
    """A class that computes as ``fast_class`` and is a subclass of both."""
    members = {
        "__module__": fast_class.__module__,
        "__qualname__": fast_class.__qualname__,
        "__doc__": fast_class.__doc__,
        "fast_class": fast_class,
        "replaced_class": replaced_class,
        "loss_has_axis": loss_has_axis,
    }
    for name in dir(replaced_class):
        attribute = inspect.getattr_static(replaced_class, name)
        if isinstance(attribute, property) and not hasattr(fast_class, name):
            members[name] = _Fallback(attribute)
    if loss_has_axis:
        members["forward"] = _with_loss_axis(fast_class.forward)
    return type(fast_class.__name__, (StandIn, fast_class, replaced_class), members)


class _Fallback:
    """A property of the replaced class, unless the fast module has an attribute of its name."""

    def __init__(self, replaced: property) -> None:
        self.replaced = replaced

    def __get__(self, instance: nn.Module | None, owner: type | None = None) -> Any:
        return self.replaced.__get__(instance, owner)


def _with_loss_axis(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        out = forward(*args, **kwargs)
        return (*out[:2], out[2].unsqueeze(0), *out[3:]) if len(out) > 2 else out

    return run


def become(old: nn.Module, new: nn.Module, *, loss_has_axis: bool = False) -> None:
    """Make ``old`` what ``new`` is, as the same object, so that every reference to it has the new module.

    Hooks stay, with their handles, and so do attributes of the old one whose names the new one does not use.
    loss_has_axis: return losses with a first dimension of 1.
    """
    before, now = old.__dict__, new.__dict__
    now["training"] = before["training"]
    for name, value in before.items():
        if name in ("_parameters", "_buffers", "_modules"):
            held = now["_parameters"] | now["_buffers"] | now["_modules"]
            for key, part in value.items():
                # parts in the old order, which is that of the parameters that optimizers and checkpoints count by
                if key not in held and key not in now and not hasattr(type(new), key):
                    now[name][key] = part
            order = {key: rank for rank, key in enumerate(value)}
            parts = sorted(now[name].items(), key=lambda item: order.get(item[0], len(order)))
            now[name] = dict(parts)
        elif name == "_non_persistent_buffers_set":
            now[name] = now[name] | {key for key in value if key in now["_buffers"] and key in before["_buffers"]}
        elif (name.startswith("_") and "hook" in name) or (name not in now and not hasattr(type(new), name)):
            now[name] = value
    object.__setattr__(old, "__dict__", now)
    old.__class__ = stand_in_class(type(new), type(old), loss_has_axis)
