"""What the agent's tests share: small ONNX models, bundles made of them, and the agent as a process."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from device_agent.config import Config
from device_agent.lifecycle import Lifecycle
from device_agent.manifest import (
    MANIFEST_NAME,
    Contract,
    FileEntry,
    Golden,
    Manifest,
    TensorSpec,
    Tolerance,
    dumps,
)
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.signature import Trust
from device_agent.store import Store

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """A model that every ONNX Runtime since 1.16 reads."""
    graph = helper.make_graph(
        list(nodes), "test", [_value(s) for s in inputs], [_value(s) for s in outputs], list(initializers)
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    shape = [f"free_{i}" if size == -1 else size for i, size in enumerate(spec.shape)]
    return helper.make_tensor_value_info(spec.name, ONNX_TYPES[spec.dtype], shape)


def identity(dtype: str, shape: tuple[int, ...] = (-1, 3)) -> onnx.ModelProto:
    """``y`` is ``x``."""
    return make_model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [TensorSpec("x", dtype, shape)],
        [TensorSpec("y", dtype, shape)],
    )


def linear(features: int = 8, classes: int = 4, seed: int = 0) -> onnx.ModelProto:
    """``scores`` is ``relu(x W + b)``."""
    rng = np.random.default_rng(seed)
    weights = numpy_helper.from_array(rng.standard_normal((features, classes)).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.standard_normal(classes).astype(np.float32), "b")
    return make_model(
        [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["scores"])],
        [TensorSpec("x", "FP32", (-1, features))],
        [TensorSpec("scores", "FP32", (-1, classes))],
        [weights, bias],
    )


def session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime directly, with one thread as the tests' agents have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )


@dataclass(frozen=True)
class TestBundle:
    """An unpacked bundle."""

    __test__ = False

    directory: Path
    manifest: Manifest
    digest: str


def specs_of(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a model, as a manifest states them."""
    names = {value: key for key, value in ONNX_TYPES.items()}

    def specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                names[value.type.tensor_type.elem_type],
                tuple(d.dim_value if d.dim_value else -1 for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return specs(model.graph.input), specs(model.graph.output)


def write_bundle(
    directory: Path,
    model: onnx.ModelProto,
    golden_inputs: dict[str, np.ndarray],
    golden_outputs: dict[str, np.ndarray] | None = None,
    tolerance: float = 1e-5,
    **changes: object,
) -> TestBundle:
    """Write an unsigned bundle directory; without ``golden_outputs``, ONNX Runtime computes them."""
    directory.mkdir(parents=True)
    if golden_outputs is None:
        session = session_of(model)
        names = [node.name for node in session.get_outputs()]
        values = session.run(names, golden_inputs)
        # Text is stored as numpy's fixed-width strings: golden files are never pickles.
        golden_outputs = {n: v.astype("U") if v.dtype == object else v for n, v in zip(names, values)}
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    np.savez(directory / "golden_inputs.npz", **golden_inputs)
    np.savez(directory / "golden_outputs.npz", **golden_outputs)
    inputs, outputs = specs_of(model)
    manifest = Manifest(
        schema=1,
        name="model",
        version=1,
        profile="x86-cpu",
        architecture="x86_64",
        graph="model.onnx",
        precision="fp32",
        inputs=inputs,
        outputs=outputs,
        max_batch_size=8,
        files=tuple(_entry(path) for path in sorted(directory.iterdir())),
        engines=(),
        golden=Golden(
            "golden_inputs.npz",
            "golden_outputs.npz",
            {spec.name: Tolerance(tolerance, tolerance) for spec in outputs},
        ),
        contract=Contract(),
    )
    manifest = replace(manifest, **changes)
    data = dumps(manifest)
    (directory / MANIFEST_NAME).write_bytes(data)
    return TestBundle(directory, manifest, hashlib.sha256(data).hexdigest())


def _entry(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(path.name, hashlib.sha256(data).hexdigest(), len(data))


def picky() -> Any:
    """``scores`` has the right values for golden inputs; for ``x`` of 5 and more, its Gather fails."""
    table = numpy_helper.from_array(np.arange(32, dtype=np.float32).reshape(8, 4), "table")
    zero = numpy_helper.from_array(np.zeros(1, np.int64), "zero")
    return make_model(
        [
            helper.make_node("Gather", ["x", "zero"], ["first"], axis=1),
            helper.make_node("Flatten", ["first"], ["flat"], axis=0),
            helper.make_node("Cast", ["flat"], ["index"], to=7),
            helper.make_node("Gather", ["table", "index"], ["rows"], axis=0),
            helper.make_node("Squeeze", ["rows", "zero"], ["scores"]),
        ],
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 4))],
        [table, zero],
    )


def linear_bundle(directory: Path, seed: int = 0, **changes: object) -> TestBundle:
    """A bundle of :func:`linear` with two golden rows."""
    rng = np.random.default_rng(1)
    return write_bundle(
        directory, linear(seed=seed), {"x": rng.standard_normal((2, 8)).astype(np.float32)}, **changes
    )


# What the installed command `edgekit-agent` does.
_SERVE = "import sys; from device_agent.cli import main; sys.exit(main())"


class AgentProcess:
    """``edgekit-agent serve`` as a child process, on free ports.

    Attributes:
        launcher: a command that starts the command that it is given.
        passed: descriptors that the launcher inherits.
    """

    def __init__(self, root: Path, settings: str = "", arguments: Sequence[str] = ()) -> None:
        self.launcher: Sequence[str] = ()
        self.passed: Sequence[int] = ()
        self._arguments = arguments
        self.control = root / "control.sock"
        self.log_path = root / "agent.log"
        config = root / "agent.toml"
        config.write_text(
            f'state_dir = "{root / "state"}"\nkeys_dir = "{root / "keys"}"\n'
            f'control_socket = "{self.control}"\nallow_unsigned = true\nthreads = 1\n'
            + settings
            + ("" if "[http]" in settings else "\n[http]\nport = 0")
            + ("" if "[grpc]" in settings else "\n[grpc]\nenabled = false")
            + ("" if "[probation]" in settings else "\n[probation]\nduration_s = 0.1")
            + "\n[metrics]\nport = 0\n"
        )
        (root / "keys").mkdir(exist_ok=True)
        self.config = config
        self.process: subprocess.Popen[bytes] = None  # type: ignore[assignment]  # set by start
        self.http = self.metrics = ""

    def start(self) -> AgentProcess:
        """Start, and return when it serves."""
        with self.log_path.open("wb") as log:
            command = [sys.executable, "-c", _SERVE, "serve", "--config", str(self.config), *self._arguments]
            self.process = subprocess.Popen(
                [*self.launcher, *command],
                pass_fds=self.passed,
                stderr=log,
                stdout=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        match = self.wait_for(r"listening http=(\S+) metrics=(\S+)")
        self.http, self.metrics = match.group(1), match.group(2)
        return self

    def wait_for(self, pattern: str, timeout_s: float = 30.0) -> re.Match[str]:
        """Wait until the log has a line that matches."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            match = re.search(pattern, self.log())
            if match:
                return match
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the log never had {pattern!r}:\n{self.log()}")

    def log(self) -> str:
        """Everything logged so far."""
        return self.log_path.read_text()

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def make_lifecycle(store: Store, state_dir: Path) -> Lifecycle:
    """A lifecycle with a real engine that takes unsigned bundles."""
    trust = Trust(state_dir / "no-keys", allow_unsigned=True)
    return Lifecycle(store, trust, Models(Config(threads=1), Metrics()))


def install(state_dir: Path, bundles: Sequence[TestBundle]) -> None:
    """Put bundles into a store, active, as ``edgekit-agent install`` does while no agent runs."""
    with Store(state_dir) as store:
        lifecycle = make_lifecycle(store, state_dir)
        for bundle in bundles:
            lifecycle.install(bundle.directory)


class StandInTransport:
    """A double of a socket's transport: keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True
        self.open = True

    def write(self, data: bytes) -> None:
        """Keep the data."""
        if self.open:
            self.written += data

    def pause_reading(self) -> None:
        """Ask the feeder to stop."""
        self.reading = False

    def resume_reading(self) -> None:
        """Ask the feeder to go on."""
        self.reading = True

    def can_write_eof(self) -> bool:
        """As a plain socket can."""
        return True

    def write_eof(self) -> None:
        """End the answers."""
        self.open = False

    def close(self) -> None:
        """End both sides."""
        self.open = False

    abort = close


def connect(agent: AgentProcess) -> socket.socket:
    """A plain TCP connection."""
    host, port = agent.http.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def read_response(stream: Any) -> Tuple[int, Dict[str, str], bytes]:
    """Status, headers by lower-case name, and body of the next response."""
    status = int(stream.readline().split()[1])
    headers = {}
    for line in iter(stream.readline, b"\r\n"):
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, stream.read(int(headers.get("content-length", 0)))
