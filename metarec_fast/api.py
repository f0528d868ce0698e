"""MetaRec: fit, evaluate, recommend, save, load. Everything the command line does goes through here."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metarec_fast.config import Config
from metarec_fast.data import Domain, Sequences, Split, leave_one_out, limit_users, load_domain, save_domain, time_cut
from metarec_fast.evaluation import Metrics, best_floor, evaluate
from metarec_fast.models.recommender import Recommender
from metarec_fast.models.scorer import ModelScorer, TransitionEvidence
from metarec_fast.report.table import Row
from metarec_fast.train.checkpoint import write_atomically
from metarec_fast.train.profile import StepProfiler
from metarec_fast.train.trainer import Reporter, Trainer

FORMAT = 1  # of the saved folder
EVIDENCE_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def split_domain(domain: Domain, config: Config, *, fraction: float = 1.0) -> Split:
    """The split that ``config.data`` asks for."""
    split = time_cut(domain) if config.data.split == "time" else leave_one_out(domain)
    return limit_users(split, fraction, seed=config.train.seed) if fraction < 1 else split


class MetaRec:
    """A recommender of one target domain, trained with the help of source domains.

    Made by ``fit`` or ``from_pretrained``. ``model`` is the torch module, ``split`` the target's split, ``config``
    every option, ``history`` what training found out: similarities and weights of the sources over time among it.
    """

    def __init__(
        self,
        model: Recommender,
        split: Split,
        config: Config,
        *,
        evidence_weight: float = 0.0,
        history: dict | None = None,
    ) -> None:
        self.model, self.split, self.config = model, split, config
        self.evidence_weight = evidence_weight
        self.evidence = TransitionEvidence(split.train) if evidence_weight else None
        self.history = history or {}

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
        reporter: Reporter | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        profiler: StepProfiler | None = None,
    ) -> MetaRec:
        """Train on ``sources`` and ``target``; the best model by validation NDCG@10 on the target is returned.

        run_dir: receives config, checkpoints and metrics. resume: go on from its checkpoint if it has one.
        should_stop: asked before every step; if true the state is saved and ``Interrupted`` is raised.
        profiler: watches some steps of each stage and tells where their time goes.
        Raises ValueError for domains of one name, a domain without training events, or no source where one is needed.
        """
        config = config or Config()
        sources = [sources] if isinstance(sources, Domain) else list(sources)
        if config.train.method == "target_only":
            sources = []
        elif not sources:
            raise ValueError(f"method {config.train.method!r} needs at least one source domain, got none")
        names = [d.name for d in (*sources, target)]
        if len(set(names)) < len(names):
            raise ValueError(f"domains must have different names, got {', '.join(names)}")
        started = time.perf_counter()
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        splits = {d.name: split_domain(d, config) for d in sources}
        split = split_domain(target, config, fraction=config.data.target_fraction)
        for one in (*splits.values(), split):
            if not (one.train.lengths >= 2).any():
                raise ValueError(f"domain {one.domain.name!r} has no user with two training events ({one.protocol})")
        model = build(config, [*splits.values(), split])
        trainer = Trainer(
            model,
            splits,
            split,
            config,
            folder=Path(run_dir) / "checkpoint" if run_dir is not None else None,
            reporter=reporter,
            should_stop=should_stop,
            profiler=profiler,
        )
        if resume:
            trainer.restore()
        if run_dir is not None:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(run_dir) / "config.json", config.to_json().encode())
        if config.train.compile:
            model.compile_encoder()
        progress = trainer.run()
        fitted = cls(model, split, config)
        fitted.history = {
            "best_validation_ndcg@10": progress.best,
            "best_at": progress.best_at,
            "skipped_steps": progress.skipped,
            "transfer": progress.trace,
        }
        if config.model.transitions:
            fitted._choose_evidence_weight()
        fitted.history["seconds"] = time.perf_counter() - started
        if run_dir is not None:
            trainer.save()
            fitted.save_pretrained(Path(run_dir) / "model")
        return fitted

    def _choose_evidence_weight(self) -> None:
        """How much the domain's own transitions count beside the encoder: whatever validation likes best."""
        self.evidence = TransitionEvidence(self.split.train)
        tried = {}
        for weight in EVIDENCE_WEIGHTS:
            self.evidence_weight = weight
            tried[weight] = self.evaluate("valid").ndcg[10]
        self.evidence_weight = max(tried, key=lambda weight: (tried[weight], -weight))
        self.history["evidence_weight"] = {
            "chosen": self.evidence_weight,
            "validation_ndcg@10": {str(weight): ndcg for weight, ndcg in tried.items()},
        }

    def scorer(self, *, transitions: bool = True) -> ModelScorer:
        """Scores over the target's catalogue; ``transitions=False`` leaves the domain's transition evidence out."""
        self.model.eval()
        weight = self.evidence_weight if transitions else 0.0
        return ModelScorer(self.model, self.domain.name, evidence=self.evidence, evidence_weight=weight)

    def evaluate(
        self, split: Literal["valid", "test"] = "test", *, mask_history: bool | None = None, transitions: bool = True
    ) -> Metrics:
        """Full ranking of every case of the target's split; ties count as their expectation."""
        if split not in ("valid", "test"):
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        return evaluate(
            self.scorer(transitions=transitions),
            getattr(self.split, split),
            mask_history=self.config.data.mask_history if mask_history is None else mask_history,
            protocol=f"{self.split.protocol}; {split}",
        )

    @torch.no_grad()
    def recommend(
        self,
        users: Iterable[Any] | None = None,
        *,
        histories: Iterable[Sequence[Any]] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
    ) -> list[list[tuple[Any, float]]]:
        """The ``k`` best items, with scores, for users of the target domain or for histories of item ids.

        users: the domain's own user ids; all their events are read. histories: item ids, oldest first.
        Raises ValueError for unknown ids, or unless exactly one of users and histories is given.
        """
        if (users is None) == (histories is None):
            raise ValueError("recommend needs either users or histories, and not both")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if users is not None:
            rows = [self.domain.sequences[u] for u in self.domain.users.encode(list(users))]
        else:
            rows = [self.domain.items.encode(list(history)) for history in histories]
        if not rows:
            return []
        read = Sequences(
            offsets=np.concatenate(([0], np.cumsum([len(r) for r in rows]))).astype(np.int64),
            items=np.concatenate(rows).astype(np.int64),
            num_items=self.domain.num_items,
        )
        score_tile, V, tile = self.scorer().prepare(read), self.domain.num_items, 65536
        best: Tensor | None = None
        ids: Tensor | None = None
        for begin in range(0, V, tile):
            scores = score_tile(begin, min(begin + tile, V)).to("cpu", copy=True)
            if exclude_seen:
                for row, seen in enumerate(rows):
                    inside = seen[(seen >= begin) & (seen < begin + tile)] - begin
                    scores[row, torch.as_tensor(inside, dtype=torch.int64)] = float("-inf")
            columns = torch.arange(begin, begin + scores.shape[1]).expand_as(scores)
            pool = scores if best is None else torch.cat((best, scores), 1)
            pool_ids = columns if ids is None else torch.cat((ids, columns), 1)
            best, order = pool.topk(min(k, pool.shape[1]), dim=1)
            ids = pool_ids.gather(1, order)
        assert best is not None and ids is not None
        answers = []
        for scores, items in zip(best.tolist(), ids.numpy(), strict=True):
            kept = [i for i, score in enumerate(scores) if score > float("-inf")]
            decoded = self.domain.items.decode(items[kept])
            answers.append([(item, scores[i]) for item, i in zip(decoded, kept, strict=True)])
        return answers

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the shared parameters, the target's table and the target's domain: safetensors and JSON only.

        Source tables stay behind. The description is written last, so a folder that has one is whole.
        """
        from safetensors.torch import save

        from metarec_fast import __version__

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metarec.json").unlink(missing_ok=True)
        index = self.model.domains.index(self.domain.name)
        tensors = {f"shared.{k}": v.contiguous() for k, v in self.model.shared.state_dict().items()}
        tensors |= {f"table.{k}": v.contiguous() for k, v in self.model.tables[index].state_dict().items()}
        write_atomically(folder / "model.safetensors", save(tensors))
        save_domain(self.domain, folder / "domain")
        facts = {
            "format": FORMAT,
            "config": dataclasses.asdict(self.config),
            "evidence_weight": self.evidence_weight,
            "history": self.history,
            "versions": {"metarec_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        write_atomically(folder / "metarec.json", json.dumps(facts, indent=2).encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MetaRec:
        """Load what ``save_pretrained`` wrote. Nothing that is loaded can run code.

        Raises ValueError if the folder is incomplete or of an unknown format.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "metarec.json").exists():
            raise ValueError(f"{folder} holds no saved model: metarec.json is missing")
        try:
            facts = json.loads((folder / "metarec.json").read_text(encoding="utf-8"))
            if facts.get("format") != FORMAT:
                raise ValueError(f"{folder} has format {facts.get('format')}, this version reads {FORMAT}")
            config = Config.from_json(json.dumps(facts["config"]))
            tensors = load_file(folder / "model.safetensors")
            domain = load_domain(folder / "domain")
            model = Recommender(config.model, {domain.name: domain.num_items})
            model.load_state_dict(
                {k.replace("table.", "tables.0.", 1) if k.startswith("table.") else k: v for k, v in tensors.items()}
            )
            evidence_weight, history = facts["evidence_weight"], facts["history"]
        except (json.JSONDecodeError, KeyError, FileNotFoundError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"saved model in {folder} is damaged: {error}") from error
        split = split_domain(domain, config, fraction=config.data.target_fraction)
        return cls(model.eval(), split, config, evidence_weight=evidence_weight, history=history)


def build(config: Config, splits: Sequence[Split]) -> Recommender:
    """A recommender at its start: tables from noise or structure, codes from the tables."""
    torch.manual_seed(config.train.seed)
    model = Recommender(config.model, {s.domain.name: s.domain.num_items for s in splits})
    if config.model.start == "spectral":
        for split in splits:
            model.start_table(split.domain.name, split.train, seed=config.train.seed)
    model.start_codebook(model.domains, seed=config.train.seed)
    return model.to(config.train.device)


def floor_row(split: Split, *, mask_history: bool) -> Row:
    """The best untrained baseline by validation, at test."""
    name, scorer, _ = best_floor(split, mask_history=mask_history)
    metrics = evaluate(scorer, split.test, mask_history=mask_history, protocol=f"{split.protocol}; test")
    return Row(name, metrics, trained=False)


METHODS = {
    "target_only": "target only",
    "pretrain": "pretrain, then fine-tune",
    "joint": "joint training",
    "metarec": "MetaRec",
}


def compare(
    sources: Sequence[Domain],
    target: Domain,
    *,
    config: Config | None = None,
    methods: Sequence[str] = ("target_only", "pretrain", "metarec"),
    run_dir: str | Path | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    profiler: StepProfiler | None = None,
) -> tuple[list[Row], dict[str, MetaRec]]:
    """Train several methods on the same split and budget: rows for a table, untrained floor first, and the models.

    run_dir: one folder a method. Every model is chosen by validation; the figures are of the test cases.
    """
    config = config or Config()
    split = split_domain(target, config, fraction=config.data.target_fraction)
    rows = [floor_row(split, mask_history=config.data.mask_history)]
    models = {}
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
        if reporter is not None:
            reporter.begin(METHODS[method])
        if profiler is not None:
            profiler.begin(METHODS[method])
        model = MetaRec.fit(
            sources,
            target,
            config=config.replace(train={"method": method}),
            run_dir=Path(run_dir) / method if run_dir is not None else None,
            resume=resume,
            reporter=reporter,
            should_stop=should_stop,
            profiler=profiler,
        )
        models[method] = model
        rows.append(Row(METHODS[method], model.evaluate(), seconds=model.history["seconds"]))
    return rows, models
