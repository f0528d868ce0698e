"""Checkpoints that are whole or absent: tensors in safetensors, the rest in JSON, written last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "checkpoint.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any], *, step: int) -> None:
    """Write a checkpoint of ``step``; the one before stays valid until the manifest names the new file."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{step}.safetensors"
    write_atomically(folder / name, to_bytes({key: value.contiguous() for key, value in tensors.items()}))
    write_atomically(folder / MANIFEST, json.dumps({"file": name, **facts}, indent=2).encode())
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint in ``folder``, or None if there is none. Raises ValueError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / MANIFEST).exists():
        return None
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return load_file(folder / facts["file"]), facts
    except (json.JSONDecodeError, KeyError, TypeError, FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"checkpoint in {folder} is damaged: {error}") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, *, prefix: str = "optimizer") -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{key}": torch.as_tensor(value) for index, s in state.items() for key, value in s.items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], *, prefix: str = "optimizer"
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
