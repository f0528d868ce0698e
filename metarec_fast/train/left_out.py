"""Steps left out because something in them is not finite: counted by stage, reported, and limited in number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

IN_A_ROW = 20  # steps of a stage that may be left out one after the other; then the run ends with the reason
MOST_NAMED = 6  # tensors of a message


class NonFiniteTrainingError(ValueError):
    """Training cannot go on: its numbers are not finite, step after step."""


@dataclass
class LeftOut:
    """Counts of steps left out. Plain attributes, so that a checkpoint can hold them.

    by_stage: of each stage that had any. not_run: stages of which every step was left out.
    """

    by_stage: dict[str, int] = field(default_factory=dict)
    in_a_row: int = 0
    not_run: list[str] = field(default_factory=list)

    def took(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def add(self, stage: str, step: int, reason: str) -> int:
        """A step was left out: how many of the stage were, with this one.

        Raises NonFiniteTrainingError with the reason if it is the last of IN_A_ROW.
        """
        self.by_stage[stage] = self.by_stage.get(stage, 0) + 1
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            raise NonFiniteTrainingError(
                f"{self.in_a_row} training steps in a row were left out because they were not finite, the last of them "
                f"step {step} of {stage}: {reason}"
            )
        return self.by_stage[stage]

    def end(self, stage: str, steps: int) -> None:
        """A stage is over, after so many steps."""
        self.in_a_row = 0
        if steps and self.by_stage.get(stage, 0) >= steps:
            self.not_run.append(stage)


def reason(losses: Mapping[str, float], tensors: Mapping[str, Tensor | None]) -> str:
    """What is not finite: losses by domain, then tensors by name, with how many of their rows."""
    found = [f"the loss of {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
    return "; ".join([*found, *not_finite(tensors)]) or "the norm of the gradients is too large for their dtype"


def not_finite(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Of each tensor that is not finite, in words how much of it; of many, the first and how many more there are."""
    found = []
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
        bad = ~values.isfinite()
        if bad.any():
            rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad.reshape(-1)
            found.append(f"{name} is not finite in {int(rows.sum()):,} of {len(rows):,} rows")
    more = len(found) - MOST_NAMED
    return [*found[:MOST_NAMED], f"and {more} more"] if more > 0 else found
