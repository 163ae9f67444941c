"""MLServer with a custom runtime. Batching is on for ``mlp`` alone, where it pays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from serving import wire
from serving.models import MAX_BATCH_SIZE, Array, Model
from serving.peers.base import Peer, app_environment
from serving.server import Launch, free_port
from serving.venvs import RUNTIME, Environment

ENVIRONMENT = Environment("mlserver", ("mlserver==1.7.1", *RUNTIME))


def _launch(work: Path, models: Sequence[Model]) -> Launch:
    port = free_port()
    settings = {
        "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port(),
        "metrics_endpoint": None, "parallel_workers": 0, "debug": False,
    }  # fmt: skip
    (work / "settings.json").write_text(json.dumps(settings))
    for model in models:
        directory = work / model.name
        directory.mkdir()
        (directory / "model-settings.json").write_text(json.dumps(_model_settings(model)))
    command: list[str | Path] = [ENVIRONMENT.directory / "bin" / "mlserver", "start", work]
    return Launch(command, port, app_environment(models), work)


def _model_settings(model: Model) -> dict[str, object]:
    settings: dict[str, object] = {
        "name": model.name,
        "implementation": "mlserver_app.OnnxRuntime",
        "parameters": {"uri": str(model.path), "extra": {"shape": list(model.row.shape[1:])}},
    }
    if model.name == "mlp":
        settings |= {"max_batch_size": MAX_BATCH_SIZE, "max_batch_time": 0.001}
    return settings


def _request(model: Model) -> bytes:
    tensor = {"name": "x", "datatype": "BYTES", "shape": [1], "data": [wire.base64_text(model.row)]}
    body = json.dumps({"inputs": [tensor]}).encode()
    return wire.post(f"/v2/models/{model.name}/infer", body, "application/json")


def _decode(answer: wire.Answer, model: Model) -> Array:
    return wire.from_base64(json.loads(answer.body)["outputs"][0]["data"][0], model.answer)


MLSERVER = Peer("mlserver", ENVIRONMENT, "mlserver", _launch, _request, _decode)
