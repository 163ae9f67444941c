"""Checkpoints: whole or absent, on a full disk too, and whatever damage they took is noticed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from host_trainer import checkpoint
from host_trainer.checkpoint import Snapshot, Store
from host_trainer.errors import ConfigError
from host_trainer.loop import TrainSettings, adamw


def _snapshot(step: int, numbers: int = 4) -> Snapshot:
    model = {"weight": torch.full((numbers,), float(step))}
    return Snapshot(
        step, model, {"weight\texp_avg": torch.ones(numbers)}, {"step": step, "groups": [], "others": {}}
    )


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    """Older ones are deleted after the new one is whole."""
    store = Store(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 15):
        assert store.begin(_snapshot(step)) is None
    assert store.wait() is None
    assert store.steps() == [10, 15]
    assert store.read(15).model["weight"].tolist() == [15.0] * 4
    store.forget_after(10)
    assert store.steps() == [10]


def test_what_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    """A directory that was not renamed yet is left out of the list, and does not disturb the next try."""
    store = Store(tmp_path, keep=2)
    (tmp_path / ".step-000000005.partial").mkdir()
    (tmp_path / ".step-000000005.partial" / "model.safetensors").write_bytes(b"half")
    assert store.steps() == []
    store.write(_snapshot(5))
    assert store.steps() == [5]


def test_what_was_deleted_in_part_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while later checkpoints are forgotten leaves whole ones; the next write clears the rest."""
    store = Store(tmp_path, keep=2)
    for step in (5, 10):
        store.write(_snapshot(step))

    def killed(directory: Path, ignore_errors: bool = False) -> None:
        if directory.exists():
            (directory / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("host_trainer.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.forget_after(5)
    assert store.steps() == [5]
    store.write(_snapshot(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000005", "step-000000010"]
    assert store.read(10).step == 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk: Path) -> None:
    """The failure is told, the older checkpoint stays whole, nothing half-written is left."""
    store = Store(small_disk / "checkpoints", keep=1)
    store.write(_snapshot(1))
    assert store.begin(_snapshot(2, numbers=1 << 19)) is None
    failure = store.wait()
    assert isinstance(failure, OSError)
    assert store.steps() == [1]
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-000000001"]
    assert store.read(1).model["weight"].tolist() == [1.0] * 4
    store.write(_snapshot(3))
    assert store.steps() == [3]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [b"", b"\x80\x04K\x01.", b"x" * 100])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: bytes) -> None:
    """Cut off, overwritten, or a pickle instead: an error that names the directory; nothing is unpickled."""
    store = Store(tmp_path, keep=1)
    store.write(_snapshot(7))
    (tmp_path / "step-000000007" / name).write_bytes(damage)
    with pytest.raises(ConfigError, match="step-000000007 is damaged"):
        store.read(7)


def test_another_model_s_checkpoint_is_refused(tmp_path: Path) -> None:
    """Shapes that do not fit are an error of three lines."""
    store = Store(tmp_path, keep=1)
    model = nn.Linear(3, 2)
    optimizer = adamw(model, TrainSettings(epochs=1, learning_rate=0.1))
    store.write(checkpoint.take(model, optimizer, 1, {}))
    other = nn.Linear(4, 2)
    with pytest.raises(ConfigError, match="does not fit the model"):
        checkpoint.restore(store.read(1), other, adamw(other, TrainSettings(epochs=1, learning_rate=0.1)))


def test_a_snapshot_is_a_copy(tmp_path: Path) -> None:
    """Training goes on while it is written; frozen weights are left out, for they are the model's own."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = adamw(model, TrainSettings(epochs=1, learning_rate=0.1))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    snapshot = checkpoint.take(model, optimizer, 1, {"note": "kept"})
    before = snapshot.model["1.weight"].clone()
    optimizer.step()
    assert torch.equal(snapshot.model["1.weight"], before)
    assert set(snapshot.model) == {"1.weight", "1.bias"}
    assert {name.split("\t")[0] for name in snapshot.optimizer} == {"1.weight", "1.bias"}
    assert json.loads(json.dumps(snapshot.state))["note"] == "kept"
