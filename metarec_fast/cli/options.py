"""What several commands take, and how the command line spells the options of Python."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from metarec_fast.config import SECTIONS, Config


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a command finds and reads domains."""

    target: str
    """A file, the folder that import made of one, or the name of either in --folder."""
    folder: Path = Path(os.environ.get("METAREC_FAST_DATA", "."))
    """Where named domains lie; METAREC_FAST_DATA sets the default."""
    user: str | None = None
    """Column of user ids; found by its usual names if not given."""
    item: str | None = None
    time: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    """Rows that cannot be read: stop with file, line and reason, or skip and count them."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Where a run is kept."""

    out: Path | None = None
    """Run folder; runs/<target> if not given."""
    resume: bool = False
    """Go on from the run folder's checkpoints."""
    overwrite: bool = False
    """Replace the run that the run folder holds."""


def config_of(command: Config) -> Config:
    return Config(**{f.name: getattr(command, f.name) for f in fields(Config)})


ARGUMENTS = {"run_dir": "out", "sources": "source"}  # of the API, by the commands' names of them


def flags_of(command: type) -> dict[str, str]:
    """How the command line spells the arguments of Python and the options of a configuration."""
    flags = {}
    for field in fields(command):
        if field.name in SECTIONS:
            flags |= {
                f"{field.name}.{one.name}": f"--{field.name}.{one.name}".replace("_", "-")
                for one in fields(SECTIONS[field.name])
            }
        else:
            positional = "Positional" in str(field.type)
            flags[field.name] = field.name.upper() if positional else "--" + field.name.replace("_", "-")
    flags |= {argument: flags[name] for argument, name in ARGUMENTS.items() if name in flags}
    return flags | getattr(command, "ALIASES", {})


def in_flags(message: str, command: type) -> str:
    """An error of the API in the command's words: options of its own, and arguments it has too, by their flags.

    Options are recognised by their section. Names of arguments are often ordinary words: they count with a value (k=3),
    or at the beginning with a requirement (k must be).
    """

    def in_words(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        flag = flags[name]
        if value is None or not flag.startswith("--"):
            return flag if value is None else f"{flag} {value}"
        if value in ("True", "False"):
            return flag if value == "True" else re.sub(r"([\w-]+)$", r"no-\1", flag)
        return f"{flag} {value.strip(chr(39))}"

    flags = flags_of(command)
    options = "|".join(re.escape(name) for name in flags if "." in name)
    arguments = "|".join(re.escape(name) for name in flags if "." not in name)
    value = r"=(?P<value>'[^']*'|[\w.+-]*\w)"
    if options:
        message = re.sub(rf"(?<![\w.-])(?P<name>{options})(?:{value})?(?!\w)", in_words, message)
    if arguments:
        message = re.sub(rf"(?<![\w.'-])(?P<name>{arguments}){value}", in_words, message)
        said = r"(?P<value>(?!))?(?=(\[\d+\])* (must|needs|holds|is given|has)\b)"
        message = re.sub(rf"^(?P<name>{arguments}){said}", in_words, message)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)  # said in both ways: --resume (resume=True)
