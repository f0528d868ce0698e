"""What a figure was measured on: the device's name, instruction set, threads, versions and commit."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from metarec_fast import __version__
from metarec_fast.ops import backend_info

RESULTS = Path(__file__).parent / "results"


def cpu_name(cpuinfo: str) -> str | None:
    """Model name with family and model number, as one name may cover several generations ("AMD EPYC")."""
    found = [re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    if found[0] is None:
        return None
    name, family, model = (match[1].strip() if match else None for match in found)
    return name if family is None or model is None else f"{name} family {family} model {model}"


def device_name(device: str) -> str:
    """The processor's or the GPU's model, as its maker calls it, with what tells generations of a processor apart."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        name = cpu_name(Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name or platform.processor() or platform.machine()


def slug(device: str) -> str:
    """``device`` as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def machine(device: str) -> dict[str, Any]:
    info = backend_info()
    return {"device": device_name(device), "isa": info["cpu"]["isa"], "threads": torch.get_num_threads()}


def versions(*packages: str) -> str:
    found = {"metarec_fast": __version__, "python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in ("torch", "numpy", *packages)}
    return " ".join(f"{name}={version}" for name, version in found.items())


def commit() -> str:
    described = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--exclude=*"),
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
