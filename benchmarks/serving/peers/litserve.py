"""LitServe with one API and one worker a model. Batching is on for ``mlp`` alone, where it pays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serving import wire
from serving.models import Array, Model
from serving.peers.base import APPS, Peer, app_environment
from serving.server import Launch, free_port
from serving.venvs import RUNTIME, Environment

ENVIRONMENT = Environment("litserve", ("litserve==0.2.19", *RUNTIME))


def _launch(work: Path, models: Sequence[Model]) -> Launch:
    port = free_port()
    batched = [model.name for model in models if model.name == "mlp"]
    command: list[str | Path] = [ENVIRONMENT.python, APPS / "litserve_app.py", str(port), *batched]
    return Launch(command, port, app_environment(models), work)


def _request(model: Model) -> bytes:
    body = json.dumps({"x": wire.base64_text(model.row)}).encode()
    return wire.post(f"/{model.name}", body, "application/json")


def _decode(answer: wire.Answer, model: Model) -> Array:
    return wire.from_base64(json.loads(answer.body)["y"], model.answer)


LITSERVE = Peer("litserve", ENVIRONMENT, "litserve", _launch, _request, _decode)
