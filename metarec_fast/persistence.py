"""A saved model: a folder of safetensors and JSON that names its files and their checksums, with its domain in it."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from metarec_fast.checks import check_flag
from metarec_fast.config import Config
from metarec_fast.cooccurrence.scorer import CooccurrenceNetwork
from metarec_fast.data.domain import Domain
from metarec_fast.data.io.folder import load_domain, write_domain
from metarec_fast.files import (
    COUNT,
    FILE,
    FINITE,
    OBJECT,
    SHA256,
    TEXT,
    Damaged,
    Kind,
    check_fields,
    check_file,
    check_format,
    check_seal,
    describe_file,
    now,
    read_json,
    replacing,
    sealed,
    write_atomically,
)
from metarec_fast.models.recommender import ItemTable, SharedEncoder

FORMAT = 5
TENSORS = "model.safetensors"
MODEL_FILES = (TENSORS, "domain/domain.json")  # which names the domain's arrays and their checksums
WEIGHTS = {"encoder": FINITE, "cooccurrence": FINITE}
MODEL_FIELDS = {
    "format": COUNT,
    "target": TEXT,
    "saved": TEXT,
    "config": OBJECT,
    "weights": OBJECT,
    "history": OBJECT,
    "versions": OBJECT,
    "files": OBJECT,
    "checksum": SHA256,
}


def _described(folder: Path) -> str:
    try:
        manifest = read_json(folder, MODEL.last)
        return (
            f"target {manifest['target']!r}, method {manifest['config']['train']['method']}, saved {manifest['saved']}"
        )
    except (ValueError, KeyError, TypeError):
        return "its description cannot be read"


MODEL = Kind(
    "saved model",
    "metarec.json",
    owns=lambda name: name in ("metarec.json", TENSORS, "domain"),
    describe=_described,
)


def _config_of(given: dict[str, Any]) -> Config:
    """The configuration of a saved model. Raises Damaged, naming the option, for one that it cannot have had."""
    where = f"{MODEL.last}: 'config'"
    known = dataclasses.asdict(Config())
    check_fields(given, dict.fromkeys(known, OBJECT), where)
    for section, options in known.items():
        if missing := set(options) - set(given[section]):
            raise Damaged(f"{where} has no {section}.{min(missing)}")
    try:
        return Config.from_json(json.dumps(given))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Damaged(f"{where}: {error}") from error


def save_model(
    folder: str | Path, parts: Mapping[str, nn.Module], domain: Domain, manifest: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Write the tensors of ``parts``, shared, table and perhaps co-occurrence, and the domain; whole, or not at all.

    manifest: config, weights and history, of MODEL_FIELDS.
    Raises as ``files.replacing`` does.
    """
    from safetensors.torch import save

    from metarec_fast import __version__

    check_flag(overwrite, "overwrite")
    versions = {"metarec_fast": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    tensors = {f"{part}.{k}": v.contiguous() for part, module in parts.items() for k, v in module.state_dict().items()}
    with replacing(folder, MODEL, overwrite=overwrite) as partial:
        write_atomically(partial / TENSORS, save(tensors))
        (partial / "domain").mkdir()
        write_domain(domain, partial / "domain")
        files = {name: describe_file(partial / name) for name in MODEL_FILES}
        about = {
            "format": FORMAT,
            "target": domain.name,
            "saved": now(),
            **manifest,
            "versions": versions,
            "files": files,
        }
        write_atomically(partial / MODEL.last, sealed(about))


class Loaded(NamedTuple):
    """What a saved model's folder holds."""

    manifest: dict[str, Any]
    config: Config
    parts: dict[str, nn.Module]
    domain: Domain


def load_model(folder: str | Path, *, verify: bool = True) -> Loaded:
    """The inverse of ``save_model``. verify: read every byte and compare checksums.

    Raises ValueError, naming file and field, if the folder is incomplete, damaged or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_flag(verify, "verify")
    folder = Path(folder)
    if not MODEL.is_in(folder):
        raise ValueError(f"{folder} holds no saved model: {MODEL.last} is missing")
    try:
        manifest = read_json(folder, MODEL.last)
        check_format(manifest, FORMAT, str(folder), older="train again, or load it with the version that saved it")
        check_fields(manifest, MODEL_FIELDS, MODEL.last)
        check_fields(manifest["weights"], WEIGHTS, f"{MODEL.last}: 'weights'")
        check_fields(manifest["files"], dict.fromkeys(MODEL_FILES, OBJECT), f"{MODEL.last}: 'files'")
        for name, described in manifest["files"].items():
            check_fields(described, FILE, f"{MODEL.last}: {name!r} of 'files'")
        config = _config_of(manifest["config"])
        check_seal(manifest, MODEL.last)
        for name, described in manifest["files"].items():
            check_file(folder, name, described, verify=verify)
        try:
            domain = load_domain(folder / "domain", verify=True if verify else "auto")
        except ValueError as error:
            raise Damaged(str(error)) from error
        if domain.name != manifest["target"]:
            raise Damaged(f"{MODEL.last}: 'target' is {manifest['target']!r}, the domain is {domain.name!r}")
        try:
            _check_tensors(folder / TENSORS, config, domain)
            tensors = load_file(folder / TENSORS)
        except SafetensorError as error:
            raise Damaged(f"{TENSORS}: {error}") from error
        parts = _parts(config, domain)
        for part, module in parts.items():
            start = f"{part}."
            module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    except Damaged as error:
        raise ValueError(f"saved model in {folder} is damaged: {error}") from error
    return Loaded(manifest, config, parts, domain)


def _parts(config: Config, domain: Domain) -> dict[str, nn.Module]:
    parts = {"shared": SharedEncoder(config.model), "table": ItemTable(domain.num_items, config.model.dim)}
    if config.model.cooccurrence == "learned":
        parts["cooccurrence"] = CooccurrenceNetwork(hidden=config.cooccurrence.hidden)
    return parts


def _check_tensors(path: Path, config: Config, domain: Domain) -> None:
    """Raises Damaged, by their names, for tensors that a model of these options cannot have; allocates nothing."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        held = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    if config.model.layers > len(held):
        raise Damaged(f"{MODEL.last}: model.layers is {config.model.layers:,}, more than {TENSORS} has tensors")
    try:
        with torch.device("meta"):
            parts = _parts(config, domain)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        raise Damaged(f"{MODEL.last}: no model has these options: {error}") from error
    expected = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    for name, value in expected.items():
        if name not in held:
            raise Damaged(f"{TENSORS} has no {name!r}")
        shape, kind = held[name]
        if shape != tuple(value.shape) or kind not in ("F32", "F64"):
            raise Damaged(f"{TENSORS}: {name!r} is {kind} {shape}, expected F32 {tuple(value.shape)}")
    if extra := sorted(set(held) - set(expected)):
        raise Damaged(f"{TENSORS} has {extra[0]!r}, which a model of these options has not")
