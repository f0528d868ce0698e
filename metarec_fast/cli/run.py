"""The command ``metarec-fast``: parse, call the API, print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields

import tyro

from metarec_fast import __version__
from metarec_fast.checks import Checked, check_choice, nearest, postponed
from metarec_fast.cli.adapt import Adapt, adapt
from metarec_fast.cli.doctor import Doctor, doctor
from metarec_fast.cli.importing import Import, import_
from metarec_fast.cli.options import flags_of, in_flags
from metarec_fast.cli.serve import Evaluate, Recommend, evaluate, recommend
from metarec_fast.cli.show import show_warning
from metarec_fast.cli.study import AuditTransfer, StudyRun, audit_transfer, study
from metarec_fast.cli.train import Demo, Train, demo, train
from metarec_fast.config import PRESETS, Config
from metarec_fast.text import printable

COMMANDS = {
    "demo": (Demo, demo),
    "import": (Import, import_),
    "train": (Train, train),
    "adapt": (Adapt, adapt),
    "evaluate": (Evaluate, evaluate),
    "recommend": (Recommend, recommend),
    "study": (StudyRun, study),
    "audit-transfer": (AuditTransfer, audit_transfer),
    "doctor": (Doctor, doctor),
}
"""Options and function of each."""


def usage() -> str:
    lines = ["usage: metarec-fast COMMAND [options]   (COMMAND --help lists them)", ""]
    lines += [f"  {name:<14} {options.__doc__}" for name, (options, _) in COMMANDS.items()]
    lines += [
        "",
        f"  train, demo and audit-transfer take --preset {{{','.join(PRESETS)}}} or --config FILE; "
        "other options change those",
    ]
    return "\n".join(lines)


def split_flag(given: str) -> list[str]:
    """``--preset=demo`` as ``--preset demo``; anything else as it is."""
    return given.split("=", 1) if given.startswith(("--preset=", "--config=")) else [given]


def parse(arguments: Sequence[str]) -> object:
    """The command with its options; --preset and --config choose where the options start from."""
    name, rest = arguments[0], list(arguments[1:])
    (command, _), default = COMMANDS[name], None
    if issubclass(command, Config):
        start = PRESETS["demo" if name == "demo" else "default"]()
        rest = [part for given in rest for part in split_flag(given)]
        for flag in ("--preset", "--config"):
            if flag not in rest[:-1]:
                continue
            at = rest.index(flag)
            value = rest[at + 1]
            if flag == "--preset":
                check_choice(value, flag, PRESETS)
            start = PRESETS[value]() if flag == "--preset" else Config.load(value)
            del rest[at : at + 2]
        sections = {f.name: getattr(start, f.name) for f in fields(Config)}
        with postponed():
            default = command(**sections, **({"target": tyro.MISSING} if "target" in flags_of(command) else {}))
    with postponed():  # tyro would tell what is wrong in the words of Python
        made = tyro.cli(command, args=rest, default=default, prog=f"metarec-fast {name}", description=command.__doc__)
    if isinstance(made, Checked):
        made.check()
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where a part failed, 2 for bad input, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold what the terminal's encoding does not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"metarec-fast {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"unknown command {printable(name)!r}{nearest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    options, run = COMMANDS[name]
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            return run(parse(arguments))
        except (ValueError, OSError, ImportError) as error:
            lines = in_flags(str(error), options).split("\n")
            print("metarec-fast: " + "\n".join(map(printable, lines)), file=sys.stderr)
            return 2
        except KeyboardInterrupt:  # while data is read, or the second one
            print("metarec-fast: interrupted", file=sys.stderr)
            return 130
