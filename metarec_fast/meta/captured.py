"""The outer step on batches of a fixed size: the same work on the same memory each time, so one CUDA graph a step.

Launching the operators of a step one by one takes longer than running them on a GPU. A graph launches them at once, but
knows shapes and addresses alone: batches are padded to a fixed size and copied to where the graph reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_fast.config import MetaConfig
from metarec_fast.meta.step import GradientAverages, Loss, OuterStep, Parameters, Source, StreamContext, outer_step
from metarec_fast.sampling.batch import BatchShape, PackedBatch

_WARM_UPS = 3  # before a capture: kernels are compiled, libraries take their workspaces
_READ = ("items", "targets", "offsets", "negatives", "logq", "valid")  # of a batch, by a loss


def _tensors(batch: PackedBatch) -> dict[str, Tensor]:
    return {name: x for name in _READ if (x := getattr(batch, name)) is not None}


@dataclass(frozen=True)
class _Inputs:
    """What differs from step to step, besides the parameters."""

    batches: dict[str, list[PackedBatch]]
    target: PackedBatch
    averages: GradientAverages | None

    def tensors(self) -> list[Tensor]:
        found = [x for given in (*self.batches.values(), [self.target]) for b in given for x in _tensors(b).values()]
        if self.averages is not None:
            found += [
                part[name] for part in (self.averages.steps, self.averages.target_gradients) for name in self.batches
            ]
        return found

    def layout(self) -> list[object]:
        """All that a graph holds fast."""
        decay = None if self.averages is None else self.averages.decay
        return [decay, *((tuple(x.shape), x.dtype) for x in self.tensors())]

    def on(self, device: torch.device) -> _Inputs:
        """A copy of its own on ``device``."""

        def copied(batch: PackedBatch) -> PackedBatch:
            return replace(batch, **{name: x.to(device, copy=True) for name, x in _tensors(batch).items()})

        averages = self.averages
        if averages is not None:
            parts = ({n: part[n].clone() for n in self.batches} for part in (averages.steps, averages.target_gradients))
            averages = GradientAverages(averages.decay, *parts)
        return _Inputs(
            {name: list(map(copied, given)) for name, given in self.batches.items()},
            copied(self.target),
            averages,
        )


class FixedStep:
    """`outer_step` on batches that are padded to a fixed size, in memory of its own: what a graph can be made of.

    loss: as in `outer_step`, of `PackedBatch`es; it must leave out positions that are not ``valid``.
    shared: the shared parameters. sources: by name, the private ones of each source. target: those of the target.
        Each step reads them where they are: optimizers must change them in place.
    shapes: by name, what the batches of each source are padded to. target_shape: the same of the target.
    config: of the meta step.

    Raises ValueError without a shape for each source.
    """

    def __init__(
        self,
        loss: Loss,
        shared: Parameters,
        sources: Mapping[str, Parameters],
        target: Parameters,
        *,
        shapes: Mapping[str, BatchShape],
        target_shape: BatchShape,
        config: MetaConfig,
    ) -> None:
        missing = [name for name in sources if name not in shapes]
        if missing:
            raise ValueError(f"shapes must have one for each source, got none for {', '.join(missing)}")
        self.loss, self.shared, self.sources, self.target = loss, shared, dict(sources), target
        self.shapes, self.target_shape, self.config = dict(shapes), target_shape, config
        self.device = next(iter(shared.values())).device
        self._inputs: _Inputs  # where the graph reads
        self._replay: Callable[[], tuple[OuterStep, GradientAverages | None]] | None = None

    def __call__(
        self,
        batches: Mapping[str, Sequence[PackedBatch]],
        target_batch: PackedBatch,
        *,
        averages: GradientAverages | None = None,
    ) -> OuterStep:
        """One step. Its tensors may be overwritten by the next one.

        batches: by name, those of each source, on any device. target_batch, averages: as in `outer_step`.

        Raises ValueError for a batch that its shape cannot hold, where the inputs are not like those of the first step
        (whether averages and negatives are given, and how many batches), and what `outer_step` raises.
        """
        given = _Inputs(
            {name: [b.padded_to(self.shapes[name]) for b in batches[name]] for name in self.sources},
            target_batch.padded_to(self.target_shape),
            averages,
        )
        if averages is not None and any(name not in averages.steps for name in self.sources):
            # averages begin with what they are to average, which is a step of its own kind
            batches = {name: [b.to(self.device) for b in those] for name, those in given.batches.items()}
            return self._step(_Inputs(batches, given.target.to(self.device), averages))
        if self._replay is None:
            self._inputs = given.on(self.device)
            self._replay = self._record()
        elif given.layout() != self._inputs.layout():
            raise ValueError(
                "a step must have inputs like those of the first one (averages, negatives, number of batches), "
                f"got {given.layout()} after {self._inputs.layout()}"
            )
        else:
            for buffer, x in zip(self._inputs.tensors(), given.tensors(), strict=True):
                buffer.copy_(x, non_blocking=True)
        result, smoothed = self._replay()
        if averages is not None:
            for part, new in ((averages.steps, smoothed.steps), (averages.target_gradients, smoothed.target_gradients)):
                part.update({name: x.clone() for name, x in new.items()})
        return result

    def fits(self, batches: Mapping[str, Sequence[PackedBatch]], target_batch: PackedBatch) -> bool:
        """Whether the shapes have room for these batches."""
        fit = (self.shapes[name].fits(b) for name in self.sources for b in batches[name])
        return all(fit) and self.target_shape.fits(target_batch)

    def _stream(self) -> StreamContext:
        return lambda s: nullcontext()

    def _step(self, inputs: _Inputs) -> OuterStep:
        return outer_step(
            self.loss,
            self.shared,
            [Source(name, private, inputs.batches[name]) for name, private in self.sources.items()],
            self.target,
            inputs.target,
            config=self.config,
            averages=inputs.averages,
            stream=self._stream(),
        )

    def _run(self) -> tuple[OuterStep, GradientAverages | None]:
        """A step from the buffers, and what it makes of the averages there."""
        averages = self._inputs.averages
        if averages is not None:
            averages = GradientAverages(averages.decay, dict(averages.steps), dict(averages.target_gradients))
        return self._step(replace(self._inputs, averages=averages)), averages

    def _record(self) -> Callable[[], tuple[OuterStep, GradientAverages | None]]:
        return self._run


class CapturedStep(FixedStep):
    """`outer_step` as one CUDA graph, recorded at the first step and replayed at each: nothing waits for the device.

    parallel: each source on a stream of its own, so that small kernels of several sources run side by side.

    Other arguments as in `FixedStep`. Orders 1 and 2 and dropout (of torch's default generator) can be captured.
    Raises ValueError for parameters elsewhere than on a GPU.
    """

    def __init__(
        self,
        loss: Loss,
        shared: Parameters,
        sources: Mapping[str, Parameters],
        target: Parameters,
        *,
        shapes: Mapping[str, BatchShape],
        target_shape: BatchShape,
        config: MetaConfig,
        parallel: bool = False,
    ) -> None:
        super().__init__(loss, shared, sources, target, shapes=shapes, target_shape=target_shape, config=config)
        if self.device.type != "cuda":
            raise ValueError(f"a captured step (train.capture) needs parameters on a CUDA device, got {self.device}")
        self._streams = [torch.cuda.Stream(self.device) for _ in self.sources] if parallel else []

    def _stream(self) -> StreamContext:
        if not self._streams:
            return super()._stream()
        fork = torch.cuda.Event()

        @contextmanager
        def stream(s: int) -> Iterator[None]:
            main = torch.cuda.current_stream(self.device)
            if s == 0:
                main.record_event(fork)
            self._streams[s].wait_event(fork)
            with torch.cuda.stream(self._streams[s]):
                yield
            main.wait_stream(self._streams[s])

        return stream

    def _record(self) -> Callable[[], tuple[OuterStep, GradientAverages | None]]:
        with torch.cuda.device(self.device):
            return self._captured()

    def _captured(self) -> Callable[[], tuple[OuterStep, GradientAverages | None]]:
        drawn_from = torch.cuda.get_rng_state(self.device)
        main, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on copying batches to the device
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = self._run()
        torch.cuda.set_rng_state(drawn_from, self.device)  # the first replay draws what a first step would

        def replay() -> tuple[OuterStep, GradientAverages | None]:
            graph.replay()
            return outputs

        return replay
