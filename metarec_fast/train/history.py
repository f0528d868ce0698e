"""What the training of a model found out, as ``MetaRec.history`` has it and a saved model keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metarec_fast.meta.signals import StepMetrics


@dataclass
class LeftOutSteps:
    """Training steps left out because a loss or gradient was not finite; stages by the names that reports have."""

    skipped_steps: int = 0
    skipped_by_stage: dict[str, int] = field(default_factory=dict)
    stages_not_run: list[str] = field(default_factory=list)  # of which every step was left out


@dataclass(frozen=True)
class SourceWeight:
    """A source's weight, and its first similarity to the target, with the deviation over initialisations."""

    weight: float
    similarity: float
    deviation: float


@dataclass
class CooccurrenceHistory(LeftOutSteps):
    """Of the co-occurrence scorer alone. validation_loss: [stage, step, loss]. transfer: as of `History`."""

    validation_loss: list[list[Any]] = field(default_factory=list)
    best: float | None = None
    best_at: str = ""
    sources: dict[str, SourceWeight] = field(default_factory=dict)
    transfer: list[StepMetrics] = field(default_factory=list)


@dataclass
class MixtureHistory:
    """Weights of encoder and co-occurrence scorer: as they are used, as fitted to logits, and the losses of both."""

    encoder: float
    cooccurrence: float
    fitted: dict[str, float]
    validation_loss: dict[str, float]


@dataclass
class TransitionWeight:
    """The weight of transitions beside the encoder, and the validation NDCG@10 of every weight tried."""

    chosen: float
    validation_ndcg: dict[str, float]


@dataclass
class History(LeftOutSteps):
    """Of a model. best_validation_ndcg: NDCG@10 of the encoder, after the stage and step ``best_at``.

    transfer: similarities and weights of sources over the encoder's meta stage, as ``meta.signals.keep_trace`` keeps
    them. Left-out steps are those of encoder and co-occurrence scorer. None: not part of this training.
    """

    best_validation_ndcg: float | None = None
    best_at: str = ""
    transfer: list[StepMetrics] = field(default_factory=list)
    seconds: float = 0.0
    cooccurrence: CooccurrenceHistory | None = None
    mixture: MixtureHistory | None = None
    transition_weight: TransitionWeight | None = None
    adapted_from: str | None = None
    transfer_report: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> History:
        """The inverse of ``to_dict``. Raises TypeError for what it cannot have made."""
        history = cls(**given)
        if history.cooccurrence is not None:
            found = CooccurrenceHistory(**history.cooccurrence)
            found.sources = {name: SourceWeight(**weight) for name, weight in found.sources.items()}
            history.cooccurrence = found
        if history.mixture is not None:
            history.mixture = MixtureHistory(**history.mixture)
        if history.transition_weight is not None:
            history.transition_weight = TransitionWeight(**history.transition_weight)
        return history
