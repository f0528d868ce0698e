"""What the API takes: domains, a configuration, ids and folders, checked by name before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarec_fast.config import Config
from metarec_fast.data import Domain, Sequences, Split, leave_one_out, limit_users, time_cut


def split_domain(domain: Domain, config: Config, *, fraction: float = 1.0) -> Split:
    """The split that ``config.data`` describes."""
    split = time_cut(domain) if config.data.split == "time" else leave_one_out(domain)
    return limit_users(split, fraction, seed=config.train.seed) if fraction < 1 else split


def check_domains(sources: Any, target: Any) -> tuple[list[Domain], Domain]:
    """Raises TypeError for what is no Domain, with what makes one of it."""
    if isinstance(sources, Domain):
        sources = [sources]
    elif (
        isinstance(sources, (str, bytes, os.PathLike, Mapping)) or not isinstance(sources, Iterable) or _table(sources)
    ):
        raise TypeError(f"sources must be Domains, {_no_domain(sources)}")
    sources = list(sources)
    for i, source in enumerate(sources):
        if not isinstance(source, Domain):
            raise TypeError(f"sources[{i}] must be a Domain, {_no_domain(source)}")
    if not isinstance(target, Domain):
        raise TypeError(f"target must be a Domain, {_no_domain(target)}")
    return sources, target


def _table(value: object) -> bool:
    """Whether ``value`` is a data frame, of whatever library."""
    return hasattr(type(value), "columns") and type(value).__module__.split(".")[0] not in ("metarec_fast", "builtins")


def _no_domain(value: object) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"got the path {os.fspath(value)!r}; mf.read makes one of a file, mf.load_domain of an imported folder"
    if _table(value):
        library = type(value).__module__.split(".")[0]
        return (
            f"got a {type(value).__name__} of {library}; write it to a Parquet or CSV file with columns of users, "
            "items and times, and mf.read that"
        )
    if isinstance(value, Sequences):
        return "got Sequences; Domain(name, sequences, users, items) adds a name and the ids"
    return f"got {type(value).__name__}; mf.read makes one of a file"


def checked_config(config: Config | None, default: Config) -> Config:
    if config is None:
        return default
    if not isinstance(config, Config):
        raise TypeError(
            f"config must be a Config, got {type(config).__name__}: Config.load(path) and Config() make one"
        )
    return config


def check_device(config: Config) -> None:
    """Raise ValueError if this machine lacks the device; a configuration alone may name it, and be loaded elsewhere."""
    device = torch.device(config.train.device)
    if device.type == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(f"train.device is {config.train.device!r}, and no CUDA device is available; use 'cpu'")
    if (device.index or 0) >= count:
        raise ValueError(f"train.device is {config.train.device!r}, and the last CUDA device is 'cuda:{count - 1}'")


def check_splits(sources: dict[str, Split], target: Split, config: Config) -> None:
    """Raises ValueError, by the name of the domain, for a split that cannot be trained on or chosen by."""
    for one in (*sources.values(), target):
        if not (one.train.lengths >= 2).any():
            raise ValueError(f"domain {one.domain.name!r} has no user with two training events ({one.protocol})")
    if not len(target.valid):
        raise ValueError(
            f"domain {target.domain.name!r} has no validation case, by which the model is chosen ({target.protocol})"
        )
    users = int((target.train.lengths > 0).sum())
    if config.model.cooccurrence == "learned" and users < 2:
        raise ValueError(
            f"model.cooccurrence='learned' needs two users with training events, and domain {target.domain.name!r} has "
            f"{users}; 'transitions' and 'none' need one"
        )


def id_list(name: str, given: Iterable[Any]) -> list[Any]:
    """As a list. Raises TypeError for a single id."""
    single = isinstance(given, (str, bytes)) or not isinstance(given, Iterable)
    if single or (isinstance(given, np.ndarray) and not given.ndim):
        raise TypeError(f"{name} must be a list, got the single {type(given).__name__} {given!r}")
    return given.tolist() if isinstance(given, np.ndarray) else list(given)


def run_path(run_dir: str | Path | None) -> Path | None:
    if run_dir is not None and not os.fspath(run_dir):
        raise ValueError("run_dir must name a folder, got an empty string; '.' is the current one")
    return None if run_dir is None else Path(run_dir)
