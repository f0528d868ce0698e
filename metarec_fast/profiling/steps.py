"""Where the time of training steps goes, and how far it is from the least that their arithmetic and memory allow."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from metarec_fast.ops.peak import measured_peak
from metarec_fast.profiling.regions import PREFIX, recording, region

PARTS = ("data", "gather + VQ", "encoder", "scan", "loss", "optimizer", "other")
EXP_FLOPS = 16  # of an exponential by a polynomial of degree six and the scaling around it
ADAMW_BYTES = 28  # a parameter: reads itself, gradient and both averages, writes three of them

_BACKWARD = "autograd::engine::evaluate_function"


@dataclass
class Part:
    """Share of a stage's steps: milliseconds, and the work of their large operators."""

    forward_ms: float = 0.0
    backward_ms: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass
class StageProfile:
    """Mean of some steps of a stage. ``traced_ms``: of a step while it is traced, which takes longer than ``step_ms``.

    Times of parts are shares of the traced step, scaled to ``step_ms``; they sum to it.
    """

    run: str
    stage: str
    step_ms: float
    traced_ms: float
    threads: int
    peak_flops: float
    peak_bytes: float
    parts: dict[str, Part] = field(default_factory=dict)

    def roofline_ms(self, part: Part) -> float:
        """The least time: operations at the measured peak, or bytes at the measured bandwidth."""
        return 1e3 * max(part.flops / self.peak_flops, part.bytes / self.peak_bytes)

    @property
    def roofline_share(self) -> float:
        return sum(map(self.roofline_ms, self.parts.values())) / self.step_ms

    def as_dict(self) -> dict[str, Any]:
        parts = {n: asdict(p) | {"ms": p.ms, "roofline_ms": self.roofline_ms(p)} for n, p in self.parts.items()}
        return asdict(self) | {"parts": parts, "roofline_share": self.roofline_share}


def work(name: str, shapes: list[list[int]]) -> tuple[float, float]:
    """Floating-point operations and bytes of one call of a large operator, from the shapes of its inputs; else zeros.

    Operations: products 2 m n k; cross-entropy 2 T V D for the logits and again for each of its gradients, with an
    exponential for each logit; code search 2 N K d; scan 8 T W. Bytes: float32 inputs and outputs once.
    """
    tensors = [shape for shape in shapes if shape]
    read = sum(map(math.prod, tensors))
    kind = name.removeprefix("aten::").removeprefix("metarec_fast::")
    if kind in ("mm", "addmm", "bmm", "baddbmm") and len(tensors) >= 2:
        *batch, m, k = tensors[-2]
        n = tensors[-1][-1]
        return 2.0 * math.prod(batch) * m * n * k, 4.0 * (read + math.prod(batch) * m * n)
    if name == "mkldnn::_linear_pointwise":
        (*rows, k), (n, _) = tensors[:2]
        return 2.0 * math.prod(rows) * k * n, 4.0 * (read + math.prod(rows) * n)
    if not name.startswith("metarec_fast::"):
        return 0.0, 0.0
    if kind.startswith("linear_cross_entropy"):
        (T, D), (V, _) = [shape for shape in tensors if len(shape) == 2][:2]
        products = 7 if "double" in kind else 3 if "backward" in kind or "grad" in kind else 1
        written = T if products == 1 else T * D + V * D + V
        return T * V * (2.0 * D * products + EXP_FLOPS), 4.0 * (read + written)
    if kind.startswith("linear_scan"):
        u = next(shape for shape in tensors if len(shape) == 3)
        return 4.0 * math.prod(u), 4.0 * (read + math.prod(u))
    if kind.startswith(("vq_commit", "nearest_codeword")):
        x, codebook = tensors[:2]
        return 2.0 * math.prod(x) * codebook[-2], 4.0 * (read + math.prod(x))
    return 0.0, 0.0


def account(events: list[Any], root: Any) -> dict[str, Part]:
    """Every microsecond of ``root`` in the part that it belongs to.

    An operator belongs to the nearest range around it; a backward function to the part whose forward operator has its
    sequence number.
    """
    parts = {name: Part() for name in PARTS}
    homes: dict[int, tuple[str, bool]] = {id(root): ("other", False)}  # of events: part, in a backward pass
    made_in: dict[int, str] = {}  # part of the forward operator of a sequence number
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        if event is not root:
            if event.cpu_parent is None or id(event.cpu_parent) not in homes:
                continue  # of another thread
            part, backward = homes[id(event.cpu_parent)]
            if event.name.startswith(PREFIX):
                part = event.name.removeprefix(PREFIX)
            elif event.name.startswith(_BACKWARD):
                part, backward = made_in.get(event.sequence_nr, part), True
            elif event.name.startswith("metarec_fast::linear_scan"):
                part = "scan"
            elif event.name.startswith("Torch-Compiled Region"):
                part = "encoder"
            homes[id(event)] = part, backward
            if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD) and event.scope == 0:
                # the scan's own function is named by its class
                made_in[event.sequence_nr] = "scan" if event.name == "_LinearScan" else part
        part, backward = homes[id(event)]
        if backward:
            parts[part].backward_ms += event.self_cpu_time_total / 1e3
        else:
            parts[part].forward_ms += event.self_cpu_time_total / 1e3
        flops, size = work(event.name, event.input_shapes or [])
        parts[part].flops += flops
        parts[part].bytes += size
    return parts


@dataclass
class WatchedStep:
    """What the loop reports of a step. taken: not left out. moved: how many parameters its optimizer moved."""

    taken: bool = True
    moved: int = 0


class StepProfiler:
    """Profiles the steps after the first ``skip`` of each stage: ``steps`` by the clock, then as many traced.

    Steps that are left out for numbers that are not finite do not count. Nothing is changed while no step is traced.
    ``stages`` holds what was found.
    """

    def __init__(self, *, skip: int = 3, steps: int = 5) -> None:
        self.skip, self.steps = skip, steps
        self.run = ""
        self.stages: list[StageProfile] = []
        self._clock: dict[str, list[float]] = defaultdict(list)
        self._traced: dict[str, list[dict[str, Part]]] = defaultdict(list)

    def begin(self, run: str) -> None:
        """The steps that follow are of this run."""
        self.run = run
        self._clock.clear()
        self._traced.clear()

    @contextmanager
    def step(self, stage: str) -> Iterator[WatchedStep]:
        """A training step of a stage, within this context; watched if it is its turn."""
        clock, traced, watched = self._clock[stage], self._traced[stage], WatchedStep()
        if len(clock) < self.skip + self.steps:
            begin = time.perf_counter()
            yield watched
            if watched.taken:  # a step that is left out is shorter
                clock.append(time.perf_counter() - begin)
            return
        if len(traced) == self.steps:
            yield watched
            return
        tracer = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        with recording(), tracer, region("step"):
            yield watched
        if not watched.taken:
            return
        events = tracer.events()
        root = next(event for event in events if event.name == PREFIX + "step")
        parts = account(list(events), root)
        parts["optimizer"].bytes += ADAMW_BYTES * watched.moved
        traced.append(parts)
        if len(traced) == self.steps:
            self._finish(stage)

    def _finish(self, stage: str) -> None:
        traced = self._traced[stage]
        threads = torch.get_num_threads()
        peak = measured_peak(threads)
        traced_ms = sum(part.ms for parts in traced for part in parts.values()) / len(traced)
        step_ms = 1e3 * statistics.median(self._clock[stage][self.skip :])
        found = StageProfile(self.run, stage, step_ms, traced_ms, threads, *peak)
        for name in PARTS:
            of = [parts[name] for parts in traced]
            means = {key: statistics.mean(getattr(p, key) for p in of) for key in asdict(of[0])}
            for key in ("forward_ms", "backward_ms"):
                means[key] *= step_ms / traced_ms
            found.parts[name] = Part(**means)
        self.stages.append(found)
