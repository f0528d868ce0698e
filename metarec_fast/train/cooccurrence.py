"""Training the co-occurrence scorer: warm-up on the sources, meta-transfer, fine-tuning on the target.

An objective of ``train.loop``. Query users of a domain are those whose events its statistics leave out. Statistics of
sources count as many users as the target has, so that the scorer learns from statistics as sparse as the target's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarec_fast.config import Config, MetaConfig
from metarec_fast.cooccurrence.features import CooccurrenceEpisode, CooccurrenceFeatures, CooccurrenceStatistics
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer, Parameters
from metarec_fast.data import select_cases
from metarec_fast.data.domain import Cases, Sequences, Split
from metarec_fast.evaluation import choice_catalogue
from metarec_fast.meta.signals import StepMetrics, signals
from metarec_fast.meta.step import Source, flatten, outer_step, similarity, source_weights
from metarec_fast.train import checkpoint
from metarec_fast.train.history import CooccurrenceHistory, SourceWeight
from metarec_fast.train.left_out import NonFiniteTrainingError
from metarec_fast.train.loop import Progress, Stage, Trainer, picked
from metarec_fast.train.optimizer import clip_and_step, decayed_and_free

QUERY_USERS = 4000  # users of a source, at most
VALIDATED = 4000  # cases of the target, at most: the step is chosen by a mean over them
STREAMS = ("warmup", "meta", "finetune", "similarity")  # of random numbers
CANDIDATE_WEIGHTS = ("linear.weight", "network.0.weight", "network.2.weight", "network.4.weight")
TITLES = {
    "similarity": "co-occurrence: weights",
    "warmup": "co-occurrence: sources",
    "meta": "co-occurrence: meta",
    "finetune": "co-occurrence: target",
    "start": "co-occurrence: start",
}


def stages(config: Config, users: int, *, sources: bool, fresh: bool) -> list[Stage]:
    """The stages of a method, for a target with so many users; those without steps are left out.

    fresh: the scorer starts from noise, without sources: the target then has their steps and learning rate too.
    """
    e, method, found = config.cooccurrence, config.train.method, []

    def add(name: str, steps: int, lr: float = 0.0, **options: Any) -> None:
        if steps:
            found.append(Stage(name, steps, lr, title=TITLES[name], **options))

    if sources:
        meta = e.meta_steps if method == "metarec" else 0
        if method == "metarec":
            add("similarity", e.similarity_inits, evaluate_last=False, moves=False)
        add("warmup", e.warmup_steps + e.meta_steps - meta, e.lr, linear_decay=True)
        add("meta", meta, e.finetune_lr, linear_decay=True, evaluate_every=e.evaluate_every)
    if method != "joint":
        lr = e.lr if fresh else e.finetune_lr
        steps = e.warmup_steps + e.meta_steps if fresh else 0
        steps += max(e.finetune_steps, math.ceil(e.finetune_passes * users / e.batch_size))
        patience = max(1, round(e.patience * e.finetune_lr / lr)) if lr else e.patience  # larger steps need fewer
        add("finetune", steps, lr, evaluate_every=e.evaluate_every, patience=patience)
    if not any(stage.evaluate_last for stage in found):
        found.append(Stage("start", 0, title=TITLES["start"]))
    return found


class CooccurrenceTrainer(Trainer):
    """Trains a `CooccurrenceNetwork` for a target's split with the help of sources' splits; options as for `Trainer`.

    Raises ValueError if the target has fewer than two users to count, as there is then no query user.
    """

    metric, higher_is_better = "loss", False

    def __init__(
        self,
        sources: dict[str, Split],
        target: Split,
        config: Config,
        *,
        start: CooccurrenceNetwork | None = None,
        **options: Any,
    ) -> None:
        """start: a scorer whose parameters to go on from, by default fresh ones."""
        e, seed = config.cooccurrence, config.train.seed
        super().__init__(sources, target, config, save_every=4 * e.evaluate_every, **options)
        self.meta = replace(config.meta, source_loss_weight=e.source_loss_weight)
        self.statistics = CooccurrenceStatistics(target.train)
        users = np.flatnonzero(target.train.lengths > 0)
        if len(users) < 2:
            raise ValueError(f"co-occurrence needs two users with events at least, target has {len(users)}")
        self.episodes = {
            name: source_episodes(split.train, len(users), e.sizes, seed=(seed, i))
            for i, (name, split) in enumerate(sources.items())
        }
        self.folds = folds(target.train, users, e.folds, seed=(seed, len(sources)))
        self.catalogue = choice_catalogue(target, config.data.catalogue)
        self.validation_cases = self._validation_cases()
        torch.manual_seed(seed)
        self.scorer = CooccurrenceNetwork(hidden=e.hidden)
        if start is not None:
            self.scorer.load_state_dict(start.state_dict())
        self.similarities: list[Tensor] = []  # [S] of each initialisation
        self.weights = torch.full((len(sources),), 1 / max(len(sources), 1))
        self.source_weights: dict[str, SourceWeight] = {}
        self.stages = stages(config, len(users), sources=bool(sources), fresh=start is None and not sources)
        self.begin_stage(self.stages[0])

    def _validation_cases(self) -> list[tuple[CooccurrenceStatistics, Cases]]:
        """Cases of the target by fold: as for later users, statistics leave out the users whose targets are scored."""
        valid, seed = self.target.valid, (self.config.train.seed, len(self.sources) + 1)
        cases = np.random.default_rng(seed).permutation(len(valid))
        if self.catalogue is not None:  # other targets cannot be reached, however items are scored
            cases = cases[self.catalogue[valid.targets[cases]]]
        cases = cases[:VALIDATED]
        by_fold = [
            (fold.statistics, select_cases(valid, np.sort(cases[np.isin(valid.users[cases], fold.query_users)])))
            for fold in self.folds
        ]
        if any(len(cases) for _, cases in by_fold):
            return by_fold
        return [(self.statistics, select_cases(valid, np.sort(cases)))]  # of short histories: their own events count

    def run(self) -> Progress:
        progress = super().run()
        self.scorer.eval()
        return progress

    @property
    def result(self) -> CooccurrenceScorer:
        """The scorer as it is, with the statistics of all of the target's training events."""
        return CooccurrenceScorer(self.scorer, self.statistics)

    def history(self) -> CooccurrenceHistory:
        p = self.progress
        return CooccurrenceHistory(
            **p.left_out_steps(),
            validation_loss=[list(one) for one in p.evaluations],
            best=p.best,
            best_at=p.best_at,
            sources=dict(self.source_weights),
            transfer=p.trace,
        )

    # the objective

    def begin_stage(self, stage: Stage) -> None:
        parameters = decayed_and_free(list(self.scorer.parameters()), self.config.cooccurrence.weight_decay)
        self.optimizer = torch.optim.AdamW(parameters, lr=stage.lr)
        # what counts: parameters as they are, or where an average over steps is kept, that
        self.averaged = copy_of(views_of(self.scorer)) if self._decay(stage.name) else views_of(self.scorer)
        self._turns: Iterator[int] | None = None

    def _decay(self, stage: str) -> float:
        """Of the average over steps; 0: none is kept."""
        return self.config.cooccurrence.average_decay if stage == "finetune" else 0.0

    def gradients(self, stage: str, step: int) -> StepMetrics:
        if stage == "similarity":
            return self._compare_sources(step)
        rate = self.stages[self.progress.stage].rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if stage == "meta":
            return self._meta(step)
        return self._plain(self.folds if stage == "finetune" else self._next_pool(step), stage, step)

    def update(self, stage: str, losses: dict[str, float]) -> bool:
        if stage == "similarity":
            return self._keep_similarities()
        clip, decay = self.config.train.clip, self._decay(stage)
        if not clip_and_step(self.scorer.parameters(), [self.optimizer], losses.values(), clip=clip):
            return False
        if decay:
            for name, value in views_of(self.scorer).items():
                self.averaged[name] = torch.lerp(value, self.averaged[name], decay)
        return True

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy of the validation targets: less noisy than ranks where cases are few."""
        losses = [
            mean_loss(self.scorer, self.averaged, statistics, cases, catalogue=self.catalogue) * len(cases)
            for statistics, cases in self.validation_cases
        ]
        return sum(losses) / max(1, sum(len(cases) for _, cases in self.validation_cases))

    def end_stage(self, stage: Stage) -> None:
        if stage.name == "similarity":
            self._weigh_sources()

    def state(self) -> dict[str, Tensor]:
        return copy_of(self.averaged)

    def load_state(self, state: dict[str, Tensor]) -> None:
        if not state:
            raise NonFiniteTrainingError(
                "no validation loss of the co-occurrence scorer was finite: there is none to keep"
            )
        self.scorer.load_state_dict(state)

    def named_tensors(self) -> dict[str, Tensor | None]:
        named = {f"the co-occurrence scorer's {name}": p for name, p in self.scorer.named_parameters()}
        return named | {f"the gradient of {name}": p.grad for name, p in named.items()}

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"scorer.{name}": value for name, value in self.scorer.state_dict().items()}
        tensors |= {f"averaged.{name}": value.clone() for name, value in self.averaged.items()}
        if self.similarities:
            tensors["similarities"] = torch.stack(self.similarities)
        return tensors | checkpoint.optimizer_tensors(self.optimizer)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.scorer.load_state_dict(picked("scorer", tensors))
        if "similarities" in tensors:
            self.similarities = list(tensors["similarities"])
        if self.stages[0].name == "similarity" and self.progress.stage:
            self._weigh_sources()
        if self.finished:
            return
        checkpoint.restore_optimizer(self.optimizer, tensors)
        if self._decay(self.stages[self.progress.stage].name):
            self.averaged = picked("averaged", tensors)

    # weights of sources

    def _compare_sources(self, start: int) -> StepMetrics:
        """How far the first descent directions of each source and the target agree, in a scorer that knows nothing yet.

        Later the directions no longer tell: where the sources' losses are least in sum their gradients cancel, and
        what is left says how far a domain's statistics may be trusted, which depends on its size. Only of the network
        over candidates, since the base, which reads popularity alone, would have its way in a full cosine. Each start
        takes the cases of a fold of the target's users, so that the spread over starts has the noise of few users.
        """
        e = self.config.cooccurrence
        seed = np.random.SeedSequence((self.config.train.seed, STREAMS.index("similarity"), start))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed.generate_state(1)[0]))
            scorer = CooccurrenceNetwork(hidden=e.hidden)
        parameters = dict(scorer.named_parameters())
        read = {name: parameters[name] for name in CANDIDATE_WEIGHTS}
        directions, losses = [], {}
        names = [*self.episodes, self.target.domain.name]
        for i, pool in enumerate([*self.episodes.values(), [self.folds[start % len(self.folds)]]]):
            total, mean = torch.zeros_like(flatten(read)), 0.0
            for batch in range(e.similarity_batches):
                features = self._draw(pool, "similarity", batch, start * (len(self.sources) + 1) + i)
                loss = scorer.loss(parameters, {}, features)
                gradients = torch.autograd.grad(loss, list(read.values()))
                total += flatten(dict(zip(read, gradients, strict=True)))
                mean += float(loss.detach()) / e.similarity_batches
            directions.append(total)
            losses[names[i]] = mean
        *of_sources, of_target = directions
        self._found = torch.stack([similarity(d, of_target, like=read, config=self.config.meta) for d in of_sources])
        return {"losses": losses}

    def _keep_similarities(self) -> bool:
        if not self._found.isfinite().all():
            return False
        self.similarities.append(self._found)
        return True

    def _weigh_sources(self) -> None:
        """Weights from the similarities of all initialisations; without any that was finite, all sources alike."""
        if not self.similarities:
            return
        drawn = torch.stack(self.similarities)
        self.weights = weights_of(drawn, config=self.config.meta)
        for i, name in enumerate(self.episodes):
            mean, deviation = float(drawn[:, i].mean()), float(drawn[:, i].std(correction=0))
            self.source_weights[name] = SourceWeight(float(self.weights[i]), mean, deviation)

    # gradients

    def _next_pool(self, step: int) -> list[CooccurrenceEpisode]:
        """Of warm-up: sources as often as they weigh, or in joint training all domains alike."""
        pools = [*self.episodes.values(), self.folds]
        if self._turns is None:
            joint = self.config.train.method == "joint"
            weights = [1 / len(pools)] * len(pools) if joint else self.weights.tolist()
            self._turns = islice(weighted_round_robin(weights), step, None)
        return pools[next(self._turns)]

    def _plain(self, pool: list[CooccurrenceEpisode], stage: str, step: int) -> StepMetrics:
        """Gradients of one domain's loss."""
        loss = self.scorer.loss(dict(self.scorer.named_parameters()), {}, self._draw(pool, stage, step))
        self.scorer.zero_grad(set_to_none=True)
        loss.backward()
        return {"losses": {"co-occurrence": loss.detach()}}

    def _meta(self, step: int) -> StepMetrics:
        """Gradients of one meta step."""
        m = self.meta
        count = 1 if m.same_batch else m.inner_steps
        sources = [
            Source(name, {}, [self._draw(pool, "meta", step * count + k, i) for k in range(count)])
            for i, (name, pool) in enumerate(self.episodes.items())
        ]
        shared = dict(self.scorer.named_parameters())
        target = self._draw(self.folds, "meta", step, len(sources))
        before = self.averages.copy()
        result = outer_step(
            self.scorer.loss,
            shared,
            sources,
            {},
            target,
            config=m,
            averages=self.averages,
            weights=self.weights,
        )
        for name, parameter in shared.items():
            parameter.grad = result.shared_grad[name]
        return {
            "losses": {"co-occurrence": result.target_losses.mean()},
            **signals(result, self.noise, before=before, config=m),
        }

    def _draw(self, pool: list[CooccurrenceEpisode], stage: str, step: int, stream: int = 0) -> CooccurrenceFeatures:
        seed = (self.config.train.seed, STREAMS.index(stage), stream, step)
        episode = pool[int(np.random.default_rng(seed).integers(len(pool)))]
        return episode.batch(self.config.cooccurrence.batch_size, seed=(*seed, 1))


def source_episodes(
    train: Sequences, target_users: int, sizes: tuple[float, ...], *, seed: tuple[int, ...]
) -> list[CooccurrenceEpisode]:
    """Episodes of a source whose statistics count about ``size`` times as many users as the target has."""
    users = np.flatnonzero(train.lengths > 0)
    episodes = []
    for i, size in enumerate(sizes):
        order = np.random.default_rng((*seed, i)).permutation(users)
        counted = min(max(1, round(size * target_users)), max(1, int(0.9 * len(order))))
        statistics, query_users = order[:counted], order[counted : counted + QUERY_USERS]
        if not (train.lengths[query_users] >= 2).any():  # a tiny source: one query user is left out of the statistics
            query_users = order[train.lengths[order] >= 2][:1]
            statistics = np.setdiff1d(statistics, query_users)
        episodes.append(CooccurrenceEpisode(train, statistics=statistics, query_users=query_users))
    return episodes


def weights_of(drawn: Tensor, *, config: MetaConfig) -> Tensor:
    """[S] weights of sum 1 from similarities [N, S], drawn N times: softmax of means, as soft as these are uncertain.

    The temperature is the root of the sum of squares of ``config.temperature`` and of two standard errors of a mean.
    What moves all sources of a draw together is no error, for it moves no weight.
    """
    N, S = drawn.shape
    if min(N, S) < 2:
        return source_weights(drawn.mean(0), config=config)
    rest = drawn - drawn.mean(1, keepdim=True) - drawn.mean(0) + drawn.mean()
    error = (rest.square().sum() / ((N - 1) * (S - 1) * N)).sqrt()
    temperature = math.hypot(config.temperature, 2 * float(error))
    return source_weights(drawn.mean(0), config=replace(config, temperature=temperature))


def weighted_round_robin(weights: Sequence[float]) -> Iterator[int]:
    """Endless indices: after any number of draws each has come in proportion to its weight, to within about one."""
    due = np.zeros(len(weights))
    while True:
        due += weights
        turn = int(np.argmax(due.round(6)))  # of equals the first, whatever rounding has added
        due[turn] -= 1
        yield turn


def folds(train: Sequences, users: np.ndarray, count: int, *, seed: tuple[int, ...]) -> list[CooccurrenceEpisode]:
    """Episodes with each of ``count`` groups of the users as query users, and the statistics of the others."""
    groups = np.array_split(np.random.default_rng(seed).permutation(users), min(count, len(users)))
    return [
        CooccurrenceEpisode(train, statistics=np.setdiff1d(users, group), query_users=group)
        for group in groups
        if (train.lengths[group] >= 2).any()
    ]


def views_of(scorer: CooccurrenceNetwork) -> Parameters:
    """Its parameters as they are, also after later steps."""
    return {name: value.detach() for name, value in scorer.named_parameters()}


def copy_of(parameters: Parameters) -> Parameters:
    return {name: value.clone() for name, value in parameters.items()}


def mean_loss(
    scorer: CooccurrenceNetwork,
    parameters: Parameters,
    statistics: CooccurrenceStatistics,
    cases: Cases,
    *,
    catalogue: np.ndarray | None = None,
    batch: int = 256,
) -> float:
    """Mean cross-entropy of the targets over all items, or over those of a catalogue, bool [V]."""
    total = 0.0
    for begin in range(0, len(cases), batch):
        part = select_cases(cases, np.arange(begin, min(begin + batch, len(cases))))
        features = statistics.cases(part.histories, part.targets)
        value = scorer.loss(parameters, {}, features if catalogue is None else features.among(catalogue))
        total += float(value) * len(part)
    return total / max(len(cases), 1)
