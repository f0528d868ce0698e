"""Forward passes that gradient checkpointing repeats in backward, after the codes have moved on."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.utils import checkpoint

_MESSAGE = (
    "the codebook has moved since the forward pass that backward repeats here, so its gradients would be wrong: "
    "use torch.utils.checkpoint with use_reentrant=False, once around the quantizer and not compiled, or quantize "
    "outside of the checkpoint, or with freeze_codebook=True"
)


@dataclass
class _Call:
    """State before the first pass of one call, from which the call can be repeated.

    states: tensors and host state of each codebook before the call. sums: results of reductions over ranks.
    """

    random: list[Tensor]
    states: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    repeats: bool = False
    next_sum: int = 0


class _Frame:
    """The calls of one checkpointed region, by module in their order."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, list[_Call]] = {}
        self.pass_: weakref.ref[Callable] | None = None  # the hook of the repetition that is going on
        self.repeated: dict[nn.Module, int] = {}


class _Local(threading.local):
    call: _Call | None = None


_local = _Local()
_frames: weakref.WeakKeyDictionary[Any, _Frame] = weakref.WeakKeyDictionary()


def repeatable(forward: Callable) -> Callable:
    """Let ``forward`` of a module with codebooks be repeated by a non-reentrant checkpoint with the codes of its
    first pass, and without moving anything a second time."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _local.call is not None:
            return forward(self, *args, **kwargs)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        region = None if hooks is None else _region(hooks[0])
        if region is None:
            return forward(self, *args, **kwargs)
        device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), torch.device("cpu"))
        frame = _frames.setdefault(region, _Frame())
        if not in_backward():
            _check_can_be_repeated(self)
            call = _Call(_random_state(device))
            frame.calls.setdefault(self, []).append(call)
            with _current(call):
                for part in self.modules():  # a call that moves nothing too: others may, before backward repeats it
                    if getattr(part, "moves_in_place", False):
                        before_moving(part)
                return forward(self, *args, **kwargs)
        if frame.pass_ is None or frame.pass_() is not hooks[0]:
            frame.pass_, frame.repeated = weakref.ref(hooks[0]), {}
        number = frame.repeated.get(self, 0)
        frame.repeated[self] = number + 1
        calls = frame.calls.get(self, [])
        if number >= len(calls):  # a region within a region: its first pass was another's
            return forward(self, *args, **kwargs)
        first = calls[number]
        call = _Call(first.random, first.states, first.sums, repeats=True)
        with _current(call), _as_it_was(first), _same_randomness(first.random, device):
            return forward(self, *args, **kwargs)

    return run


def in_backward() -> bool:
    """Whether the autograd engine runs here."""
    return torch._C._current_graph_task_id() != -1


def check_may_move() -> None:
    """Raise RuntimeError in backward: a forward pass that moves codes is being repeated, with the wrong codes."""
    if in_backward() and (_local.call is None or not _local.call.repeats):
        raise RuntimeError(_MESSAGE)


def check_not_compiled_in_checkpoint() -> None:
    """Raise RuntimeError where a compiler traces a checkpointed region: it repeats the lookup in its own backward."""
    if traceback.has_preserved_node_meta() and "ac_graph_id" in traceback.get_current_meta():
        raise RuntimeError(_MESSAGE.replace("backward repeats here", "a compiled backward would repeat"))


def before_moving(codebook: nn.Module) -> None:
    """Keep what a repetition needs of ``codebook``; to be called before anything moves it.

    Raises RuntimeError in backward, unless this is a repetition that has the codes of its first pass.
    """
    check_may_move()
    call = _local.call
    if call is not None and not call.repeats and codebook not in call.states:
        call.states[codebook] = _copied(codebook)


def summed(x: Tensor, reduce: Callable[[Tensor], Any]) -> Tensor:
    """``reduce(x)``, which is in place; in a repetition the first pass's result, as other ranks may not repeat now."""
    call = _local.call
    if call is not None and call.repeats:
        x.copy_(call.sums[call.next_sum])
        call.next_sum += 1
        return x
    reduce(x)
    if call is not None:
        call.sums.append(x.clone())
    return x


def _check_can_be_repeated(module: nn.Module) -> None:
    if module.training and any(getattr(m, "in_place_codebook_optimizer", None) is not None for m in module.modules()):
        raise RuntimeError(
            "in_place_codebook_optimizer runs a backward pass of its own, which torch.utils.checkpoint cannot repeat: "
            "quantize outside of the checkpoint"
        )


@contextmanager
def _current(call: _Call) -> Iterator[None]:
    _local.call = call
    try:
        yield
    finally:
        _local.call = None


def _region(hook: Callable) -> Any:
    """The checkpointed region that a saved-tensor hook belongs to, or None."""
    frame_type = getattr(checkpoint, "_CheckpointFrame", ())
    inner = getattr(hook, "_torchdynamo_orig_callable", hook)  # the hook of a repetition is kept from the compiler
    for cell in getattr(inner, "__closure__", None) or ():
        value = cell.cell_contents
        value = value() if isinstance(value, weakref.ref) else value
        if isinstance(value, frame_type):
            return value
    return None


def _copied(codebook: nn.Module) -> dict[str, Any]:
    """Copies of the tensors of a codebook and of its health, and its host state."""
    copies: dict[str, Any] = {"host_state": codebook.host_state()}
    for part in (codebook, codebook.health):
        tensors = {**part._buffers, **part._parameters}
        copies[part._get_name()] = {name: _clone(value) for name, value in tensors.items()}
    return copies


def _clone(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    copy = value.detach().clone().requires_grad_(value.requires_grad)
    copy.grad = value.grad
    return copy


@contextmanager
def _as_it_was(first: _Call) -> Iterator[None]:
    """Restore the codebooks to their state before the first pass, and undo afterwards what the repetition changed."""
    now = []
    for codebook, state in first.states.items():
        now.append((codebook, codebook.host_state()))
        codebook.set_host_state(state["host_state"])
        for part in (codebook, codebook.health):
            for registry in (part._buffers, part._parameters):
                now.append((registry, dict(registry)))
                for name in registry:
                    registry[name] = _clone(state[part._get_name()][name])
    try:
        yield
    finally:
        for where, what in now:
            where.set_host_state(what) if isinstance(where, nn.Module) else where.update(what)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def _same_randomness(first: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw what the first pass drew. Generators then go on as that pass left them if the checkpoint has brought them
    back to where it began (preserve_rng_state), and else from where they are."""
    now = _random_state(device)
    if all(map(torch.equal, now, first)):
        yield
        return
    _set_random_state(first, device)
    try:
        yield
    finally:
        _set_random_state(now, device)
