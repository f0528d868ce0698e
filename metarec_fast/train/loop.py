"""The training loop, of every objective: stages, validation and patience, steps left out, the trace, checkpoints.

What a step and a validation are is up to the objective: ``train.encoder`` and ``train.cooccurrence`` are the two. A run
is a function of its step number: whatever an objective draws is a function of (seed, stage, step), so that a run that
was stopped goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from metarec_fast.config import Config
from metarec_fast.data.domain import Split
from metarec_fast.files import COUNT, FINITE, LIST, OBJECT, TEXT, Damaged, Field, check_fields
from metarec_fast.meta.signals import NoiseFloor, StepMetrics, keep_trace
from metarec_fast.meta.step import GradientAverages
from metarec_fast.profiling.steps import StepProfiler
from metarec_fast.train import checkpoint
from metarec_fast.train.left_out import LeftOut, reason
from metarec_fast.train.run_folder import check_data, data_of, other_data, other_options
from metarec_fast.train.stop import Interrupted


class Reporter(Protocol):
    """Told about everything as it happens; see report.console for the one that people watch."""

    def begin(self, title: str) -> None: ...

    def step(self, stage: str, step: int, total: int, metrics: StepMetrics) -> None: ...

    def evaluation(self, stage: str, step: int, metric: str, value: float, best: float) -> None: ...


class Silent:
    def begin(self, title: str) -> None:
        pass

    def step(self, stage: str, step: int, total: int, metrics: StepMetrics) -> None:
        pass

    def evaluation(self, stage: str, step: int, metric: str, value: float, best: float) -> None:
        pass


@dataclass(frozen=True)
class Stage:
    """Steps of one kind.

    lr: learning rate of the first step. linear_decay: from there to nearly 0 at the last step.
    title: what people read of it, by default its name. evaluate_every: steps between validations, the first of them
    before any step; None: none. evaluate_first: False where the first figure is known from the stage before.
    evaluate_last: validate after the last step. patience: validations without a better one that end the stage.
    from_best: what comes after starts from the best parameters so far. moves: its steps move parameters, and are
    reported.
    """

    name: str
    steps: int
    lr: float = 0.0
    linear_decay: bool = False
    title: str = ""
    evaluate_every: int | None = None
    evaluate_first: bool = True
    evaluate_last: bool = True
    patience: float = math.inf
    from_best: bool = False
    moves: bool = True

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * (1 - (step - 1) / (self.steps + 20)) if self.linear_decay and step else self.lr


@dataclass
class Progress:
    """Where a run stands; everything here and the tensors together make a checkpoint."""

    stage: int = 0
    step: int = 0  # within the stage
    best: float | None = None  # on validation, of evaluations with a finite figure
    best_at: str = ""
    waited: int = 0  # evaluations of the stage since the best
    evaluations: list[tuple[str, int, float]] = field(default_factory=list)  # stage, step and figure
    left_out: LeftOut = field(default_factory=LeftOut)  # steps, for numbers that are not finite
    trace: list[StepMetrics] = field(default_factory=list)  # an entry every TRACE_EVERY meta steps
    untraced: list[StepMetrics] = field(default_factory=list)  # noise and descents of the steps since

    @property
    def skipped(self) -> int:
        """Steps left out, of all stages."""
        return sum(self.left_out.by_stage.values())

    def left_out_steps(self) -> dict[str, Any]:
        """Fields of ``history.LeftOutSteps``."""
        by_stage, not_run = dict(self.left_out.by_stage), list(self.left_out.not_run)
        return {"skipped_steps": self.skipped, "skipped_by_stage": by_stage, "stages_not_run": not_run}


PROGRESS_FIELDS = {
    **dict.fromkeys(("stage", "step", "waited"), COUNT),
    "best": Field("a finite number or null", lambda v: v is None or FINITE.fits(v)),
    "best_at": TEXT,
    "evaluations": Field("a list of stage, step and figure", lambda v: LIST.fits(v) and all(map(_is_evaluation, v))),
    "left_out": OBJECT,
    **dict.fromkeys(("trace", "untraced"), LIST),
}
LEFT_OUT_FIELDS = {
    "by_stage": Field("counts by stage", lambda v: OBJECT.fits(v) and all(map(COUNT.fits, v.values()))),
    "in_a_row": COUNT,
    "not_run": Field("a list of strings", lambda v: LIST.fits(v) and all(map(TEXT.fits, v))),
}
IDENTITY_FIELDS = {
    "data": OBJECT,
    "config": OBJECT,
    "origin": Field("a string or null", lambda v: v is None or isinstance(v, str)),
}


def _is_evaluation(value: Any) -> bool:
    return (
        LIST.fits(value)
        and len(value) == 3
        and TEXT.fits(value[0])
        and COUNT.fits(value[1])
        and type(value[2]) in (int, float)
    )


class Trainer(ABC):
    """Trains for a target's split with the help of sources' splits; what is trained, and how, is a subclass's.

    A subclass makes its ``stages`` and calls ``begin_stage`` of the first at the end of its ``__init__``.
    """

    metric: ClassVar[str]  # that validation figures are of
    higher_is_better: ClassVar[bool]
    device = "cpu"

    def __init__(
        self,
        sources: dict[str, Split],
        target: Split,
        config: Config,
        *,
        save_every: int,
        folder: Path | None = None,
        origin: str | None = None,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        profiler: StepProfiler | None = None,
    ) -> None:
        """folder: for checkpoints, one every ``save_every`` steps of a stage and where the run is stopped.

        origin: what tells apart where the first parameters come from, if not from ``config``.
        """
        self.sources, self.target, self.config = sources, target, config
        self.save_every, self.folder, self.origin = save_every, folder, origin
        self.reporter, self.should_stop, self.profiler = reporter or Silent(), should_stop, profiler
        self.stages: list[Stage] = []
        self.progress = Progress()
        self.averages = GradientAverages(config.meta.similarity_decay)
        self.noise = NoiseFloor()
        self.best_state: dict[str, Tensor] = {}

    # the objective

    @abstractmethod
    def begin_stage(self, stage: Stage) -> None:
        """Make optimizers and whatever else is a stage's own, before its first step or before ``load_tensors``."""

    @abstractmethod
    def gradients(self, stage: str, step: int) -> StepMetrics:
        """Leave the gradients of a step in place; "losses" by name, and those of ``meta.signals`` of a meta step."""

    @abstractmethod
    def update(self, stage: str, losses: dict[str, float]) -> bool:
        """Step by the gradients; False, and nothing changed, if a loss or gradient is not finite."""

    @abstractmethod
    def validate(self) -> float:
        """The figure of the present parameters on the target's validation cases."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """A copy of what is returned if it is the best."""

    @abstractmethod
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""

    @abstractmethod
    def named_tensors(self) -> dict[str, Tensor | None]:
        """Parameters and gradients by names that people know."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All of the run that a checkpoint needs beside ``best_state``, the averages and the progress."""

    @abstractmethod
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``tensors``, after ``begin_stage``. Raises RuntimeError for tensors of another shape."""

    def end_stage(self, stage: Stage) -> None:  # noqa: B027
        """After the last step and validation of a stage."""

    def close(self) -> None:  # noqa: B027
        """Whatever runs beside the loop ends."""

    @property
    def finished(self) -> bool:
        return self.progress.stage >= len(self.stages)

    # the loop

    def train_step(self, stage: str, step: int) -> StepMetrics:
        """One optimizer step; left out, and counted, if a loss or gradient is not finite.

        Raises NonFiniteTrainingError with the reason when this happens IN_A_ROW times one after the other.
        """
        averages, noise = self.averages.copy(), self.noise.copy()
        metrics = self.gradients(stage, step)
        metrics["losses"] = {name: float(value) for name, value in metrics["losses"].items()}
        if self.update(stage, metrics["losses"]):
            self.progress.left_out.took()
        else:
            self.averages, self.noise = averages, noise  # one bad step would stay in them for ever
            why = reason(metrics["losses"], self.named_tensors())
            metrics["skipped"] = self.progress.left_out.add(self._title(stage), step, why)
        return metrics

    def _title(self, stage: str) -> str:
        return next((one.title for one in self.stages if one.name == stage), stage)

    def _profiled_step(self, stage: Stage, step: int) -> StepMetrics:
        if self.profiler is None:
            return self.train_step(stage.name, step)
        with self.profiler.step(stage.title) as watched:
            metrics = self.train_step(stage.name, step)
            watched.taken = "skipped" not in metrics
            watched.moved = self.moved()
        return metrics

    def moved(self) -> int:
        """Parameters that the last step moved, for the profile."""
        return 0

    def keep_if_better(self, stage: Stage) -> None:
        value = self.validate()
        p = self.progress
        p.evaluations.append((stage.name, p.step, value))
        better = p.best is None or (value > p.best if self.higher_is_better else value < p.best)
        if math.isfinite(value) and better:
            p.best, p.best_at, p.waited = value, f"{stage.name} {p.step}", 0
            self.best_state = self.state()
        else:
            p.waited += 1
        self.reporter.evaluation(stage.title, p.step, self.metric, value, value if p.best is None else p.best)

    def run(self) -> Progress:
        """Train to the end (or go on from a restored state) and leave the best parameters by validation in place.

        Raises Interrupted after saving if ``should_stop`` says so, and NonFiniteTrainingError, which names what is not
        finite, if there is no finite validation figure or IN_A_ROW steps one after the other were left out.
        """
        try:
            while not self.finished:
                self._run_stage(self.stages[self.progress.stage])
        finally:
            self.close()
        self.load_state(self.best_state)
        return self.progress

    def _run_stage(self, stage: Stage) -> None:
        p = self.progress
        while p.step < stage.steps:
            if self.should_stop():
                self.save()
                raise Interrupted(f"stopped in {stage.title} at step {p.step} of {stage.steps}")
            every = stage.evaluate_every
            if every is not None and p.step % every == 0 and (p.step or stage.evaluate_first):
                self.keep_if_better(stage)
                if p.waited >= stage.patience:
                    break
            metrics = self._profiled_step(stage, p.step)
            p.step += 1
            if "weights" in metrics and "skipped" not in metrics:
                keep_trace(p.step, metrics, trace=p.trace, untraced=p.untraced)
            if stage.moves:
                self.reporter.step(stage.title, p.step, stage.steps, metrics)
            if self.folder is not None and p.step % self.save_every == 0:
                self.save()
        else:
            if stage.evaluate_last:
                self.keep_if_better(stage)
        self.end_stage(stage)
        p.left_out.end(stage.title, p.step)
        if stage.from_best:
            self.load_state(self.best_state)
        p.stage, p.step = p.stage + 1, 0
        if not self.finished:
            p.waited = 0
            self.begin_stage(self.stages[p.stage])

    # checkpoints

    def save(self) -> None:
        """Write the whole state of the run, if it has a folder."""
        if self.folder is None:
            return
        tensors = {
            **_prefixed("best", self.best_state),
            **_prefixed("steps", self.averages.steps),
            **_prefixed("target_gradients", self.averages.target_gradients),
            **_prefixed("noise", self.noise.target_gradients),
            **self.tensors(),
        }
        manifest = {**dataclasses.asdict(self.progress), **self._identity()}
        done = sum(s.steps for s in self.stages[: self.progress.stage]) + self.progress.step
        checkpoint.save(self.folder, tensors, manifest, step=done)

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made from for this run to go on with it."""
        domains = [split.domain for split in self.sources.values()]
        data = data_of(domains, self.target.domain, self.config)
        return {"data": data, "config": dataclasses.asdict(self.config), "origin": self.origin}

    def _check_identity(self, manifest: dict[str, Any]) -> None:
        own, where = self._identity(), f"checkpoint in {self.folder}"
        advice = "use another run folder, or start again with --overwrite (overwrite=True)"
        if other := other_data(own["data"], manifest["data"]):
            raise ValueError(f"{where} belongs to other domains: {other}; {advice}")
        if other := other_options(self.config, manifest["config"]):
            raise ValueError(f"{where} belongs to another configuration: {other}; {advice}")
        if own["origin"] != manifest["origin"]:
            raise ValueError(f"{where} belongs to another start: the model that is adapted was another one; {advice}")

    def restore(self) -> bool:
        """Take up the run saved in the folder; False if there is none.

        Raises ValueError if it is damaged, or belongs to another configuration or other data, and says which.
        """
        loaded = checkpoint.load(self.folder) if self.folder is not None else None
        if loaded is None:
            return False
        tensors, manifest = loaded
        try:
            check_fields(manifest, PROGRESS_FIELDS | IDENTITY_FIELDS, checkpoint.MANIFEST)
            check_data(manifest["data"], f"{checkpoint.MANIFEST}: 'data'")
            self._check_identity(manifest)
            for name in IDENTITY_FIELDS:
                manifest.pop(name)
            check_fields(manifest["left_out"], LEFT_OUT_FIELDS, f"{checkpoint.MANIFEST}: 'left_out'")
            evaluations = [tuple(one) for one in manifest["evaluations"]]
            left_out = LeftOut(**manifest["left_out"])
            progress = Progress(**manifest | {"evaluations": evaluations, "left_out": left_out})
            self._check_progress(progress)
        except Damaged as error:
            raise ValueError(f"checkpoint in {self.folder} is damaged: {error}") from error
        self.progress = progress
        self.best_state = picked("best", tensors)
        self.averages.steps, self.averages.target_gradients, self.noise.target_gradients = (
            {name: value.to(self.device) for name, value in picked(prefix, tensors).items()}
            for prefix in ("steps", "target_gradients", "noise")
        )
        if not self.finished:
            self.begin_stage(self.stages[progress.stage])
        try:
            self.load_tensors(tensors)
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint in {self.folder} belongs to other domains, of another shape: {error}"
            ) from error
        return True

    def _check_progress(self, progress: Progress) -> None:
        done = progress.stage == len(self.stages) and not progress.step
        if not done and not (progress.stage < len(self.stages) and progress.step <= self.stages[progress.stage].steps):
            raise Damaged(f"{checkpoint.MANIFEST}: no stage {progress.stage} of the run has a step {progress.step}")


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def picked(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with ``prefix`` and a point, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): v for name, v in tensors.items() if name.startswith(f"{prefix}.")}
