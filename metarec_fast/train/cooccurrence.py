"""Training the co-occurrence scorer: warm-up on the sources, meta-transfer, fine-tuning on the target.

Query users of a domain are those whose events its statistics leave out. Statistics of sources count as many users as
the target has, so that the scorer learns from statistics as sparse as the target's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from metarec_fast.meta.signals import NoiseFloor, keep_trace, signals
from metarec_fast.meta.step import GradientAverages, Source, flatten, outer_step, similarity, source_weights
from metarec_fast.train.left_out import LeftOut, NonFiniteTrainingError, reason
from metarec_fast.train.trainer import Interrupted, Reporter, Silent, clip_and_step, decayed_and_free

QUERY_USERS = 4000  # users of a source, at most
VALIDATED = 4000  # cases of the target, at most: the step is chosen by a mean over them
STREAMS = ("warmup", "meta", "finetune", "similarity")  # of random numbers
CANDIDATE_WEIGHTS = ("linear.weight", "network.0.weight", "network.2.weight", "network.4.weight")
TITLES = {
    "similarity": "co-occurrence: weights",
    "warmup": "co-occurrence: sources",
    "meta": "co-occurrence: meta",
    "finetune": "co-occurrence: target",
}


@dataclass
class CooccurrenceResult:
    """What training found out.

    losses: on validation, by stage and step; the best of them, and where. sources: each one's weight and its first
    similarity to the target, with the deviation over starts. trace: similarities and weights of the meta stage.
    """

    losses: list[tuple[str, int, float]] = field(default_factory=list)
    best: float = math.inf
    best_at: str = "start"
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)  # steps, for numbers that are not finite
    trace: list[dict[str, Any]] = field(default_factory=list)  # as ``meta.keep_trace`` keeps it
    untraced: list[dict[str, Any]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        """Steps left out, of all stages."""
        return sum(self.left_out.by_stage.values())

    def to_dict(self) -> dict[str, Any]:
        losses = [list(entry) for entry in self.losses]  # as JSON has them
        return {
            "validation_loss": losses,
            "best": self.best,
            "best_at": self.best_at,
            "sources": self.sources,
            "skipped_steps": self.skipped,
            "skipped_by_stage": dict(self.left_out.by_stage),
            "stages_not_run": list(self.left_out.not_run),
            "transfer": self.trace,
        }


class CooccurrenceTrainer:
    """Trains an `CooccurrenceNetwork` for a target's split with the help of sources' splits.

    Raises ValueError if the target has fewer than two users to count, as there is then no query user.
    """

    def __init__(
        self,
        sources: dict[str, Split],
        target: Split,
        config: Config,
        *,
        start: CooccurrenceNetwork | None = None,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """start: a scorer whose parameters to go on from, by default fresh ones."""
        self.config, self.target, self.sources = config, target, sources
        self.meta = replace(config.meta, source_loss_weight=config.cooccurrence.source_loss_weight)
        self.reporter, self.should_stop = reporter or Silent(), should_stop
        self.statistics = CooccurrenceStatistics(target.train)
        users = np.flatnonzero(target.train.lengths > 0)
        if len(users) < 2:
            raise ValueError(f"co-occurrence needs two users with events at least, target has {len(users)}")
        self.num_users = len(users)
        seed = config.train.seed
        self.episodes = {
            name: source_episodes(split.train, len(users), config.cooccurrence.sizes, seed=(seed, i))
            for i, (name, split) in enumerate(sources.items())
        }
        self.folds = folds(target.train, users, config.cooccurrence.folds, seed=(seed, len(sources)))
        self.catalogue = choice_catalogue(target, config.data.catalogue)
        # as for later users, statistics leave out the users whose targets are scored
        cases = np.random.default_rng((seed, len(sources) + 1)).permutation(len(target.valid))
        if self.catalogue is not None:  # other targets cannot be reached, however items are scored
            cases = cases[self.catalogue[target.valid.targets[cases]]]
        cases = cases[:VALIDATED]
        self.validation_cases = [
            (
                fold.statistics,
                select_cases(target.valid, np.sort(cases[np.isin(target.valid.users[cases], fold.query_users)])),
            )
            for fold in self.folds
        ]
        if not any(
            len(cases) for _, cases in self.validation_cases
        ):  # of short histories alone: their own events count too
            self.validation_cases = [(self.statistics, select_cases(target.valid, np.sort(cases)))]
        torch.manual_seed(seed)
        self.scorer = CooccurrenceNetwork(hidden=config.cooccurrence.hidden)
        if start is not None:
            self.scorer.load_state_dict(start.state_dict())
        self.fresh = start is None
        self.averaged = views_of(self.scorer)  # what counts: parameters as they are, or where one is kept, an average
        self.best = copy_of(self.averaged)
        self.averages, self.noise = GradientAverages(config.meta.similarity_decay), NoiseFloor()
        self.result = CooccurrenceResult()
        self.weights = torch.full((len(sources),), 1 / max(len(sources), 1))

    def run(self) -> CooccurrenceScorer:
        """Train to the end; the scorer of the least validation loss is left in place.

        Raises Interrupted if ``should_stop`` says so: the stages are short, and start again. Raises
        NonFiniteTrainingError if IN_A_ROW steps one after the other, or all validation losses, are not finite.
        """
        e, method = self.config.cooccurrence, self.config.train.method
        if self.sources:
            if method == "metarec":
                self._weigh_sources()
            meta = e.meta_steps if method == "metarec" else 0
            total = e.warmup_steps + e.meta_steps
            self._stage("warmup", total - meta, lr=e.lr, linear_decay=True, joint=method == "joint")
            self._stage("meta", meta, lr=e.finetune_lr, linear_decay=True)
        if method != "joint":
            fresh = self.fresh and not self.sources
            steps = e.warmup_steps + e.meta_steps if fresh else 0
            steps += max(e.finetune_steps, math.ceil(e.finetune_passes * self.num_users / e.batch_size))
            self._stage("finetune", steps, lr=e.lr if fresh else e.finetune_lr)
        if not self.result.losses:
            self._keep_if_better("start", 0)
        if not math.isfinite(self.result.best):
            raise NonFiniteTrainingError(
                "no validation loss of the co-occurrence scorer was finite: there is none to keep"
            )
        self.scorer.load_state_dict(self.best)
        return CooccurrenceScorer(self.scorer.eval(), self.statistics)

    def _weigh_sources(self) -> None:
        """Weights by how far the first descent directions of source and target agree, in scorers that know nothing yet.

        Later the directions no longer tell: where the sources' losses are least in sum their gradients cancel, and
        what is left says how far a domain's statistics may be trusted, which depends on its size. Only of the network
        over candidates, since the base, which reads popularity alone, would have its way in a full cosine. Each start
        takes the cases of a fold of the target's users, so that the spread over starts has the noise of few users.
        """
        e, m = self.config.cooccurrence, self.config.meta
        starts = []
        for start in range(e.similarity_inits):
            if self.should_stop():
                raise Interrupted(f"stopped in {TITLES['similarity']} at start {start} of {e.similarity_inits}")
            seed = np.random.SeedSequence((self.config.train.seed, STREAMS.index("similarity"), start))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(seed.generate_state(1)[0]))
                scorer = CooccurrenceNetwork(hidden=e.hidden)
            parameters = dict(scorer.named_parameters())
            read = {name: parameters[name] for name in CANDIDATE_WEIGHTS}
            directions = []
            for i, pool in enumerate([*self.episodes.values(), [self.folds[start % len(self.folds)]]]):
                total = torch.zeros_like(flatten(read))
                for batch in range(e.similarity_batches):
                    features = self._draw(pool, "similarity", batch, start * (len(self.sources) + 1) + i)
                    loss = scorer.loss(parameters, {}, features)
                    gradients = torch.autograd.grad(loss, list(read.values()))
                    total += flatten(dict(zip(read, gradients, strict=True)))
                directions.append(total)
            *of_sources, of_target = directions
            found = torch.stack([similarity(d, of_target, like=read, config=m) for d in of_sources])
            if found.isfinite().all():
                starts.append(found)
            else:
                count = self.result.left_out.by_stage.get(TITLES["similarity"], 0)
                self.result.left_out.by_stage[TITLES["similarity"]] = count + 1
        self.result.left_out.end(TITLES["similarity"], e.similarity_inits)
        if not starts:
            return  # as heavy as each other
        drawn = torch.stack(starts)
        self.weights = weights_of(drawn, config=m)
        for i, name in enumerate(self.episodes):
            self.result.sources[name] = {
                "weight": float(self.weights[i]),
                "similarity": float(drawn[:, i].mean()),
                "deviation": float(drawn[:, i].std(correction=0)),
            }

    def _stage(self, stage: str, steps: int, *, lr: float, linear_decay: bool = False, joint: bool = False) -> None:
        if not steps:
            return
        e = self.config.cooccurrence
        optimizer = torch.optim.AdamW(decayed_and_free(list(self.scorer.parameters()), e.weight_decay), lr=lr)
        decay = e.average_decay if stage == "finetune" else 0.0
        self.averaged = copy_of(views_of(self.scorer)) if decay else views_of(self.scorer)
        domains = len(self.episodes) + 1
        turn = weighted_round_robin([1 / domains] * domains if joint else self.weights.tolist())
        patience = max(1, round(e.patience * e.finetune_lr / lr)) if lr else e.patience  # larger steps need fewer
        waited = taken = 0
        for step in range(steps):
            if self.should_stop():
                raise Interrupted(f"stopped in {TITLES[stage]} at step {step} of {steps}")
            if stage != "warmup" and step % e.evaluate_every == 0:
                waited = 0 if self._keep_if_better(stage, step) else waited + 1
                if stage == "finetune" and waited >= patience:
                    break
            metrics = self._step(stage, step, turn, optimizer)
            taken = step + 1
            if decay and "skipped" not in metrics:
                for name, value in views_of(self.scorer).items():
                    self.averaged[name] = torch.lerp(value, self.averaged[name], decay)
            if linear_decay:
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr * (1 - step / (steps + 20))
            self.reporter.step(TITLES[stage], step + 1, steps, metrics)
        else:
            self._keep_if_better(stage, steps)
        self.result.left_out.end(TITLES[stage], taken)

    def _step(self, stage: str, step: int, turn: Iterator[int], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """One optimizer step; left out, and counted, if a loss or gradient is not finite."""
        averages, noise = self.averages.copy(), self.noise.copy()
        if stage == "meta":
            metrics = self._meta(step)
        else:
            pools = [*self.episodes.values(), self.folds]
            metrics = self._plain(self.folds if stage == "finetune" else pools[next(turn)], stage, step)
        clip = self.config.train.clip
        if not clip_and_step(self.scorer.parameters(), [optimizer], metrics["losses"].values(), clip=clip):
            self.averages, self.noise = averages, noise  # one bad step would stay in them for ever
            metrics["skipped"] = self.result.left_out.add(TITLES[stage], step, self._reason(metrics["losses"]))
            return metrics
        self.result.left_out.took()
        if stage == "meta":
            keep_trace(step + 1, metrics, trace=self.result.trace, untraced=self.result.untraced)
        return metrics

    def _reason(self, losses: dict[str, float]) -> str:
        named = {f"the co-occurrence scorer's {name}": p for name, p in self.scorer.named_parameters()}
        return reason(losses, named | {f"the gradient of {name}": p.grad for name, p in named.items()})

    def _plain(self, pool: list[CooccurrenceEpisode], stage: str, step: int) -> dict[str, Any]:
        """Gradients of one domain's loss."""
        loss = self.scorer.loss(dict(self.scorer.named_parameters()), {}, self._draw(pool, stage, step))
        self.scorer.zero_grad(set_to_none=True)
        loss.backward()
        return {"losses": {"co-occurrence": float(loss.detach())}}

    def _meta(self, step: int) -> dict[str, Any]:
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
            "losses": {"co-occurrence": float(result.target_losses.mean())},
            **signals(result, self.noise, before=before, config=m),
        }

    def _draw(self, pool: list[CooccurrenceEpisode], stage: str, step: int, stream: int = 0) -> CooccurrenceFeatures:
        seed = (self.config.train.seed, STREAMS.index(stage), stream, step)
        episode = pool[int(np.random.default_rng(seed).integers(len(pool)))]
        return episode.batch(self.config.cooccurrence.batch_size, seed=(*seed, 1))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean cross-entropy of the validation targets: less noisy than ranks where cases are few."""
        losses = [
            mean_loss(self.scorer, self.averaged, statistics, cases, catalogue=self.catalogue) * len(cases)
            for statistics, cases in self.validation_cases
        ]
        return sum(losses) / max(1, sum(len(cases) for _, cases in self.validation_cases))

    def _keep_if_better(self, stage: str, step: int) -> bool:
        loss = self.validation_loss()
        self.result.losses.append((stage, step, loss))
        if not (math.isfinite(loss) and loss < self.result.best):
            return False
        self.result.best, self.result.best_at = loss, f"{stage} {step}"
        self.best = copy_of(self.averaged)
        return True


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
