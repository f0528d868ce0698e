"""The training run: warm-up on the sources, meta-transfer, fine-tuning on the target.

A run is a function of its step number: batches are functions of (seed, step) and dropout is seeded by the step, so
that a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarec_fast.config import Config
from metarec_fast.data.domain import Split
from metarec_fast.evaluation import choice_catalogue, evaluate
from metarec_fast.files import COUNT, FINITE, LIST, OBJECT, TEXT, Damaged, Field, check_fields
from metarec_fast.meta.captured import CapturedStep
from metarec_fast.meta.signals import NoiseFloor, keep_trace, signals
from metarec_fast.meta.step import GradientAverages, OuterStep, Source, outer_step
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer
from metarec_fast.profiling.steps import StepProfiler
from metarec_fast.sampling.batch import BatchShape, PackedBatch
from metarec_fast.sampling.prefetch import Prefetch
from metarec_fast.sampling.sampler import Sampler, draw
from metarec_fast.train import checkpoint
from metarec_fast.train.left_out import LeftOut, NonFiniteTrainingError, not_finite, reason
from metarec_fast.train.optimizer import TableAdamW
from metarec_fast.train.run_folder import check_data, data_of, other_data, other_options
from metarec_fast.train.table_rows import ROWS, TableRows, all_rows, named_rows

# Tables from this many items on pay for the rows that a step touches, where its loss does not touch all. A step of
# 1,000 to 3,000 rows of 57,000 (64 wide, float32) so costs 1.4 to 2.7 times less than dense AdamW, of 12,000 up to
# 1.4 times more.
LARGE_TABLE = 50_000
TABLE = "finetune table"  # the stage that moves the target's item table and nothing else
FINETUNING = (TABLE, "finetune")
SHOWN = 16  # batches by which a captured step's size is chosen


class Reporter(Protocol):
    """Told about everything as it happens; see report.console for the one that people watch."""

    def begin(self, title: str) -> None: ...

    def step(self, stage: str, step: int, total: int, metrics: dict[str, Any]) -> None: ...

    def evaluation(self, stage: str, step: int, ndcg: float, best: float) -> None: ...


class Silent:
    def begin(self, title: str) -> None:
        pass

    def step(self, stage: str, step: int, total: int, metrics: dict[str, Any]) -> None:
        pass

    def evaluation(self, stage: str, step: int, ndcg: float, best: float) -> None:
        pass


class Interrupted(Exception):
    """The run was to stop; everything up to here is saved."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int

    @property
    def validated(self) -> bool:
        """Whether its models are compared on validation, and training stops when they get no better."""
        return self.name in (*FINETUNING, "joint")


def stages(config: Config, users: int) -> list[Stage]:
    """The stages of a method, for a target with so many users to train on.

    All methods may take the same number of optimizer steps in all.
    """
    t = config.train
    steps = max(t.finetune_steps, math.ceil(t.finetune_passes * users / t.batch_size))
    if t.method == "target_only":
        return [Stage("finetune", t.warmup_steps + t.meta_steps + steps)]
    if t.method == "joint":
        return [Stage("joint", t.warmup_steps + t.meta_steps + steps)]
    half = steps // 2
    finetuning = {
        "all": [Stage("finetune", steps)],
        "table": [Stage(TABLE, steps)],
        "gradual": [Stage(TABLE, half), Stage("finetune", steps - half)],
    }[t.finetune_scope]
    if t.method == "pretrain":
        return [Stage("pretrain", t.warmup_steps + t.meta_steps), *finetuning]
    return [Stage("warmup", t.warmup_steps), Stage("meta", t.meta_steps), *finetuning]


def decayed_and_free(parameters: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def clip_and_step(
    parameters: Iterable[Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    losses: Iterable[float],
    *,
    clip: float,
) -> bool:
    """Clip the gradients of ``parameters`` to norm ``clip`` and step.

    No step, and False, if a loss or any gradient is not finite, also of parameters that are moved and not clipped.
    """
    parameters, optimizers = list(parameters), list(optimizers)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    clipped = {id(p) for p in parameters}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and id(p) not in clipped:
                values = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                norm = norm + 0 * torch.linalg.vector_norm(values)
    if not all(map(math.isfinite, [float(norm), *losses])):
        return False
    for optimizer in optimizers:
        optimizer.step()
    return True


def dropout_seed(seed: int, stage: int, step: int) -> int:
    """Below 2**64, for torch: dropout is a function of where the run stands. seed: below 2**63. step: below 2**32."""
    if seed < 2**24:
        return (seed << 40) + (stage << 32) + step
    return int(np.random.SeedSequence((seed, stage, step)).generate_state(1, np.uint64)[0])


@dataclass
class Progress:
    """Where a run stands; everything here and the tensors together make a checkpoint."""

    stage: int = 0
    step: int = 0  # within the stage
    best: float = -1.0  # validation NDCG@10
    best_at: str = ""
    waited: int = 0  # evaluations since the best
    left_out: LeftOut = field(default_factory=LeftOut)  # steps, for numbers that are not finite
    trace: list[dict[str, Any]] = field(default_factory=list)  # an entry every TRACE_EVERY meta steps
    untraced: list[dict[str, Any]] = field(default_factory=list)  # noise and descents of the steps since

    @property
    def skipped(self) -> int:
        """Steps left out, of all stages."""
        return sum(self.left_out.by_stage.values())


_KINDS = {"int": COUNT, "float": FINITE, "str": TEXT}
PROGRESS_FIELDS = {f.name: _KINDS.get(f.type, LIST) for f in dataclasses.fields(Progress)} | {"left_out": OBJECT}
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


class Trainer:
    """Trains ``model`` on a target's split with the help of sources' splits."""

    def __init__(
        self,
        model: Recommender,
        sources: dict[str, Split],
        target: Split,
        config: Config,
        *,
        folder: Path | None = None,
        origin: str | None = None,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        profiler: StepProfiler | None = None,
    ) -> None:
        """origin: what tells apart where ``model``'s parameters come from, if not from ``config``."""
        self.profiler, self.origin = profiler, origin
        self.model, self.sources, self.target, self.config = model, sources, target, config
        self.folder, self.reporter, self.should_stop = folder, reporter or Silent(), should_stop
        self.catalogue = choice_catalogue(target, config.data.catalogue)
        self.progress = Progress()
        self.averages = GradientAverages(config.meta.similarity_decay)
        self.noise = NoiseFloor()
        self.best_state: dict[str, Tensor] = {}
        self.stages = stages(config, int((target.train.lengths > 0).sum()))
        self._samplers: dict[tuple[str, str], Sampler] = {}
        self._prefetch: tuple[str, Prefetch] | None = None  # of one stage
        self._start_optimizers()
        self._captured: CapturedStep | None = None
        if config.train.capture and any(stage.name == "meta" for stage in self.stages):
            self._captured = self._capture()

    # what a step is made of

    def schedule(self, stage: str, step: int) -> list[tuple[str, int]]:
        """The domains of a step's batches, and which of its own batches in this stage each is."""
        sources, target = list(self.sources), self.target.domain.name
        if stage == "meta":
            m = self.config.meta
            count = 1 if m.same_batch else m.inner_steps
            return [(name, step * count + k) for name in sources for k in range(count)] + [(target, step)]
        if stage == "finetune":  # goes on where the table's own steps ended
            step += sum(s.steps for s in self.stages if s.name == TABLE)
        shown = {"pretrain": sources, "warmup": sources, "joint": [*sources, target]}.get(stage, [target])
        return [(name, step) for name in shown]

    def batches(self, stage: str, step: int) -> list[tuple[str, PackedBatch]]:
        """A step's batches: a pure function of its arguments and the seed."""
        names, steps = zip(*self.schedule(stage, step), strict=True)
        drawn = draw([self._sampler(name, stage) for name in names], steps, device=self.config.train.device)
        return list(zip(names, drawn, strict=True))

    def _sampler(self, domain: str, stage: str) -> Sampler:
        t = self.config.train
        if (domain, stage) not in self._samplers:
            split = self.target if domain == self.target.domain.name else self.sources[domain]
            self._samplers[domain, stage] = Sampler(
                split.train,
                batch_size=t.batch_size,
                max_length=self.config.model.max_length,
                window=t.window,
                seed=t.seed,
                stream=2 * self.model.domains.index(domain) + (stage in FINETUNING),
                shared_negatives=t.negatives if t.loss == "sampled" else 0,
                distribution=t.negative_distribution,
            )
        return self._samplers[domain, stage]

    def _ready(self, stage: str, step: int) -> list[tuple[str, PackedBatch]]:
        """``batches``, made while the step before ran."""
        if self._prefetch is None or self._prefetch[0] != stage:
            self._stop_prefetch()
            for name, _ in self.schedule(stage, step):  # made here, so that their errors are raised as they are
                self._sampler(name, stage)
            batches = weakref.WeakMethod(self.batches)  # a trainer that is dropped ends its thread
            self._prefetch = stage, Prefetch(lambda step: batches()(stage, step), start=step)
        return self._prefetch[1].get(step)

    def _stop_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch[1].close()
            self._prefetch = None

    def _capture(self) -> CapturedStep:
        """The meta step as one graph; see `_room` for which steps it can take."""
        private, name = self.model.private_parameters, self.target.domain.name
        return CapturedStep(
            self.model.loss,
            self.model.shared_parameters(),
            {s: private(s) for s in self.sources},
            private(name),
            shapes={s: self._room(s) for s in self.sources},
            target_shape=self._room(name),
            config=self.config.meta,
        )

    def _room(self, domain: str) -> BatchShape:
        """An eighth more positions than some batches have: a step with a larger one is rare, and not captured."""
        sampler = self._sampler(domain, "meta")
        most = max(len(sampler.batch(k).items) for k in range(SHOWN))
        return BatchShape(self.config.train.batch_size, most + most // 8 + 1, self.config.model.max_length)

    def _start_optimizers(self) -> None:
        """Of a stage: one for what every step moves, one for tables of which a step touches few rows."""
        t, stage = self.config.train, self.stages[self.progress.stage].name
        by_rows = t.loss == "sampled" and t.device == "cpu"
        self._large = {
            name for name in self.model.domains if by_rows and len(self.model.table(name).weight) >= LARGE_TABLE
        }
        rows = [self.model.private_parameters(name)[key] for name in sorted(self._large) for key in ROWS]
        taken = {id(p) for p in rows}
        # the others get gradients in the table's stage too: they tell whether a step is finite, and compiled code stays
        moved = self.model.table(self.target.domain.name) if stage == TABLE else self.model
        rest = [p for p in moved.parameters() if id(p) not in taken]
        lr = t.finetune_lr if stage in FINETUNING else t.lr
        self.optimizer = torch.optim.AdamW(decayed_and_free(rest, t.weight_decay), lr=lr, fused=True)
        self.table_optimizer = TableAdamW(decayed_and_free(rows, t.weight_decay), lr=lr) if rows else None

    def _rows(self, name: str, batches: list[PackedBatch]) -> TableRows:
        """What a domain brings to a step: its private parameters, or of a large table the rows that are named."""
        parameters = self.model.private_parameters(name)
        if name not in self._large:
            return all_rows(parameters, batches)
        return named_rows(parameters, batches, before_reading=self.table_optimizer.catch_up)

    def _joint(self, batches: list[tuple[str, PackedBatch]]) -> dict[str, Any]:
        """Gradients of the mean loss of several domains."""
        losses = {}
        for name, batch in batches:
            rows = self._rows(name, [batch])
            value = self.model.loss(self.model.shared_parameters(), rows.private, rows.batches[0])
            (value / len(batches)).backward()
            rows.take_gradients({key: p.grad for key, p in rows.private.items()})
            losses[name] = value.detach()
        return {"losses": losses}

    def _meta(self, batches: list[tuple[str, PackedBatch]]) -> dict[str, Any]:
        """Gradients of one meta step; the last batch is the target's."""
        m = self.config.meta
        name = self.target.domain.name
        rows = {s: self._rows(s, [batch for of, batch in batches[:-1] if of == s]) for s in self.sources}
        rows[name] = self._rows(name, [batches[-1][1]])
        before = self.averages.copy()
        given, target_batch = {s: rows[s].batches for s in self.sources}, rows[name].batches[0]
        result: OuterStep
        if self._captured is not None and self._captured.fits(given, target_batch):
            result = self._captured(given, target_batch, averages=self.averages)
        else:
            sources = [Source(s, rows[s].private, rows[s].batches) for s in self.sources]
            shared, private = self.model.shared_parameters(), rows[name].private
            result = outer_step(
                self.model.loss, shared, sources, private, target_batch, config=m, averages=self.averages
            )
        for key, parameter in self.model.shared_parameters().items():
            parameter.grad = result.shared_grad[key]
        for domain, grads in (result.source_grads | {name: result.target_grad}).items():
            rows[domain].take_gradients(grads)
        losses = dict(zip(self.sources, result.source_losses, strict=True))
        return {
            "losses": {**losses, name: result.target_losses.mean()},
            **signals(result, self.noise, before=before, config=m),
        }

    def train_step(self, stage: str, step: int) -> dict[str, Any]:
        """One optimizer step; left out, and counted, if a loss or gradient is not finite.

        Raises NonFiniteTrainingError with the reason when this happens IN_A_ROW times one after the other.
        """
        torch.manual_seed(dropout_seed(self.config.train.seed, self.progress.stage, step))
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        averages, noise = self.averages.copy(), self.noise.copy()
        batches = self._ready(stage, step)
        metrics = self._meta(batches) if stage == "meta" else self._joint(batches)
        metrics["losses"] = {name: float(value) for name, value in metrics["losses"].items()}
        if self._update(metrics["losses"]):
            self.progress.left_out.took()
        else:
            self.averages, self.noise = averages, noise  # one bad step would stay in them for ever
            metrics["skipped"] = self.progress.left_out.add(stage, step, reason(metrics["losses"], self._tensors()))
        metrics["data_wait_share"] = round(self._prefetch[1].wait_share, 5)
        return metrics

    def _tensors(self) -> dict[str, Tensor | None]:
        """Parameters and gradients by names that people know: of a domain's table, or of what all domains share."""
        named = {f"the shared {name}": p for name, p in self.model.shared_parameters().items()}
        for domain in self.model.domains:
            named |= {f"{domain}'s table {name}": p for name, p in self.model.private_parameters(domain).items()}
        return named | {f"the gradient of {name}": p.grad for name, p in named.items()}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.optimizer, self.table_optimizer) if o is not None]

    def _update(self, losses: dict[str, float]) -> bool:
        clip = self.config.train.clip
        return clip_and_step(self.model.shared.parameters(), self._optimizers(), losses.values(), clip=clip)

    def _flush_tables(self) -> None:
        if self.table_optimizer is not None:
            self.table_optimizer.flush()

    # the run

    @torch.no_grad()
    def validate(self) -> float:
        """NDCG@10 on the target's validation cases."""
        self._flush_tables()
        self.model.eval()
        scorer = ModelScorer(self.model, self.target.domain.name)
        try:
            metrics = evaluate(
                scorer,
                self.target.valid,
                mask_history=self.config.data.mask_history,
                protocol=self.target.protocol,
                catalogue=self.catalogue,
            )
        except ValueError as error:
            broken = "; ".join(not_finite(self._tensors()))
            if not broken:
                raise
            raise NonFiniteTrainingError(f"the model cannot be validated: {broken} ({error})") from error
        return metrics.ndcg[10]

    def _keep_if_better(self, stage: str) -> None:
        ndcg = self.validate()
        p = self.progress
        if ndcg > p.best:
            p.best, p.best_at, p.waited = ndcg, f"{stage} {p.step}", 0
            self.best_state = copy.deepcopy(self.model.state_dict())
        else:
            p.waited += 1
        self.reporter.evaluation(stage, p.step, ndcg, p.best)

    def run(self) -> Progress:
        """Train to the end (or go on from a restored state) and leave the best model by validation in place.

        Raises Interrupted after saving if ``should_stop`` says so, and NonFiniteTrainingError, which names what is not
        finite, if the model cannot be validated or IN_A_ROW steps one after the other were left out.
        """
        try:
            self._run_stages()
        finally:
            self._stop_prefetch()
        self.model.load_state_dict(self.best_state)
        self.model.eval()
        return self.progress

    def _run_stages(self) -> None:
        p, every = self.progress, self.config.train.evaluate_every
        while p.stage < len(self.stages):
            stage = self.stages[p.stage]
            known = stage.name == "finetune" and p.stage > 0 and self.stages[p.stage - 1].name == TABLE
            while p.step < stage.steps:
                if self.should_stop():
                    self.save()
                    raise Interrupted(f"stopped in {stage.name} at step {p.step} of {stage.steps}")
                if stage.validated and p.step % every == 0 and not (known and p.step == 0):
                    self._keep_if_better(stage.name)
                    if p.waited >= self.config.train.patience:
                        break
                if self.profiler is None:
                    metrics = self.train_step(stage.name, p.step)
                else:
                    metrics = self.profiler.step(self, stage.name, p.step)
                p.step += 1
                if "weights" in metrics and "skipped" not in metrics:
                    keep_trace(p.step, metrics, trace=p.trace, untraced=p.untraced)
                self.reporter.step(stage.name, p.step, stage.steps, metrics)
                if self.folder is not None and p.step % (4 * every) == 0:
                    self.save()
            if stage.validated and p.waited < self.config.train.patience:
                self._keep_if_better(stage.name)
            self._flush_tables()
            p.left_out.end(stage.name, p.step)
            if stage.name == TABLE:  # what comes after starts from the best table
                self.model.load_state_dict(self.best_state)
                p.waited = 0
            p.stage, p.step = p.stage + 1, 0
            if p.stage < len(self.stages):
                self._start_optimizers()

    # checkpoints

    def save(self) -> None:
        """Write the whole state of the run, if it has a folder."""
        if self.folder is None:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_state.items()}
        tensors |= {f"steps.{k}": v for k, v in self.averages.steps.items()}
        tensors |= {f"target_gradients.{k}": v for k, v in self.averages.target_gradients.items()}
        tensors |= {f"noise.{k}": v for k, v in self.noise.target_gradients.items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer)
        if self.table_optimizer is not None:  # rows stay behind, so that a run that goes on rounds as if not stopped
            tensors |= checkpoint.optimizer_tensors(self.table_optimizer, prefix="table_optimizer")
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
            progress = Progress(**manifest | {"left_out": LeftOut(**manifest["left_out"])})
            self._check_progress(progress)
        except Damaged as error:
            raise ValueError(f"checkpoint in {self.folder} is damaged: {error}") from error
        self.progress = progress

        def pick(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.model.load_state_dict(pick("model."))
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint in {self.folder} belongs to other domains, of another shape: {error}"
            ) from error
        self.best_state = pick("best.")
        self.averages.steps, self.averages.target_gradients = pick("steps."), pick("target_gradients.")
        self.noise.target_gradients = pick("noise.")
        if self.progress.stage < len(self.stages):
            self._start_optimizers()
            checkpoint.restore_optimizer(self.optimizer, tensors)
            if self.table_optimizer is not None:
                checkpoint.restore_optimizer(self.table_optimizer, tensors, prefix="table_optimizer")
        return True

    def _check_progress(self, progress: Progress) -> None:
        done = progress.stage == len(self.stages) and not progress.step
        if not done and not (progress.stage < len(self.stages) and progress.step <= self.stages[progress.stage].steps):
            raise Damaged(f"{checkpoint.MANIFEST}: no stage {progress.stage} of the run has a step {progress.step}")
