"""A checkpoint is whole or absent, whatever happens while it is written."""

import os

import pytest
import torch

from metarec_fast.train import checkpoint

OLD, NEW = {"x": torch.arange(1000.0)}, {"x": torch.arange(1000.0) + 1}


@pytest.mark.parametrize("survive", [0, 1])
def test_a_crash_leaves_the_checkpoint_before(tmp_path, monkeypatch, survive):
    """survive: how many files are put in place before the process dies (tensors first, then the manifest)."""
    checkpoint.save(tmp_path, OLD, {"step": 1}, step=1)
    replace, calls = os.replace, []

    def dying(source, destination):
        calls.append(destination)
        if len(calls) > survive:
            raise OSError("the machine died")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(OSError, match="the machine died"):
        checkpoint.save(tmp_path, NEW, {"step": 2}, step=2)
    monkeypatch.setattr(os, "replace", replace)
    tensors, manifest = checkpoint.load(tmp_path)
    assert torch.equal(tensors["x"], OLD["x"]) and manifest["step"] == 1

    checkpoint.save(tmp_path, NEW, {"step": 2}, step=2)
    tensors, manifest = checkpoint.load(tmp_path)
    assert torch.equal(tensors["x"], NEW["x"]) and manifest["step"] == 2


def test_a_crash_at_the_same_step_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, OLD, {}, step=1)

    def dying(source, destination):
        raise OSError("the machine died")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, NEW, {}, step=1)
    assert torch.equal(checkpoint.load(tmp_path)[0]["x"], OLD["x"])


def test_only_the_latest_is_kept(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, NEW, {}, step=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "state-10.safetensors"]


def test_none_without_a_manifest(tmp_path):
    assert checkpoint.load(tmp_path) is None


def truncate_tensors(folder):
    path = folder / "state-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_manifest(folder):
    path = folder / checkpoint.MANIFEST
    path.write_text(path.read_text()[:-5])


@pytest.mark.parametrize(
    "harm",
    [
        truncate_tensors,
        truncate_manifest,
        lambda folder: (folder / "state-1.safetensors").unlink(),
        lambda folder: (folder / checkpoint.MANIFEST).write_text("{}"),
        lambda folder: (folder / checkpoint.MANIFEST).write_text("[]"),
    ],
    ids=["tensors cut", "manifest cut", "tensors gone", "manifest empty", "manifest of another kind"],
)
def test_damage_is_named(tmp_path, harm):
    checkpoint.save(tmp_path, OLD, {}, step=1)
    harm(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(tmp_path)


def test_optimizer_round_trip(tmp_path):
    def fresh():
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        groups = [{"params": [module.weight], "weight_decay": 0.1}, {"params": [module.bias], "weight_decay": 0.0}]
        return module, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def step(module, optimizer, k):
        optimizer.zero_grad()
        module(torch.full((4, 3), float(k))).square().sum().backward()
        optimizer.step()

    module, optimizer = fresh()
    for k in range(3):
        step(module, optimizer, k)
    checkpoint.save(tmp_path, checkpoint.optimizer_tensors(optimizer), {}, step=3)
    other, restored = fresh()
    other.load_state_dict(module.state_dict())
    checkpoint.restore_optimizer(restored, checkpoint.load(tmp_path)[0])
    for k in range(3, 6):
        step(module, optimizer, k)
        step(other, restored, k)
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)


@pytest.mark.parametrize(
    ("other", "message"),
    [(2, "format 2, this version reads 3: finish it with the version that wrote it"), (99, "a newer version")],
)
def test_another_format_is_refused(tmp_path, monkeypatch, other, message):
    monkeypatch.setattr(checkpoint, "FORMAT", other)
    checkpoint.save(tmp_path, OLD, {"config": {"meta": {"fd_epsilon": 5e-3}}}, step=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)
