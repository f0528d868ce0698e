"""A domain as a folder of safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from metarec_fast.data.domain import Domain, Sequences
from metarec_fast.data.vocabulary import Vocabulary

FORMAT = 1


def save_domain(domain: Domain, folder: str | Path) -> None:
    """Write ``domain`` into ``folder``. The description is written last: a folder that has one is whole."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "domain.json"
    description.unlink(missing_ok=True)
    sequences = domain.sequences
    arrays = {"offsets": sequences.offsets, "items": sequences.items}
    if sequences.times is not None:
        arrays["times"] = sequences.times
    for role, vocabulary in (("users", domain.users), ("items", domain.items)):
        arrays |= {f"{role}.{key}": value for key, value in vocabulary.to_arrays().items()}
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / "domain.safetensors")
    facts = {"format": FORMAT, "name": domain.name, "num_items": sequences.num_items}
    description.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def load_domain(folder: str | Path) -> Domain:
    """Read what ``save_domain`` wrote. Raises ValueError if the folder is incomplete or of an unknown format."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / "domain.json").exists():
        raise ValueError(f"{folder} holds no whole domain: domain.json is missing")
    facts = json.loads((folder / "domain.json").read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {facts.get('format')}, this version reads {FORMAT}")
    try:
        arrays = load_file(folder / "domain.safetensors")
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    vocabularies = [
        Vocabulary.from_arrays({k.removeprefix(role): v for k, v in arrays.items() if k.startswith(role)})
        for role in ("users.", "items.")
    ]
    sequences = Sequences(arrays["offsets"], arrays["items"], facts["num_items"], arrays.get("times"))
    return Domain(facts["name"], sequences, *vocabularies)
