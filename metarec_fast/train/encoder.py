"""Training encoder, codebook and item tables: warm-up on the sources, meta-transfer, fine-tuning on the target.

An objective of ``train.loop``: batches are functions of (seed, step), and dropout is seeded by stage and step.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from metarec_fast.config import Config
from metarec_fast.data.domain import Split
from metarec_fast.evaluation import choice_catalogue, evaluate
from metarec_fast.meta.captured import CapturedStep
from metarec_fast.meta.signals import StepMetrics, signals
from metarec_fast.meta.step import OuterStep, Source, outer_step
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer
from metarec_fast.profiling.regions import region
from metarec_fast.sampling.batch import BatchShape, PackedBatch
from metarec_fast.sampling.mixture import Mixture
from metarec_fast.sampling.prefetch import Prefetch
from metarec_fast.sampling.sampler import Sampler
from metarec_fast.train import checkpoint
from metarec_fast.train.history import History
from metarec_fast.train.left_out import NonFiniteTrainingError, not_finite
from metarec_fast.train.loop import Stage, Trainer, picked
from metarec_fast.train.optimizer import TableAdamW, clip_and_step, decayed_and_free, dropout_seed
from metarec_fast.train.table_rows import ROWS, TableRows, all_rows, named_rows

# Tables from this many items on pay for the rows that a step touches, where its loss does not touch all. A step of
# 1,000 to 3,000 rows of 57,000 (64 wide, float32) so costs 1.4 to 2.7 times less than dense AdamW, of 12,000 up to
# 1.4 times more.
LARGE_TABLE = 50_000
TABLE = "finetune table"  # the stage that moves the target's item table and nothing else
FINETUNING = (TABLE, "finetune")
SHOWN = 16  # batches by which a captured step's size is chosen


def stages(config: Config, users: int) -> list[Stage]:
    """The stages of a method, for a target with so many users to train on.

    All methods may take the same number of optimizer steps in all. Models are compared on validation where the target
    is trained on.
    """
    t = config.train
    steps = max(t.finetune_steps, math.ceil(t.finetune_passes * users / t.batch_size))
    validated = {"evaluate_every": t.evaluate_every, "patience": t.patience}
    if t.method == "joint":
        return [Stage("joint", t.warmup_steps + t.meta_steps + steps, t.lr, **validated)]
    if t.method == "target_only":
        return [Stage("finetune", t.warmup_steps + t.meta_steps + steps, t.finetune_lr, **validated)]
    if t.method == "pretrain":
        before = {"pretrain": t.warmup_steps + t.meta_steps}
    else:
        before = {"warmup": t.warmup_steps, "meta": t.meta_steps}
    half = steps // 2 if t.finetune_scope == "gradual" else steps
    finetuning = []
    if t.finetune_scope != "all":
        finetuning.append(Stage(TABLE, half, t.finetune_lr, from_best=True, **validated))
    if t.finetune_scope != "table":
        count, known = (steps, False) if t.finetune_scope == "all" else (steps - half, True)
        finetuning.append(Stage("finetune", count, t.finetune_lr, evaluate_first=not known, **validated))
    return [*(Stage(name, count, t.lr, evaluate_last=False) for name, count in before.items()), *finetuning]


class EncoderTrainer(Trainer):
    """Trains ``model`` on a target's split with the help of sources' splits; options as for `Trainer`."""

    metric, higher_is_better = "NDCG@10", True

    def __init__(
        self, model: Recommender, sources: dict[str, Split], target: Split, config: Config, **options: Any
    ) -> None:
        super().__init__(sources, target, config, save_every=4 * config.train.evaluate_every, **options)
        self.model, self.device = model, config.train.device
        self.catalogue = choice_catalogue(target, config.data.catalogue)
        self.stages = stages(config, int((target.train.lengths > 0).sum()))
        self._samplers: dict[tuple[str, str], Sampler] = {}
        self._mixtures: dict[str, Mixture] = {}  # by stage
        self._prefetch: tuple[str, Prefetch] | None = None  # of one stage
        self.begin_stage(self.stages[0])
        self._captured: CapturedStep | None = None
        if config.train.capture and any(stage.name == "meta" for stage in self.stages):
            self._captured = self._capture()

    def history(self) -> History:
        p = self.progress
        return History(**p.left_out_steps(), best_validation_ndcg=p.best, best_at=p.best_at, transfer=p.trace)

    # what a step is made of

    def schedule(self, stage: str, step: int) -> list[tuple[str, int]]:
        """The domains of a step's batches, and which of its own batches in this stage each is."""
        return self._mixture(stage).schedule(self._place(stage, step))

    def batches(self, stage: str, step: int) -> list[tuple[str, PackedBatch]]:
        """A step's batches: a pure function of its arguments and the seed."""
        return self._mixture(stage).batches(self._place(stage, step), device=self.device)

    def _place(self, stage: str, step: int) -> int:
        """A step's number among those of the same streams: fine-tuning goes on where the table's steps ended."""
        return step + sum(s.steps for s in self.stages if s.name == TABLE) if stage == "finetune" else step

    def _mixture(self, stage: str) -> Mixture:
        if stage not in self._mixtures:
            target, m = self.target.domain.name, self.config.meta
            each = m.inner_steps if stage == "meta" and not m.same_batch else 1
            names = list(self.sources) if stage not in FINETUNING else []
            always = [] if stage in ("pretrain", "warmup") else [target]
            samplers = {name: self._sampler(name, stage) for name in (*names, *always)}
            self._mixtures[stage] = Mixture(samplers, each=each, always=always)
        return self._mixtures[stage]

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
            self.close()
            self._mixture(stage)  # made here, so that errors of its samplers are raised as they are
            batches = weakref.WeakMethod(self.batches)  # a trainer that is dropped ends its thread
            self._prefetch = stage, Prefetch(lambda step: batches()(stage, step), start=step)
        return self._prefetch[1].get(step)

    def close(self) -> None:
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

    def begin_stage(self, stage: Stage) -> None:
        """An optimizer for what every step moves, and one for tables of which a step touches few rows."""
        t = self.config.train
        by_rows = t.loss == "sampled" and t.device == "cpu"
        self._large = {
            name for name in self.model.domains if by_rows and len(self.model.table(name).weight) >= LARGE_TABLE
        }
        rows = [self.model.private_parameters(name)[key] for name in sorted(self._large) for key in ROWS]
        taken = {id(p) for p in rows}
        # the others get gradients in the table's stage too: they tell whether a step is finite, and compiled code stays
        moved = self.model.table(self.target.domain.name) if stage.name == TABLE else self.model
        rest = [p for p in moved.parameters() if id(p) not in taken]
        self.optimizer = torch.optim.AdamW(decayed_and_free(rest, t.weight_decay), lr=stage.lr, fused=True)
        self.table_optimizer = TableAdamW(decayed_and_free(rows, t.weight_decay), lr=stage.lr) if rows else None

    def _rows(self, name: str, batches: list[PackedBatch]) -> TableRows:
        """What a domain brings to a step: its private parameters, or of a large table the rows that are named."""
        parameters = self.model.private_parameters(name)
        if name not in self._large:
            return all_rows(parameters, batches)
        return named_rows(parameters, batches, before_reading=self.table_optimizer.catch_up)

    def _joint(self, batches: list[tuple[str, PackedBatch]]) -> StepMetrics:
        """Gradients of the mean loss of several domains."""
        losses = {}
        for name, batch in batches:
            rows = self._rows(name, [batch])
            value = self.model.loss(self.model.shared_parameters(), rows.private, rows.batches[0])
            (value / len(batches)).backward()
            rows.take_gradients({key: p.grad for key, p in rows.private.items()})
            losses[name] = value.detach()
        return {"losses": losses}

    def _meta(self, batches: list[tuple[str, PackedBatch]]) -> StepMetrics:
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

    def gradients(self, stage: str, step: int) -> StepMetrics:
        torch.manual_seed(dropout_seed(self.config.train.seed, self.progress.stage, step))
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with region("data"):
            batches = self._ready(stage, step)
        metrics = self._meta(batches) if stage == "meta" else self._joint(batches)
        return metrics | {"data_wait_share": round(self._prefetch[1].wait_share, 5)}

    def named_tensors(self) -> dict[str, Tensor | None]:
        """Parameters and gradients, of a domain's table or of what all domains share."""
        named = {f"the shared {name}": p for name, p in self.model.shared_parameters().items()}
        for domain in self.model.domains:
            named |= {f"{domain}'s table {name}": p for name, p in self.model.private_parameters(domain).items()}
        return named | {f"the gradient of {name}": p.grad for name, p in named.items()}

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [o for o in (self.optimizer, self.table_optimizer) if o is not None]

    def update(self, stage: str, losses: dict[str, float]) -> bool:
        clip = self.config.train.clip
        with region("optimizer"):
            return clip_and_step(self.model.shared.parameters(), self._optimizers(), losses.values(), clip=clip)

    def moved(self) -> int:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return sum(p.numel() for p in parameters if p.grad is not None)

    def _flush_tables(self) -> None:
        if self.table_optimizer is not None:
            self.table_optimizer.flush()

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
            broken = "; ".join(not_finite(self.named_tensors()))
            if not broken:
                raise
            raise NonFiniteTrainingError(f"the model cannot be validated: {broken} ({error})") from error
        return metrics.ndcg[10]

    def state(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
        self.model.eval()

    def end_stage(self, stage: Stage) -> None:
        self._flush_tables()

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer)
        if self.table_optimizer is not None:  # rows stay behind, so that a run that goes on rounds as if not stopped
            tensors |= checkpoint.optimizer_tensors(self.table_optimizer, prefix="table_optimizer")
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.model.load_state_dict(picked("model", tensors))
        if self.finished:
            return
        checkpoint.restore_optimizer(self.optimizer, tensors)
        if self.table_optimizer is not None:
            checkpoint.restore_optimizer(self.table_optimizer, tensors, prefix="table_optimizer")
