"""Real training processes for the tests, alone or as several that find each other through gloo.

They are forked from a server that has the libraries imported: importing torch anew for each would take most
of the time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "host_trainer.train", "torch.utils.tensorboard", __name__])
HERE = Path(__file__).parent


def settings(run: Path, **changes: Any) -> dict[str, Any]:
    """A small run: 240 samples in steps of 24, so ten an epoch; ``section__key=value`` changes a setting."""
    document: dict[str, Any] = {
        "run": str(run),
        "model": {"source": "training:net"},
        "data": {"train": "training:points", "workers": 0},
        "optimize": {"epochs": 2, "batch_size": 24, "learning_rate": 0.03},
        "parallel": {"device": "cpu"},
        "monitor": {"every_steps": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            document.setdefault(section, {})[name] = value
        else:
            document[section] = value
    return document


def train(document: Mapping[str, Any], processes: int = 1) -> None:
    """Train to the end, or raise what the first process raised."""
    started = start(document, processes)
    for process, _ in started:
        process.join()
    for process, errors in started:
        if process.exitcode:
            raise errors.get() if errors.poll() else RuntimeError(f"exit code {process.exitcode}")


class _Errors:
    def __init__(self) -> None:
        self.reader, self.writer = _CONTEXT.Pipe(duplex=False)

    def poll(self) -> bool:
        return bool(self.reader.poll())

    def get(self) -> BaseException:
        error = self.reader.recv()
        assert isinstance(error, BaseException)
        return error


def start(document: Mapping[str, Any], processes: int = 1) -> list[tuple[BaseProcess, _Errors]]:
    """Start the processes of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        errors = _Errors()
        process = _CONTEXT.Process(
            target=_be, args=(dict(document), rank, processes, port, errors.writer), daemon=True
        )
        process.start()
        started.append((process, errors))
    return started


def _be(document: dict[str, Any], rank: int, world: int, port: int, errors: Any) -> None:
    sys.path.insert(0, str(HERE))
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port),
        }  # fmt: skip
    from host_trainer import config
    from host_trainer.train import train as run

    try:
        run(config.parse(document, "the test"))
    except BaseException as error:
        errors.send(error)
        raise SystemExit(1) from error


def metrics(run: Path, name: str = "train/loss") -> list[float]:
    """A recorded number, step by step."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def weights(run: Path) -> dict[str, Tensor]:
    """What a finished run gave."""
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


# What the runs train: named in configurations as training:NAME.


def net() -> nn.Module:
    """Two repeated blocks and a head; no randomness and no batch statistics inside."""
    block = lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())  # noqa: E731
    return nn.Sequential(nn.Linear(8, 8), block(), block(), nn.Linear(8, 3))


def narrow_net() -> nn.Module:
    """A student for ``net``: as many blocks, half as wide."""
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU())  # noqa: E731
    return nn.Sequential(nn.Linear(8, 4), block(), block(), nn.Linear(4, 3))


def dropping_net() -> nn.Module:
    """The same, with dropout: its steps depend on random numbers."""
    return nn.Sequential(net(), nn.Dropout(0.2))


def deep_net() -> nn.Module:
    """Without normalization; a high learning rate makes its activations explode."""
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 3))


class Points:
    """Noise around three corners; the class is the corner."""

    def __init__(self, count: int = 240, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.labels = generator.integers(0, 3, count)
        corners = np.random.default_rng(7).normal(size=(3, 8)) * 2
        self.points = (corners[self.labels] + generator.normal(size=(count, 8))).astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"point": self.points[index], "labels": self.labels[index]}


def points() -> Points:
    """Training data."""
    return Points()


def held_out() -> Points:
    """Other points, not a multiple of any batch."""
    return Points(37, seed=1)


def nothing() -> Points:
    """Data without a sample."""
    return Points(0)


def four_classes() -> Points:
    """One class more than the nets answer."""
    data = Points()
    data.labels[100] = 3
    return data


def half_labelled() -> list[dict[str, Any]]:
    """Every other sample has no label."""
    data = Points()
    return [{"point": data.points[n], **({"labels": data.labels[n]} if n % 2 else {})} for n in range(240)]


def poisoned() -> Points:
    """One sample holds NaN."""
    data = Points()
    data.points[100, 3] = np.nan
    return data


class SlowPoints(Points):
    """Leaves time to kill the run."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        import time

        time.sleep(0.002)
        return super().__getitem__(index)


def slow_points() -> SlowPoints:
    """Training data, slowly."""
    return SlowPoints()
