"""What a deployment sends: after a changed head, and after a transfer that broke off.

python benchmarks/deploy.py [--json] [--quick]

Two bundles of random weights, one of the demo's size and one of MiniLM's, go through the agent's own control
protocol. What is counted are the bytes of chunks and of the chunk list that the host writes. A transfer is
broken off at several places; ``resent_fraction`` is what the worst of them made the host send twice.
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import numpy as np
import onnx
from common import document, finish, parse_options
from onnx import TensorProto, helper, numpy_helper

from device_agent.manifest import Contract, Golden, Manifest, TensorSpec, Tolerance
from device_agent.transfer import chunking
from edgekit import bundle
from edgekit.deploy.connection import Connection
from edgekit.deploy.payload import Payload, prepared
from edgekit.errors import Missing

#: Rows and columns of the body's layers, and how many there are: about 0.6 MB and 90 MB of float32.
SIZES = {"demo": (96, 96, 16), "minilm": (1024, 1024, 21)}
CLASSES = 10
CUTS = 9


def main() -> None:
    """Measure both sizes and print the document."""
    options = parse_options(__doc__)
    figures: dict[str, Any] = {}
    targets = {}
    for name, shape in SIZES.items():
        if not (options.quick and name == "minilm"):
            with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as home:
                figures.update({f"{name}_{k}": v for k, v in _measure(Path(home), *shape).items()})
                targets[f"{name}_head_change_sent_fraction"] = ("<=", 0.15)
                targets[f"{name}_resent_fraction"] = ("<=", 0.01)
    claim = "a changed head sends at most 15% of the bytes; an interrupted transfer resends at most 1%"
    finish(document("deploy", claim, figures, targets, CUTS), options.json)


def _measure(home: Path, rows: int, columns: int, layers: int) -> dict[str, Any]:
    first, second = (_bundle(home, version, rows, columns, layers) for version in (1, 2))
    with prepared(first) as old, prepared(second) as new:
        total_bytes = sum(entry.size_bytes for entry in old.manifest.files)
        with _device(home / "device") as connect:
            cuts = [_send(connect, old, total_bytes // (CUTS + 1)) for _ in range(CUTS)]
            rest = _send(connect, old)
            head = _send(connect, new)
        model = (second / "model.onnx").read_bytes()
    lost_bytes = [
        broken.sent_bytes - (broken.missing_bytes - after.missing_bytes)
        for broken, after in pairwise([*cuts, rest])
    ]
    start_s = time.perf_counter()
    chunking.lengths(io.BytesIO(model), chunking.average_for(len(model)))
    cut_s = time.perf_counter() - start_s
    return {
        "bundle_bytes": total_bytes,
        "head_change_sent_fraction": (head.sent_bytes + len(new.listed)) / total_bytes,
        "resent_fraction": max(lost_bytes) / total_bytes,
        "resent_median_fraction": median(lost_bytes) / total_bytes,
        "chunk_list_fraction": len(new.listed) / total_bytes,
        "cutting_s_per_100_mb": 1e8 * cut_s / len(model),
    }


@dataclass
class _Sent:
    """What the device lacked when a transfer began, and the bytes of chunks that were written then."""

    missing_bytes: int
    sent_bytes: int = 0


def _send(connect: Any, payload: Payload, stop_after_bytes: int | None = None) -> _Sent:
    """Deploy, or break off after so many bytes were stored."""
    with connect() as connection:
        offered = connection.ask(*payload.offer())
        sent = _Sent(offered["missing_bytes"])

        def chunks() -> Iterator[bytes]:
            for chunk in payload.chunks(offered["missing"]):
                sent.sent_bytes += len(chunk)
                yield chunk

        def report(line: Any) -> None:
            if stop_after_bytes is not None and line["received_bytes"] >= stop_after_bytes:
                connect.cut()

        try:
            connection.stream({"op": "receive"}, chunks(), offered["missing_bytes"], report)
        except Missing:
            return sent
        connection.ask({"op": "install", "offered": True, "activate": True})
    return sent


class _Connect:
    """Connections to one agent, that can be cut like a cable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    @contextmanager
    def __call__(self) -> Iterator[Connection]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(self._path))
            self._socket = client
            with client.makefile("rb") as reader, client.makefile("wb", 0) as writer:
                yield Connection(
                    reader, cast(IO[bytes], writer), lambda: Missing("the link broke", "it was cut", "go on")
                )

    def cut(self) -> None:
        """Break the link."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def _device(home: Path) -> Iterator[_Connect]:
    home.mkdir()
    control = home / "control.sock"
    (home / "agent.toml").write_text(
        f"state_dir = {json.dumps(str(home / 'state'))}\nkeys_dir = {json.dumps(str(home / 'keys'))}\n"
        f"control_socket = {json.dumps(str(control))}\nallow_unsigned = true\nthreads = 1\n"
        "[probation]\nduration_s = 0\n[http]\nport = 0\n[metrics]\nport = 0\n"
    )
    command = [sys.executable, "-m", "device_agent.cli", "serve", "--config", str(home / "agent.toml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(control):
                if process.poll() is not None:
                    sys.exit("the agent did not start")
                time.sleep(0.05)
            yield _Connect(control)
        finally:
            process.terminate()


def _bundle(home: Path, version: int, rows: int, columns: int, layers: int) -> Path:
    """A bundle of matrices that every version shares, and a head of its own."""
    staging = home / f"staging-{version}"
    staging.mkdir()
    rng = np.random.default_rng(0)
    shared = [rng.standard_normal((rows, columns)).astype(np.float32) / columns**0.5 for _ in range(layers)]
    head = np.random.default_rng(version).standard_normal((columns, CLASSES)).astype(np.float32)
    names = [f"layer{i}" for i in range(layers)] + ["head"]
    values = ["x", *(f"h{i}" for i in range(layers)), "y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [values[i], names[i]], [values[i + 1]]) for i in range(layers + 1)],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(w, name) for w, name in zip([*shared, head], names, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, staging / "model.onnx")
    x = rng.standard_normal((2, rows)).astype(np.float32)
    y = x
    for weights in [*shared, head]:
        y = y @ weights
    np.savez(staging / "in.npz", x=x)
    np.savez(staging / "out.npz", y=y)
    manifest = Manifest(
        schema=1,
        name="net",
        version=version,
        profile="x86-cpu",
        architecture="x86_64",
        graph="model.onnx",
        precision="fp32",
        inputs=(TensorSpec("x", "FP32", (-1, rows)),),
        outputs=(TensorSpec("y", "FP32", (-1, CLASSES)),),
        max_batch_size=4,
        files=(),
        engines=(),
        golden=Golden("in.npz", "out.npz", {"y": Tolerance(1e-2, 1e-2)}),
        contract=Contract(),
    )
    return bundle.pack(staging, manifest, home / f"out-{version}").directory


if __name__ == "__main__":
    main()
