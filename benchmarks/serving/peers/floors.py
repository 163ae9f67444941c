"""Floors: what Python can do with a thread and sockets, with aiohttp, and what the client alone can ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from serving import wire
from serving.models import Array, Model
from serving.peers.base import APPS, Peer, Starter, app_environment
from serving.server import Launch, free_port
from serving.venvs import RUNTIME, Environment

ENVIRONMENT = Environment("floors", (*RUNTIME, "aiohttp==3.14.5"))


def _launch(script: str, *options: str) -> Starter:
    def launch(work: Path, models: Sequence[Model]) -> Launch:
        port = free_port()
        command: list[str | Path] = [ENVIRONMENT.python, APPS / script, str(port), *options]
        return Launch(command, port, app_environment(models))

    return launch


def _request(model: Model) -> bytes:
    return wire.post(f"/v2/models/{model.name}/infer", model.row.tobytes(), "application/octet-stream")


def _decode(answer: wire.Answer, model: Model) -> Array:
    return np.frombuffer(answer.body, dtype="<f4").reshape(model.answer.shape)


def _floor(name: str, package: str, launch: Starter) -> Peer:
    return Peer(name, ENVIRONMENT, package, launch, _request, _decode, is_floor=True)


RAW = _floor("raw", "onnxruntime", _launch("raw_app.py"))
AIOHTTP = _floor("aiohttp", "aiohttp", _launch("aiohttp_app.py"))
ECHO = _floor("client", "numpy", _launch("raw_app.py", "--echo"))
