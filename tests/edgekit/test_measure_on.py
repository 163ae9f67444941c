"""Latencies of a device over SSH: a real sshd, the agent's own measurement, and what goes wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from ssh_devices import SSHD, WHY_SKIPPED, SshDevices

from edgekit.deploy import ssh
from edgekit.deploy.measure import SshDevice
from edgekit.errors import DeviceRefused, Missing
from edgekit.measure.device import Timed

MEASURE = f"{sys.executable} -m device_agent.cli measure"


def _graph(kind: str = "Relu") -> Timed:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return Timed(model.SerializeToString(), {"x": np.ones((2, 4), np.float32)}, batch=2)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevices]:
    """Devices without an agent running: measuring needs none."""
    if SSHD is None:
        pytest.skip(WHY_SKIPPED)
    made = SshDevices(tmp_path_factory.mktemp("measure"))
    made.add("measures", agent=False, command=MEASURE)
    made.add("broken", agent=False, command="false")
    yield made
    made.close()


def _device(devices: SshDevices, name: str) -> SshDevice:
    return SshDevice(f"ssh://{name}", ssh.SshOptions(config=devices.config))


def test_graphs_are_timed_on_the_device(devices: SshDevices) -> None:
    """Files go there, quantiles come back with the device's name; who it is, is part of every key."""
    device = _device(devices, "measures")
    timed = device.time({"a": _graph(), "b": _graph("Sigmoid")}, runs=11, warmup=2, threads=1)
    assert {name: (one.runs, one.batch) for name, one in timed.items()} == {"a": (11, 2), "b": (11, 2)}
    assert all(0 < one.p50 <= one.p95 and "ssh://measures" in one.where for one in timed.values())
    assert device.digest == _device(devices, "measures").digest
    assert device.machine() in ("x86_64", "aarch64")


def test_a_graph_that_does_not_run_there_is_the_device_s_refusal(devices: SshDevices) -> None:
    """ONNX Runtime's own words come back, as an error of the device."""
    with pytest.raises(DeviceRefused, match="does not run a graph"):
        _device(devices, "measures").time({"a": _graph("NoSuchOperator")}, runs=1, warmup=0, threads=1)


def test_a_device_that_cannot_measure_is_missing_something(devices: SshDevices) -> None:
    """No agent there, or an older one: three lines that say what to try."""
    with pytest.raises(Missing, match="cannot measure"):
        _device(devices, "broken").time({"a": _graph()}, runs=1, warmup=0, threads=1)


def _ask(request: bytes) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(MEASURE.split(), input=request, capture_output=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize(
    "change",
    [
        {"runs": -1}, {"runs": 10**9}, {"threads": "2"}, {"graphs": []}, {"graphs": 3},
        {"graphs": [{"name": "a", "graph_bytes": 2**40, "inputs_bytes": 0}]},
        {"graphs": [{"name": "a", "graph_bytes": 50, "inputs_bytes": 0}]},
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused(change: dict[str, Any]) -> None:
    """Numbers out of bounds, missing files, nonsense: exit code 2 and the reason, before anything is
    loaded.
    """
    request = {"graphs": [], "runs": 1, "warmup": 0, "threads": 1, **change}
    code, answer = _ask(json.dumps(request).encode() + b"\nshort")
    assert (code, answer["ok"]) == (2, False)


def test_inputs_are_never_unpickled(tmp_path: Path) -> None:
    """An archive with objects in it is refused, not loaded."""
    timed = _graph()
    assert isinstance(timed.graph, bytes)
    written = io.BytesIO()
    np.savez(written, x=np.array([{"a": 1}], dtype=object))
    entry = {"name": "a", "graph_bytes": len(timed.graph), "inputs_bytes": len(written.getvalue())}
    request = {"graphs": [entry], "runs": 1, "warmup": 0, "threads": 1}
    code, answer = _ask(json.dumps(request).encode() + b"\n" + timed.graph + written.getvalue())
    assert (code, answer["ok"]) == (2, False)
    assert "npz" in answer["what"]
