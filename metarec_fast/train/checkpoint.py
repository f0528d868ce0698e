"""Checkpoints that are whole or absent: tensors in safetensors, the rest in JSON, written last."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarec_fast.files import (
    COUNT,
    SHA256,
    Damaged,
    Field,
    check_fields,
    check_file,
    check_format,
    check_seal,
    read_json,
    sealed,
    write_atomically,
)

FORMAT = 3
MANIFEST = "checkpoint.json"
STATE = re.compile(r"state-[0-9]+(-again)?\.safetensors")
FIELDS = {
    "format": COUNT,
    "file": Field("state-<step>.safetensors", lambda v: isinstance(v, str) and STATE.fullmatch(v) is not None),
    "bytes": COUNT,
    "sha256": SHA256,
    "checksum": SHA256,
}


def is_in(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def owns(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is the checkpoint's; hidden ones are nobody's."""
    return name == MANIFEST or name.startswith(".") or STATE.fullmatch(name) is not None


def save(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], *, step: int) -> None:
    """Write a checkpoint of ``step``; the one before stays valid until the manifest names the new file.

    manifest: for JSON, under other keys than those of FIELDS.
    """
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    name = f"state-{step}.safetensors"
    if _named(folder) == name:  # a step that is saved again
        name = f"state-{step}-again.safetensors"
    data = to_bytes({key: value.contiguous() for key, value in tensors.items()})
    about = {"format": FORMAT, "file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / name, data)
    write_atomically(folder / MANIFEST, sealed({**about, **manifest}))
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink()


def _named(folder: Path) -> str | None:
    """The file of the checkpoint that is there, if it tells."""
    try:
        return read_json(folder, MANIFEST).get("file")
    except (ValueError, AttributeError):
        return None


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The latest checkpoint in ``folder``, or None if there is none.

    Raises ValueError, naming file and field, if it is damaged or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not is_in(folder):
        return None
    try:
        manifest = read_json(folder, MANIFEST)
        if isinstance(manifest, dict) and "format" not in manifest and "config" in manifest:
            manifest["format"] = 1  # which had none
        advice = "finish it with the version that wrote it, or start again with --overwrite (overwrite=True)"
        check_format(manifest, FORMAT, f"checkpoint in {folder}", older=advice)
        check_fields(manifest, FIELDS, MANIFEST, exact=False)
        check_seal(manifest, MANIFEST)
        tensors = load_file(check_file(folder, manifest["file"], manifest))
        return tensors, {key: value for key, value in manifest.items() if key not in FIELDS}
    except Damaged as error:
        raise ValueError(f"checkpoint in {folder} is damaged: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"checkpoint in {folder} is damaged: {manifest['file']}: {error}") from error


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
