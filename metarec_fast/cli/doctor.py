"""metarec-fast doctor: what runs the operators here."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from rich.table import Table

from metarec_fast import __version__
from metarec_fast.report.console import plain_console
from metarec_fast.text import printable


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What runs the operators here, and whether anything is missing."""


def doctor(command: Doctor) -> int:
    import numpy
    import torch

    table = Table("part", "state", "why")
    table.add_row("metarec_fast", __version__, f"python {platform.python_version()}, numpy {numpy.__version__}")
    table.add_row("torch", torch.__version__, f"{torch.get_num_threads()} threads")
    try:
        from metarec_fast.ops import backend_info

        info = backend_info()
    except (ValueError, ImportError) as error:
        table.add_row("C++ operators", "not usable", printable(error))
        plain_console().print(table)
        print(f"metarec-fast: {printable(error)}", file=sys.stderr)
        return 1
    cpu, gpu = info["cpu"], info["gpu"]
    table.add_row("C++ operators", cpu["isa"], f"{cpu['why']}; supported {', '.join(cpu['supported_isas'])}")
    table.add_row("threads of C++", str(cpu["threads"]), "torch's OpenMP runtime")
    table.add_row("GPU", gpu["device"] or "none", gpu["why"])
    table.add_row("Triton", "installed" if gpu["triton"] else "not installed", "needed for GPU kernels only")
    plain_console().print(table)
    return 0
