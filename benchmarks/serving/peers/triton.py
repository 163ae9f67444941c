"""Triton from the pytriton wheel: a real tritonserver with its Python backend, in three settings.

The wheel lacks the ONNX Runtime backend, so the Python backend runs the session. gRPC and metrics are off,
which spares it work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from serving import wire
from serving.models import MAX_BATCH_SIZE, Array, Model
from serving.peers.base import APPS, Peer
from serving.server import Launch, free_port
from serving.venvs import ONNXRUNTIME, Environment

# The stub was built for numpy 1; with numpy 2 it reads every tensor's size as zero.
ENVIRONMENT = Environment("triton", (ONNXRUNTIME, "numpy==1.26.4"), alone=("nvidia-pytriton==0.7.0",))
_LINKED = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {rows}
input [{{ name: "x", data_type: TYPE_FP32, dims: {taken} }}]
output [{{ name: "y", data_type: TYPE_FP32, dims: {given} }}]
instance_group [{{ kind: KIND_CPU, count: 1 }}]
parameters {{ key: "path" value: {{ string_value: {path} }} }}
parameters {{ key: "shape" value: {{ string_value: "{taken}" }} }}
{batching}
"""


def _launch(batching: str, work: Path, models: Sequence[Model]) -> Launch:
    backend = _make_backend(work / "backends" / "python")
    for model in models:
        _write_model(work / "models" / model.name, model, batching)
    port = free_port()
    command: list[str | Path] = [
        _wheel() / "bin" / "tritonserver", f"--model-repository={work / 'models'}",
        "--model-control-mode=explicit", *(f"--load-model={model.name}" for model in models),
        f"--backend-directory={backend.parent}", "--http-address=127.0.0.1", f"--http-port={port}",
        "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    libraries = {"LD_LIBRARY_PATH": str(ENVIRONMENT.packages / "nvidia_pytriton.libs")}
    return Launch(command, port, libraries)


def _wheel() -> Path:
    return ENVIRONMENT.packages / "pytriton" / "tritonserver"


def _make_backend(directory: Path) -> Path:
    """Put the backend, the stub of this Python and what the model imports into one directory.

    The stub runs an isolated interpreter, which looks beside the backend and not at PYTHONPATH.
    """
    shutil.copytree(_wheel() / "backends" / "python", directory)
    version = ENVIRONMENT.packages.parent.name.removeprefix("python")
    stub = directory / "triton_python_backend_stub"
    shutil.copy(_wheel() / "python_backend_stubs" / version / stub.name, stub)
    stub.chmod(0o755)
    for name in _LINKED:
        (directory / name).symlink_to(ENVIRONMENT.packages / name)
    (directory / "onnx_models.py").symlink_to(APPS / "onnx_models.py")
    return directory


def _write_model(directory: Path, model: Model, batching: str) -> None:
    (directory / "1").mkdir(parents=True)
    shutil.copyfile(APPS / "triton_model.py", directory / "1" / "model.py")
    taken, given = list(model.row.shape[1:]), list(model.answer.shape[1:])
    config = _CONFIG.format(
        name=model.name, rows=MAX_BATCH_SIZE, taken=taken, given=given, path=json.dumps(str(model.path)),
        batching=batching,
    )  # fmt: skip
    (directory / "config.pbtxt").write_text(config)


def _request(model: Model) -> bytes:
    return wire.oip_infer(model.name, model.row)


def _decode(answer: wire.Answer, model: Model) -> Array:
    return wire.oip_decode(answer)


def _peer(name: str, batching: str) -> Peer:
    launch = partial(_launch, batching)
    return Peer(name, ENVIRONMENT, "nvidia-pytriton", launch, _request, _decode, speaks_oip=True)


PLAIN = _peer("triton", "")
DYNAMIC = _peer("triton-dynamic", "dynamic_batching { }")
DELAY = _peer("triton-1ms", "dynamic_batching { max_queue_delay_microseconds: 1000 }")
