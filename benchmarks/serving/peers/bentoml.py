"""BentoML with one worker. Batching is on for ``mlp`` alone, where it pays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serving import wire
from serving.models import Array, Model
from serving.peers.base import APPS, Peer, app_environment
from serving.server import Launch, free_port
from serving.venvs import RUNTIME, Environment

ENVIRONMENT = Environment("bentoml", ("bentoml==1.4.40", *RUNTIME))


def _launch(work: Path, models: Sequence[Model]) -> Launch:
    port = free_port()
    command: list[str | Path] = [
        ENVIRONMENT.python, "-m", "bentoml", "serve", "bentoml_app:Service", "--working-dir", APPS,
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    # No reports to the vendor: the benchmark talks to this machine only.
    variables = {**app_environment(models), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(work)}
    return Launch(command, port, variables, work)


def _request(model: Model) -> bytes:
    text = wire.base64_text(model.row)
    body = json.dumps({"x": [text] if model.name == "mlp" else text}).encode()
    return wire.post(f"/{model.name}", body, "application/json")


def _decode(answer: wire.Answer, model: Model) -> Array:
    text = json.loads(answer.body)[0] if model.name == "mlp" else answer.body.decode()
    return wire.from_base64(text, model.answer)


BENTOML = Peer("bentoml", ENVIRONMENT, "bentoml", _launch, _request, _decode)
