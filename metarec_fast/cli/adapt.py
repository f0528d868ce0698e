"""metarec-fast adapt: a saved model for another domain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from metarec_fast.cli.options import Reading, RunFolder
from metarec_fast.cli.show import load_named, show_how_to_resume, show_rows, show_transfer
from metarec_fast.report.console import ConsoleReporter, plain_console
from metarec_fast.text import file_name, printable


@dataclass(frozen=True, kw_only=True)
class Adapt(RunFolder, Reading):
    """A recommender of another domain from a saved model, without the data of its sources."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model."""
    steps: int | None = None
    """Of the encoder's fine-tuning, at most; as in the model's training if not given, and so for the others."""
    lr: float | None = None
    scope: Literal["gradual", "all", "table"] | None = None
    """table: leave the shared parameters as they are. all: move them from the first step on. gradual: the item table
    alone for half of the steps, then everything. As in the model's training if not given."""
    seed: int | None = None
    threads: int | None = None
    device: str | None = None
    """As in the model's training if not given and it is here; the CPU otherwise."""
    compare_target_only: bool = False
    """Train on the target alone too, with as many steps, and keep what validation likes better."""

    ALIASES: ClassVar[dict[str, str]] = {
        **{f"train.finetune_{name}": f"--{name}" for name in ("steps", "lr", "scope")},
        **{f"train.{name}": f"--{name}" for name in ("seed", "threads", "device")},
    }


def adapt(command: Adapt) -> int:
    from metarec_fast.api import METHODS, MetaRec, baseline_row
    from metarec_fast.inputs import check_device
    from metarec_fast.report.table import Row
    from metarec_fast.train import run_folder
    from metarec_fast.train.stop import Interrupted, StopRequested

    if command.out is not None:
        run_folder.refuse(command.out, resume=command.resume, overwrite=command.overwrite)
    model = MetaRec.from_pretrained(command.model)
    given = {
        "finetune_steps": command.steps,
        "finetune_lr": command.lr,
        "finetune_scope": command.scope,
        "seed": command.seed,
        "threads": command.threads,
        "device": command.device,
    }
    train = {name: value for name, value in given.items() if value is not None}
    if command.steps is not None:
        train["finetune_passes"] = 0.0  # which would ask for more of them
    config = model.adapt_config().replace(train=train)
    check_device(config)
    (target,) = load_named([command.target], command)
    out = command.out or Path("runs") / file_name(target.name)
    console = plain_console()
    with StopRequested() as stop:
        try:
            with ConsoleReporter(log=out / "log.jsonl", console=console) as reporter:
                reporter.begin(f"from {model.domain.name}")
                adapted = model.adapt(
                    target,
                    config=config,
                    compare_target_only=command.compare_target_only,
                    run_dir=out,
                    resume=command.resume,
                    overwrite=command.overwrite,
                    reporter=reporter,
                    should_stop=stop,
                )
        except Interrupted as reason:
            show_how_to_resume(console, reason, out)
            return 130
    name = METHODS[adapted.config.train.method]
    if adapted.history.adapted_from is not None:
        name += f", adapted from {model.domain.name}"
    rows = [
        baseline_row(adapted.split, mask_history=config.data.mask_history, catalogue=config.data.catalogue),
        Row(name, adapted.evaluate(), seconds=adapted.history.seconds),
    ]
    show_rows(console, rows, f"target {target.name}")
    show_transfer(console, adapted, out)
    console.print(f"model: {printable(out / 'model')}", soft_wrap=True)
    return 0
