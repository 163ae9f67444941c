"""``edgekit train`` and ``edgekit runs``, as a user calls them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from host_testing import EDGEKIT, ONE_THREAD, edgekit

ZOO = """
import numpy as np
from torch import nn

def net():
    return nn.Linear(4, 2)

class Points:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        point = np.random.default_rng(index).normal(size=4).astype(np.float32)
        return {"point": point, "labels": np.int64(point[0] > 0)}
"""
CONFIG = """
run = "runs/first"
[model]
source = "zoo:net"
[data]
train = "zoo:Points"
workers = 0
[optimize]
epochs = 3
batch_size = 16
learning_rate = 0.05
[parallel]
device = "cpu"
[monitor]
every_steps = 1
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data and a configuration, and two runs: of one process and of two."""
    home = tmp_path_factory.mktemp("home")
    (home / "zoo.py").write_text(ZOO)
    (home / "train.toml").write_text(CONFIG)
    for changes in ([], ["run=runs/second", "parallel.processes=2", "optimize.epochs=2"]):
        trained = edgekit("train", "train.toml", *changes, cwd=home)
        assert trained.code == 0, trained.err
        assert trained.out == ""
    return home


def test_runs_are_compared(home: Path) -> None:
    """State, steps, metrics and the settings that differ; the weights are where ``compress`` takes them."""
    first, second = edgekit("runs", "--json", cwd=home).json()
    assert [run["state"] for run in (first, second)] == ["finished", "finished"]
    assert (first["step"], second["step"]) == (12, 8)
    assert first["settings"] == {"optimize.epochs": 3, "parallel.processes": 0}
    assert second["settings"] == {"optimize.epochs": 2, "parallel.processes": 2}
    assert first["metrics"]["train/loss"] > 0
    assert (home / "runs" / "first" / "model" / "model.safetensors").is_file()
    table = edgekit("runs", "runs/first", cwd=home)
    assert "finished" in table.out


def test_two_processes_trained_together(home: Path) -> None:
    """The summary says how many, and each step was taken once."""
    run = home / "runs" / "second"
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["optimize.epoch=1"], 2, "did you mean 'epochs'?"),
        (["data.train=nowhere", "run=runs/third"], 2, "the data nowhere does not exist"),
        (
            ["data.train=nowhere", "run=runs/fourth", "parallel.processes=2"],
            2,
            "the data nowhere does not exist",
        ),
    ],
)
def test_errors_are_three_lines_however_many_processes_there_are(
    home: Path, changes: list[str], code: int, said: str
) -> None:
    """The configuration's and a training process's errors: once, without a traceback."""
    failed = edgekit("train", "train.toml", *changes, cwd=home)
    assert failed.code == code
    assert said in failed.err
    assert len(failed.error_lines()) == 3
    assert "Traceback" not in failed.err


def test_a_directory_without_runs_is_said(tmp_path: Path) -> None:
    """Nothing to list is an error, not an empty table."""
    assert edgekit("runs", cwd=tmp_path).code == 2


@pytest.mark.parametrize("content", ["{}", "[]", "nonsense"])
def test_a_damaged_run_is_named(tmp_path: Path, content: str) -> None:
    """``edgekit runs`` says which file it cannot read, and why."""
    run = tmp_path / "runs" / "broken"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "environment.json").write_text("{}")
    (run / "run.json").write_text(content)
    result = edgekit("runs", cwd=tmp_path)
    assert result.code == 2
    assert len(result.error_lines()) == 3
    assert "run.json" in result.err


def test_ctrl_c_ends_a_run_of_two_processes_with_a_checkpoint(home: Path) -> None:
    """As from a terminal, which tells every process there is, the data workers too: exit code 130."""
    changes = ["run=runs/long", "parallel.processes=2", "optimize.epochs=10000", "data.workers=1"]
    process = subprocess.Popen(
        [EDGEKIT, "train", "train.toml", *changes],
        cwd=home, env={**os.environ, **ONE_THREAD}, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    run = home / "runs" / "long"
    try:
        deadline_s = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text()) < 2000:
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, said.decode()
    assert b"Traceback" not in said
    summary = json.loads((run / "run.json").read_text())
    assert summary["state"] == "interrupted"
    assert (run / "checkpoints" / f"step-{summary['step']:09d}").is_dir()
