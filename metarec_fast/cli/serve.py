"""metarec-fast evaluate and recommend: what a saved model can do."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from rich.table import Table

from metarec_fast.checks import POSITIVE_COUNT, Checked, check_count
from metarec_fast.cli.show import show_rows
from metarec_fast.report.console import plain_console
from metarec_fast.text import printable


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Full-ranking metrics of a saved model."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    split: Literal["valid", "test"] = "test"
    mask_history: bool | None = None
    """Leave the user's history out of the ranking; as in training if not given."""
    catalogue: Literal["training", "all"] | None = None
    """Rank the items of training events, or every item of the domain; as in training if not given."""


def evaluate(command: Evaluate) -> int:
    from metarec_fast.api import METHODS, MetaRec, baseline_row
    from metarec_fast.report.table import Row

    model = MetaRec.from_pretrained(command.model)
    catalogue = command.catalogue or model.config.data.catalogue
    metrics = model.evaluate(command.split, mask_history=command.mask_history, catalogue=catalogue)
    rows = [Row(METHODS[model.config.train.method], metrics)]
    if command.split == "test":
        mask = model.config.data.mask_history if command.mask_history is None else command.mask_history
        rows.insert(0, baseline_row(model.split, mask_history=mask, catalogue=catalogue))
    show_rows(plain_console(), rows, f"{model.domain.name}, {command.split}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Recommend(Checked):
    """The best items for users, or for a history of items."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    users: tuple[str, ...] = ()
    """User ids of the target domain."""
    history: tuple[str, ...] = ()
    """Item ids, oldest first."""
    k: int = 10
    include_seen: bool = False
    catalogue: Literal["training", "all"] | None = None
    """Recommend items of training events, or of every item of the domain; as in training if not given."""
    json: bool = False
    """Print JSON instead of a table."""

    ALIASES: ClassVar[dict[str, str]] = {"histories": "--history", "exclude_seen": "--include-seen"}

    def check(self) -> None:
        check_count(self.k, "k", POSITIVE_COUNT)
        if bool(self.users) == bool(self.history):
            raise ValueError("give either --users or --history, and not both")


def recommend(command: Recommend) -> int:
    from metarec_fast.api import MetaRec

    model = MetaRec.from_pretrained(command.model)
    options = {"k": command.k, "exclude_seen": not command.include_seen, "catalogue": command.catalogue}
    flag, ids = ("--users", model.domain.users) if command.users else ("--history", model.domain.items)
    known, unknown = [], []
    for text in command.users or command.history:
        try:
            (value,) = ids.parse([text])
            ids.encode([value])
            known.append((text, value))
        except ValueError as reason:
            unknown.append(str(reason))
    if not known:
        raise ValueError(f"{flag}: {'; '.join(unknown)}")
    if command.users:
        queries, results = [text for text, _ in known], model.recommend([value for _, value in known], **options)
    else:
        queries, results = ["history"], model.recommend(histories=[[value for _, value in known]], **options)
    if command.json:
        print(json.dumps(dict(zip(queries, results, strict=True)), ensure_ascii=False))
    else:
        table = Table("for", "rank", "item", "score")
        for who, items in zip(queries, results, strict=True):
            for rank, (item, score) in enumerate(items, 1):
                table.add_row(printable(who), str(rank), printable(item), f"{score:.3f}")
        plain_console().print(table)
    for reason in unknown:
        print(f"metarec-fast: {flag}: {printable(reason)}; left out", file=sys.stderr)
    return 1 if unknown else 0
