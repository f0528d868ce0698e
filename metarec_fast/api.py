"""MetaRec: fit, evaluate, recommend, save, load. Everything the command line does goes through here."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metarec_fast.checks import POSITIVE_COUNT, check_choice, check_count, check_flag
from metarec_fast.config import Config
from metarec_fast.cooccurrence.features import CooccurrenceStatistics
from metarec_fast.cooccurrence.mixture import ENCODER_ALONE, MixtureWeights, ScoreMixture, fit_mixture
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork, CooccurrenceScorer, TransitionTerms
from metarec_fast.data import Domain, Sequences, Split
from metarec_fast.data.copies import copied
from metarec_fast.data.domain import Catalogue
from metarec_fast.data.vocabulary import Vocabulary
from metarec_fast.evaluation import (
    Metrics,
    NonFiniteScoresError,
    Scorer,
    best_baseline,
    choice_catalogue,
    evaluate,
    top_k_items,
)
from metarec_fast.files import write_atomically
from metarec_fast.inputs import (
    check_device,
    check_domains,
    check_splits,
    checked_config,
    id_list,
    run_path,
    split_domain,
)
from metarec_fast.models.recommender import Recommender, SharedEncoder
from metarec_fast.models.scorer import ModelScorer
from metarec_fast.persistence import load_model, save_model
from metarec_fast.profiling.steps import StepProfiler
from metarec_fast.report.table import Row
from metarec_fast.report.transfer import html, transfer_report
from metarec_fast.text import printable
from metarec_fast.train import run_folder
from metarec_fast.train.cooccurrence import CooccurrenceTrainer
from metarec_fast.train.encoder import EncoderTrainer
from metarec_fast.train.history import History, MixtureHistory, TransitionWeight
from metarec_fast.train.loop import Reporter
from metarec_fast.train.stop import Interrupted, StopRequested

MOST_NAMED = 10  # unknown ids of one call
TRANSITION_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of transitions, beside the encoder


@contextmanager
def _watched(
    what: str,
    domains: Sequence[Domain],
    run_dir: str | Path | None,
    progress: bool | None,
    reporter: Reporter | None,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[Reporter | None, Callable[[], bool]]]:
    """Progress where somebody looks, and Ctrl-C that saves: the reporter and ``should_stop`` to take.

    Where somebody else handles Ctrl-C, and outside the main thread, that is left alone.
    """
    stop, own, started = StopRequested((signal.SIGINT,), yielding=True), None, time.perf_counter()
    with ExitStack() as stack:
        if progress is None:
            progress = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        if reporter is None and check_flag(progress, "progress"):
            from metarec_fast.report.console import ConsoleReporter, plain_console

            reporter = own = stack.enter_context(ConsoleReporter(console=plain_console(stderr=True)))
            own.begin(what)
            own.note(f"{what}: " + "\n     ".join(domain.summary() for domain in domains))
        stack.enter_context(stop)
        try:
            yield reporter, lambda: should_stop() or stop()
        except Interrupted as reason:
            if not stop.requested:
                raise
            kept = f"nothing is kept, for {what} was given no run_dir"
            if run_dir is not None:
                kept = f"saved in {printable(run_dir)}; the same call with resume=True goes on"
            raise KeyboardInterrupt(f"{reason}; {kept}") from None
        if stop.requested:  # after the last step
            where = "" if run_dir is None else f"; what it made is in {printable(run_dir)}"
            raise KeyboardInterrupt(f"{what} had come to its end{where}")
        if own is not None:
            where = "" if run_dir is None else f", kept in {printable(run_dir)}"
            own.note(f"{what}: {time.perf_counter() - started:.0f} s{where}")


class MetaRec:
    """A recommender of one target domain, trained with the help of source domains.

    Made by ``fit`` or ``from_pretrained``. ``model`` is the torch module, ``split`` the target's split, ``config``
    every option, ``history`` what training found out: among it ``transfer_report`` on what the sources gave.
    """

    def __init__(
        self,
        model: Recommender,
        split: Split,
        config: Config,
        *,
        cooccurrence: CooccurrenceScorer | TransitionTerms | None = None,
        weights: MixtureWeights = ENCODER_ALONE,
        history: History | None = None,
    ) -> None:
        self.model, self.split, self.config = model, split, config
        self.cooccurrence, self.weights = cooccurrence, weights
        self.history = history or History()

    @property
    def domain(self) -> Domain:
        return self.split.domain

    @classmethod
    def fit(
        cls,
        sources: Domain | Sequence[Domain],
        target: Domain,
        *,
        config: Config | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        profiler: StepProfiler | None = None,
    ) -> MetaRec:
        """Train on ``sources`` and ``target``; the best model by validation NDCG@10 on the target is returned.

        With sources, a target-only model is trained too, with as many steps: if the one with sources is not better on
        validation, the target-only one is returned, and ``history.transfer_report`` says so in words
        (``train.compare_target_only=False`` leaves this out).

        run_dir: receives config, checkpoints, the model and report.html; the target-only run in target_only/.
        resume: go on from its checkpoints if it has some, which must be of the same data and options.
        overwrite: replace the run that it holds; the model in it stays until the new one takes its place.
        progress: show it, unless a ``reporter`` is given; None: on a terminal and in a notebook.
        should_stop: called before every step; if true the state is saved and ``Interrupted`` is raised.
        profiler: watches some steps of each stage and tells where their time goes; not of the target-only run beside.
        Ctrl-C saves to ``run_dir`` and raises KeyboardInterrupt, which says how to go on; a second one ends at once.
        Raises TypeError for what is no Domain, ValueError for domains of one name, a domain without training events,
        a target without validation cases, no source where one is needed, or a run_dir that holds a run already, or that
        a process is at work in; `NonFiniteTrainingError`, a ValueError, where training cannot go on because its numbers
        are not finite (``train.left_out``).
        """
        config = checked_config(config, Config())
        check_device(config)
        sources, target = check_domains(sources, target)
        if config.train.method == "target_only":
            sources = []
        elif not sources:
            raise ValueError(f"method {config.train.method!r} needs at least one source domain, got none")
        names = [d.name for d in (*sources, target)]
        if len(set(names)) < len(names):
            raise ValueError(f"domains must have different names, got {', '.join(names)}")
        for source in sources:
            if how := copied(source, target):
                warnings.warn(
                    f"source {source.name!r} {how}: it looks like a copy of the target, and teaches what is held out",
                    RuntimeWarning,
                    stacklevel=2,
                )
        with _watched("fit", (target, *sources), run_dir, progress, reporter, should_stop) as (reporter, should_stop):
            if config.train.threads:
                torch.set_num_threads(config.train.threads)
            run = _Run(run_path(run_dir), resume, reporter, should_stop)
            run.refuse(overwrite)
            splits = {d.name: split_domain(d, config) for d in sources}
            split = split_domain(target, config, fraction=config.data.target_fraction)
            check_splits(splits, split, config)
            with run.claimed("fit", config, sources, target, overwrite=overwrite):
                model = build(config, [*splits.values(), split])
                fitted = cls._train(model, splits, split, config, run, profiler=profiler)
                if splits and config.train.compare_target_only:
                    fitted = fitted._or_target_only(run, list(splits))
                run.keep(fitted)
            return fitted

    def adapt(
        self,
        domain: Domain,
        *,
        config: Config | None = None,
        compare_target_only: bool = False,
        run_dir: str | Path | None = None,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> MetaRec:
        """A recommender of another domain, from this one's encoder and codebook; no source data is needed.

        The new item table starts from the domain's own structure (``model.init``), then the table alone and after it
        everything is fine-tuned on the domain, as ``train.finetune_scope`` says; steps and the weights of encoder and
        co-occurrence are chosen on validation. This model stays as it is.

        config: options of the fine-tuning; by default ``adapt_config()``, this model's with all of the users. Only
            ``finetune_steps`` and ``finetune_passes`` of steps are taken.
        compare_target_only: train on the domain alone too, with as many steps, and return what validation likes better.
        run_dir, resume, overwrite, progress, reporter, should_stop: as for ``fit``.
        Raises ValueError for another ``config.model`` than this model's, or a domain that cannot be trained on.
        """
        _, domain = check_domains((), domain)
        check_flag(compare_target_only, "compare_target_only")
        config = checked_config(config, self.adapt_config())
        check_device(config)
        if config.model != self.config.model:
            raise ValueError("config.model must be that of the model to adapt: its parameters have that shape")
        # the shared parameters come from elsewhere, whatever made them, and the last stage is the new domain's alone
        method = "metarec" if config.train.method == "metarec" else "pretrain"
        config = config.replace(train={"method": method, "warmup_steps": 0, "meta_steps": 0})
        with _watched("adapt", (domain,), run_dir, progress, reporter, should_stop) as (reporter, should_stop):
            if config.train.threads:
                torch.set_num_threads(config.train.threads)
            run = _Run(run_path(run_dir), resume, reporter, should_stop)
            run.refuse(overwrite)
            split = split_domain(domain, config, fraction=config.data.target_fraction)
            check_splits({}, split, config)
            model = build(config, [split], shared=self.model.shared)
            start = self.cooccurrence.scorer if isinstance(self.cooccurrence, CooccurrenceScorer) else None
            with run.claimed("adapt", config, [], domain, overwrite=overwrite):
                adapted = self._train(model, {}, split, config, run, start=start, origin=self._origin(start))
                adapted.history.adapted_from = self.domain.name
                if compare_target_only:
                    adapted = adapted._or_target_only(run, [])
                run.keep(adapted)
            return adapted

    def adapt_config(self) -> Config:
        """What ``adapt`` takes by default: this model's options, all users, the CPU where its device is not here."""
        config = self.config.replace(data={"target_fraction": 1.0})
        try:
            check_device(config)
        except ValueError:
            return config.replace(train={"device": "cpu", "capture": False})
        return config

    def _origin(self, start: CooccurrenceNetwork | None) -> str:
        """What tells the parameters that an adapted model starts from apart from any others."""
        digest = hashlib.sha256()
        for module in (self.model.shared, *(() if start is None else (start,))):
            for name, value in module.state_dict().items():
                digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
                digest.update(value.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    @classmethod
    def _train(
        cls,
        model: Recommender,
        sources: dict[str, Split],
        split: Split,
        config: Config,
        run: _Run,
        *,
        profiler: StepProfiler | None = None,
        start: CooccurrenceNetwork | None = None,
        origin: str | None = None,
    ) -> MetaRec:
        """Train ``model`` as ``config`` says, or go on with it, then what stands beside it, from ``start`` if given."""
        started = time.perf_counter()
        trainer = EncoderTrainer(
            model,
            sources,
            split,
            config,
            folder=run.checkpoint("encoder"),
            origin=origin,
            reporter=run.reporter,
            should_stop=run.should_stop,
            profiler=profiler,
        )
        if run.resume:
            trainer.restore()
        if run.folder is not None:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.folder / "config.json", config.to_json().encode())
        if config.train.compile:
            model.compile_encoder()
        trainer.run()
        trainer.save()
        trained = cls(model, split, config, history=trainer.history())
        if config.model.cooccurrence == "transitions":
            trained._choose_cooccurrence_weight()
        elif config.model.cooccurrence == "learned":
            trained._train_cooccurrence(sources, run, start=start, origin=origin)
        trained.history.seconds = time.perf_counter() - started
        return trained

    def _or_target_only(self, run: _Run, sources: Sequence[str]) -> MetaRec:
        """This model, or the target-only one of the same budget if this one is not better on validation."""
        config = self.config.replace(train={"method": "target_only"})
        if run.reporter is not None:
            run.reporter.begin(METHODS["target_only"])
        alone = self._train(build(config, [self.split]), {}, self.split, config, run.inside("target_only"))
        report = self.report_transfer(alone, sources, replaces=True)
        chosen = self if report["returned"] == "transferred" else alone
        chosen.history = dataclasses.replace(
            chosen.history,
            transfer=self.history.transfer,
            transfer_report=report,
            seconds=self.history.seconds + alone.history.seconds,
            # of both: what is returned need not be what had them
            skipped_steps=self.history.skipped_steps + alone.history.skipped_steps,
        )
        return chosen

    def report_transfer(self, alone: MetaRec, sources: Sequence[str], *, replaces: bool = False) -> dict[str, Any]:
        """What this model's sources gave over ``alone``, trained without them: see ``report.transfer``."""
        codes = None
        if self.config.model.vq != "none":
            codes = {name: self.model.codes(name).cpu().numpy() for name in (*sources, self.domain.name)}
        return transfer_report(
            self.evaluate("valid"),
            alone.evaluate("valid"),
            method=self.config.train.method,
            sources=sources,
            mixtures={"transferred": self._mixture(), "target_only": alone._mixture()},
            left_out={"transferred": self.history.to_dict(), "target_only": alone.history.to_dict()},
            trace=self.history.transfer,
            cooccurrence=self.history.to_dict().get("cooccurrence"),
            codes=codes,
            codebook_size=self.config.model.codebook_size,
            replaces=replaces,
        )

    def _mixture(self) -> dict[str, Any]:
        """What scores are made of."""
        return {"beside": self.config.model.cooccurrence, **dataclasses.asdict(self.weights)}

    def _train_cooccurrence(
        self, sources: dict[str, Split], run: _Run, *, start: CooccurrenceNetwork | None, origin: str | None
    ) -> None:
        """Train the co-occurrence scorer, and mix it with the encoder by maximum likelihood of the validation targets.

        Statistics leave out the users of the cases, as they will leave out later users.
        """
        trainer = CooccurrenceTrainer(
            sources,
            self.split,
            self.config,
            start=start,
            folder=run.checkpoint("cooccurrence"),
            origin=origin,
            reporter=run.reporter,
            should_stop=run.should_stop,
        )
        if run.resume:
            trainer.restore()
        trainer.run()
        trainer.save()
        self.cooccurrence = trainer.result
        self.history.cooccurrence = found = trainer.history()
        self.history.skipped_steps += found.skipped_steps
        self.history.stages_not_run += found.stages_not_run
        self.history.skipped_by_stage |= found.skipped_by_stage
        self.model.eval()
        encoder = ModelScorer(self.model, self.domain.name)
        scored_cases = [
            (CooccurrenceScorer(self.cooccurrence.scorer, known), cases)
            for known, cases in trainer.validation_cases
            if len(cases)
        ]
        fitted = fit_mixture(
            [(ScoreMixture(encoder, path), cases) for path, cases in scored_cases], catalogue=trainer.catalogue
        )
        self.weights = fitted.weights()
        self.history.mixture = MixtureHistory(
            **dataclasses.asdict(self.weights),
            fitted={"encoder": fitted.encoder, "cooccurrence": fitted.cooccurrence},
            validation_loss={"cooccurrence": fitted.cooccurrence_loss, "mixture": fitted.loss},
        )

    def _choose_cooccurrence_weight(self) -> None:
        """How much the domain's own transitions count beside the encoder: whatever validation likes best."""
        self.cooccurrence = TransitionTerms(self.split.train)
        tried, catalogue = {}, choice_catalogue(self.split, self.config.data.catalogue)
        for weight in TRANSITION_WEIGHTS:
            self.weights = MixtureWeights(1.0, weight)
            metrics = evaluate(
                self.scorer(),
                self.split.valid,
                mask_history=self.config.data.mask_history,
                protocol=f"{self.split.protocol}; valid",
                catalogue=catalogue,
            )
            tried[weight] = metrics.ndcg[10]
        chosen = max(tried, key=lambda weight: (tried[weight], -weight))
        self.weights = MixtureWeights(1.0, chosen)
        self.history.transition_weight = TransitionWeight(chosen, {str(w): ndcg for w, ndcg in tried.items()})

    def scorer(self, *, cooccurrence: bool = True) -> Scorer:
        """Scores over the target's catalogue; ``cooccurrence=False`` leaves what stands beside the encoder out."""
        self.model.eval()
        beside = self.cooccurrence if cooccurrence else None
        return ScoreMixture(ModelScorer(self.model, self.domain.name), beside, weights=self.weights)

    def evaluate(
        self,
        split: Literal["valid", "test"] = "test",
        *,
        mask_history: bool | None = None,
        cooccurrence: bool = True,
        catalogue: Catalogue | None = None,
    ) -> Metrics:
        """Full ranking of every case of the target's split; ties count as their expectation.

        catalogue: "training" ranks the items that training events hold, a target outside them is a miss and counted
            (``outside``), and ``among_all`` has the figures among all items; "all" ranks every item of the domain, also
            those known from held-out events alone. By default ``config.data.catalogue``.
        """
        check_choice(split, "split", ("valid", "test"))
        check_flag(cooccurrence, "cooccurrence")
        return evaluate(
            self.scorer(cooccurrence=cooccurrence),
            getattr(self.split, split),
            mask_history=self.config.data.mask_history if mask_history is None else mask_history,
            protocol=f"{self.split.protocol}; {split}",
            catalogue=self.split.candidates(self.config.data.catalogue if catalogue is None else catalogue),
            among_all=True,
        )

    def recommend(
        self,
        users: Iterable[Any] | None = None,
        *,
        histories: Iterable[Sequence[Any]] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        catalogue: Catalogue | None = None,
        on_unknown: Literal["raise", "skip"] = "raise",
    ) -> list[list[tuple[Any, float]]]:
        """The ``k`` best items, with scores, for users of the target domain or for histories of item ids.

        users: the domain's own user ids; all their events are read. histories: item ids, oldest first.
        catalogue: "training" recommends items of training events alone, so that there may be fewer than ``k``; "all"
            every item of the domain, also those of which nothing was learned. By default ``config.data.catalogue``.
        on_unknown: "raise", or "skip" with a warning: an unknown user has no items, a history goes without its unknown
            ones and has none if it knows no other.
        Of equal scores the item of the lower number comes first. Memory: a batch of users and the results.
        Raises ValueError for unknown ids, by their places, unless exactly one of users and histories is given, and for
        scores that are not finite.
        """
        if (users is None) == (histories is None):
            raise ValueError("recommend needs either users or histories, and not both")
        k = check_count(k, "k", POSITIVE_COUNT)
        check_flag(exclude_seen, "exclude_seen")
        check_choice(on_unknown, "on_unknown", ("raise", "skip"))
        queried = None if users is None else id_list("users", users)
        if queried is not None:
            known = self._known(
                self.domain.users, [(f"users[{i}]", user) for i, user in enumerate(queried)], on_unknown
            )
            places = np.flatnonzero(known >= 0)
            rows = [self.domain.sequences[u] for u in known[places]]
            results: list[list[tuple[Any, float]]] = [[] for _ in queried]
            queried = [queried[place] for place in places]
        else:
            given = [id_list(f"histories[{i}]", history) for i, history in enumerate(id_list("histories", histories))]
            named = [
                (f"histories[{i}][{j}]", item) for i, history in enumerate(given) for j, item in enumerate(history)
            ]
            ends = np.cumsum([len(history) for history in given], dtype=np.int64)
            rows = [
                found[found >= 0] for found in np.split(self._known(self.domain.items, named, on_unknown), ends)[:-1]
            ]
            places = [i for i, (row, history) in enumerate(zip(rows, given, strict=True)) if len(row) or not history]
            rows = [rows[place] for place in places]
            results = [[] for _ in given]
        if not rows:
            return results
        read = Sequences(
            offsets=np.concatenate(([0], np.cumsum([len(r) for r in rows]))).astype(np.int64),
            items=np.concatenate(rows).astype(np.int64),
            num_items=self.domain.num_items,
        )
        found = top_k_items(
            self.scorer(),
            read,
            k=k,
            exclude_seen=exclude_seen,
            catalogue=self.split.candidates(self.config.data.catalogue if catalogue is None else catalogue),
        )
        try:
            for place, (items, scores) in zip(places, found, strict=True):
                results[place] = list(zip(self.domain.items.decode(items), scores.tolist(), strict=True))
            return results
        except NonFiniteScoresError as error:
            who = f"history {places[error.case]}" if queried is None else f"user {queried[error.case]!r}"
            raise ValueError(f"{who}: {error}") from error

    @staticmethod
    def _known(ids: Vocabulary, named: list[tuple[str, Any]], on_unknown: str) -> np.ndarray:
        """Numbers of ids, each with its place in words: int64 [n], -1 for those that are left out."""
        found = ids.find([value for _, value in named])
        unknown = [named[i] for i in np.flatnonzero(found < 0)]
        if unknown:
            listed = ", ".join(f"{ids.unknown(value)} at {place}" for place, value in unknown[:MOST_NAMED])
            if len(unknown) > MOST_NAMED:
                listed += f" and {len(unknown) - MOST_NAMED:,} more"
            if on_unknown == "raise":
                raise ValueError(f"{listed}; on_unknown='skip' goes on without")
            warnings.warn(f"{listed}: left out", RuntimeWarning, stacklevel=3)
        return found

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the shared parameters, the target's table and the target's domain: safetensors and JSON only.

        Source tables stay behind. The folder comes into being whole, or not at all.
        overwrite: replace the model that it may hold, which stays whole until the new one is. Files in it that are no
            model's stay.
        Raises ValueError for a folder that holds a model already, or other files; OSError where it cannot be written.
        """
        index = self.model.domains.index(self.domain.name)
        parts: dict[str, torch.nn.Module] = {"shared": self.model.shared, "table": self.model.tables[index]}
        if isinstance(self.cooccurrence, CooccurrenceScorer):
            parts["cooccurrence"] = self.cooccurrence.scorer
        manifest = {
            "config": dataclasses.asdict(self.config),
            "weights": dataclasses.asdict(self.weights),
            "history": self.history.to_dict(),
        }
        save_model(folder, parts, self.domain, manifest, overwrite=overwrite)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, verify: bool = True) -> MetaRec:
        """Load what ``save_pretrained`` wrote. Nothing that is loaded can run code.

        verify: read every byte and compare checksums.
        Raises ValueError, naming file and field, if the folder is incomplete, damaged or of another format.
        """
        loaded = load_model(folder, verify=verify)
        config = loaded.config
        with torch.device("meta"):
            model = Recommender(config.model, {loaded.domain.name: loaded.domain.num_items})
        model.shared, model.tables[0] = loaded.parts["shared"], loaded.parts["table"]
        split = split_domain(loaded.domain, config, fraction=config.data.target_fraction)
        cooccurrence = None
        if "cooccurrence" in loaded.parts:
            cooccurrence = CooccurrenceScorer(loaded.parts["cooccurrence"].eval(), CooccurrenceStatistics(split.train))
        elif config.model.cooccurrence == "transitions":
            cooccurrence = TransitionTerms(split.train)
        weights, history = MixtureWeights(**loaded.manifest["weights"]), History.from_dict(loaded.manifest["history"])
        return cls(model.eval(), split, config, cooccurrence=cooccurrence, weights=weights, history=history)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Where a run is kept, what it reports to and what may stop it."""

    folder: Path | None
    resume: bool
    reporter: Reporter | None
    should_stop: Callable[[], bool]

    def inside(self, name: str) -> _Run:
        """Another run, in a folder of this one."""
        return dataclasses.replace(self, folder=self.folder / name if self.folder is not None else None)

    def checkpoint(self, objective: str) -> Path | None:
        return self.folder / run_folder.CHECKPOINTS[objective] if self.folder is not None else None

    def refuse(self, overwrite: bool) -> None:
        """Raises ValueError, before any work, for a folder that holds a run which is neither to go on nor to go."""
        check_flag(self.resume, "resume")
        check_flag(overwrite, "overwrite")
        if self.resume and self.folder is None:
            raise ValueError("resume=True needs run_dir, the folder of the run to go on with, got None")
        if self.folder is not None:
            run_folder.refuse(self.folder, resume=self.resume, overwrite=overwrite)

    def claimed(
        self,
        command: str,
        config: Config,
        sources: Sequence[Domain],
        target: Domain,
        *,
        overwrite: bool,
        method: str | None = None,
    ) -> AbstractContextManager[None]:
        """The folder, for this run alone: see ``train.run_folder``."""
        if self.folder is None:
            return nullcontext()
        data = run_folder.data_of(sources, target, config)
        method = config.train.method if method is None else method
        return run_folder.claimed(self.folder, command, method, data, resume=self.resume, overwrite=overwrite)

    def keep(self, model: MetaRec) -> None:
        """Write the model and the transfer report, if there is a folder and a report."""
        if self.folder is not None:
            model.save_pretrained(self.folder / "model", overwrite=True)
            write_report(model, self.folder)


def write_report(model: MetaRec, folder: Path) -> None:
    """``report.html`` from the transfer report of a model that has one."""
    report = model.history.transfer_report
    if report is not None:
        text = html(report, title=f"Transfer to {model.domain.name}")
        write_atomically(folder / "report.html", text.encode())


def build(config: Config, splits: Sequence[Split], *, shared: SharedEncoder | None = None) -> Recommender:
    """A recommender at its start: tables from noise or structure, codes from the tables.

    shared: what to take over instead of codes and encoder of its own; tables are then aligned to its domains.
    """
    torch.manual_seed(config.train.seed)
    model = Recommender(config.model, {s.domain.name: s.domain.num_items for s in splits})
    if shared is not None:
        model.shared.load_state_dict(shared.state_dict())
    if config.model.init != "random":
        for split in splits:
            model.init_table(split.domain.name, split.train, seed=config.train.seed)
    if shared is None:
        model.init_codebook(model.domains, seed=config.train.seed)
    return model.to(config.train.device)


def baseline_row(split: Split, *, mask_history: bool, catalogue: Catalogue = "training") -> Row:
    """The best untrained baseline by validation, at test; both among the items of ``catalogue``."""
    name, scorer, _ = best_baseline(split, mask_history=mask_history, catalogue=catalogue)
    metrics = evaluate(
        scorer,
        split.test,
        mask_history=mask_history,
        protocol=f"{split.protocol}; test",
        catalogue=split.candidates(catalogue),
        among_all=True,
    )
    return Row(name, metrics, trained=False)


METHODS = {
    "target_only": "target only",
    "pretrain": "pretrain, then fine-tune",
    "joint": "joint training",
    "metarec": "MetaRec",
}


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for none, one twice, or one that does not exist: before any is trained."""
    if isinstance(methods, str):
        raise ValueError(f"methods must be a list of methods, got the string {methods!r}")
    methods = tuple(check_choice(method, f"methods[{i}]", METHODS) for i, method in enumerate(methods))
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be at least one and all different, got {', '.join(methods) or 'none'}")
    return methods


def compare(
    sources: Sequence[Domain],
    target: Domain,
    *,
    config: Config | None = None,
    methods: Sequence[str] = ("target_only", "pretrain", "metarec"),
    run_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    profiler: StepProfiler | None = None,
) -> tuple[list[Row], dict[str, MetaRec]]:
    """Train several methods on the same split and budget: rows for a table, untrained baseline first, and the models.

    run_dir: one folder a method; resume and overwrite as for ``fit``.
    Every model is chosen by validation; the figures are of the test cases.
    With "target_only" among the methods, every other keeps the model it made, and its transfer report is against that
    row; without, ``train.compare_target_only`` counts as in ``fit``. Ctrl-C and progress are as there.
    """
    config = checked_config(config, Config())
    check_device(config)
    methods = check_methods(methods)
    sources, target = check_domains(sources, target)
    own = "target_only" in methods
    if own:
        config = config.replace(train={"compare_target_only": False})
    with _watched("compare", (target, *sources), run_dir, progress, reporter, should_stop) as (reporter, should_stop):
        run = _Run(run_path(run_dir), resume, reporter, should_stop)
        run.refuse(overwrite)
        split = split_domain(target, config, fraction=config.data.target_fraction)
        baseline = baseline_row(split, mask_history=config.data.mask_history, catalogue=config.data.catalogue)
        with run.claimed("compare", config, sources, target, overwrite=overwrite, method=", ".join(methods)):
            rows, models = _fit_each(sources, target, config, methods, run, profiler, overwrite=overwrite)
            for method, model in models.items() if own else ():
                if method != "target_only":
                    names = [source.name for source in sources]
                    model.history.transfer_report = model.report_transfer(models["target_only"], names)
                    run.inside(method).keep(model)
        return [baseline, *rows], models


def _fit_each(
    sources: Sequence[Domain],
    target: Domain,
    config: Config,
    methods: Sequence[str],
    run: _Run,
    profiler: StepProfiler | None,
    *,
    overwrite: bool,
) -> tuple[list[Row], dict[str, MetaRec]]:
    rows, models = [], {}
    for method in methods:
        if run.reporter is not None:
            run.reporter.begin(METHODS[method])
        if profiler is not None:
            profiler.begin(METHODS[method])
        model = MetaRec.fit(
            sources,
            target,
            config=config.replace(train={"method": method}),
            run_dir=run.inside(method).folder,
            resume=run.resume,
            overwrite=overwrite,
            progress=False,
            reporter=run.reporter,
            should_stop=run.should_stop,
            profiler=profiler,
        )
        models[method] = model
        replaced = model.config.train.method != method
        name = f"{METHODS[method]} (target only returned)" if replaced else METHODS[method]
        rows.append(Row(name, model.evaluate(), seconds=model.history.seconds))
    return rows, models
