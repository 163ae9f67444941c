"""A device that builds its engine: what serves meanwhile, afterwards, and when no engine comes of it.

The agent and the build are real processes; TensorRT and CUDA are a recording double (``recording/tensorrt``).
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest

from agent_testing import AgentProcess, TestBundle, linear, linear_bundle, session_of
from device_agent.manifest import EngineBuild, ShapeRange
from device_agent.server import control

RECORDING = Path(__file__).parent / "recording"
BUILDS = (
    EngineBuild(
        "tensorrt",
        "model.onnx",
        "fp16",
        {"sm": "72"},
        {"x": ShapeRange((1, 8), (8, 8), (8, 8))},
    ),
)
X = np.arange(8, dtype=np.float32).reshape(1, 8)

Behave = Callable[[str], None]
Start = Callable[..., AgentProcess]


@pytest.fixture
def behave(monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Have agents that start from now on see a TensorRT that behaves as the words say."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(RECORDING), os.environ.get("PYTHONPATH", "")]))
    return lambda words: monkeypatch.setenv("RECORDING_TENSORRT", words)


def _bundle(path: Path, version: int = 1, builds: Tuple[EngineBuild, ...] = BUILDS) -> TestBundle:
    return linear_bundle(path, seed=version, schema=4, builds=builds, version=version)


def _status(agent: AgentProcess) -> Dict[str, Any]:
    status: Dict[str, Any] = control.request(agent.control, {"op": "status"}, lambda state: None)[0]
    return status


def _wait(agent: AgentProcess, state: str) -> Dict[str, Any]:
    """Wait until the model's engine is in a state, and until what that brings serves."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        status = _status(agent)
        build = status["engine_build"]
        runtime = "tensorrt" if state == "built" else "onnxruntime"
        if build and build["state"] == state and status["engine"]["runtime"] == runtime:
            return status
        time.sleep(0.05)
    raise AssertionError(f"it never was {state}: {_status(agent)}\n{agent.log()}")


def _scores(agent: AgentProcess) -> List[float]:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": X.ravel().tolist()}]}
    request = urllib.request.Request(  # this test's own agent
        f"http://{agent.http}/v2/models/model/infer", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        scores: List[float] = json.load(answer)["outputs"][0]["data"]
    return scores


def _expected(version: int) -> Any:
    return pytest.approx(session_of(linear(seed=version)).run(None, {"x": X})[0].ravel().tolist(), rel=1e-5)


def _metric(agent: AgentProcess, name: str) -> float:
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f'{name}{{model="model"}}')).split()[-1])


def test_a_first_version_serves_at_once_and_gets_its_engine_later(
    start_agent: Start, behave: Behave, tmp_path: Path
) -> None:
    """ONNX Runtime serves until the engine is built and has reproduced the golden outputs; then that serves.

    The next start finds it; after an update of TensorRT it is built again, while ONNX Runtime serves.
    """
    behave("build-seconds=0.5")
    agent = start_agent(_bundle(tmp_path / "b"))
    assert _status(agent)["engine"]["runtime"] == "onnxruntime"
    assert _scores(agent) == _expected(1)
    status = _wait(agent, "built")
    assert status["engine_build"]["precision"] == "fp16"
    assert _scores(agent) == _expected(1)
    assert _metric(agent, "edgekit_engine_builds_total") == 1
    assert _metric(agent, "edgekit_engine_fallback") == 0
    assert agent.stop() == 0

    behave("build-fails")
    agent.start()
    assert _status(agent)["engine"]["runtime"] == "tensorrt"
    assert agent.stop() == 0

    behave("version=8.6.1.6 build-seconds=0.5")
    agent.start()
    assert _status(agent)["engine"]["runtime"] == "onnxruntime"
    _wait(agent, "built")
    assert _scores(agent) == _expected(1)
    assert agent.stop() == 0


def test_what_a_dla_leaves_to_the_gpu_is_in_the_status(
    start_agent: Start, behave: Behave, tmp_path: Path
) -> None:
    """A bundle asks for the DLA: the device builds for it, and names what falls back, after a restart too."""
    behave("")
    agent = start_agent(_bundle(tmp_path / "b", builds=(replace(BUILDS[0], dla_core=0),)))
    assert _wait(agent, "built")["engine_build"]["about"]["not_on_dla"] == ["layer"]
    assert "the GPU runs 1 of its 1 layers" in agent.log()
    agent.stop()
    agent.start()
    assert _status(agent)["engine_build"]["about"]["not_on_dla"] == ["layer"]


def test_the_old_version_serves_while_the_new_ones_engine_is_built(
    start_agent: Start, behave: Behave, tmp_path: Path
) -> None:
    """An update tells that it builds, the old version answers meanwhile, then the new one has an engine."""
    behave("")
    agent = start_agent(_bundle(tmp_path / "old"))
    _wait(agent, "built")
    agent.stop()
    behave("build-seconds=1")
    agent.start()
    new = _bundle(tmp_path / "new", version=2)
    seen: List[Any] = []

    def on_state(state: str) -> None:
        if state.startswith("building"):
            seen.append(_scores(agent))

    states: List[str] = []
    control.request(
        agent.control,
        {"op": "install", "bundle": str(new.directory)},
        lambda state: (states.append(state), on_state(state)),
    )
    assert states.index("staged") < next(i for i, s in enumerate(states) if s.startswith("building a fp16"))
    assert seen
    assert all(scores == _expected(1) for scores in seen)
    assert _wait(agent, "built")["engine"]["runtime"] == "tensorrt"
    assert _scores(agent) == _expected(2)
    assert agent.stop() == 0


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("build-fails", "no implementation for node"),
        ("build-dies", "signal 9 (SIGKILL)"),
        ("wrong-numbers", "failed its self-test"),
        ("no-memory", "out of memory"),
        ("no-context", "out of memory"),
        ("rows=1", "cannot have the shape [2, 8]"),
    ],
)
def test_without_an_engine_onnxruntime_serves_and_says_why(
    start_agent: Start, behave: Behave, tmp_path: Path, words: str, why: str
) -> None:
    """However an engine fails, requests are answered right; log, status and metrics have the one reason."""
    behave(words)
    agent = start_agent(_bundle(tmp_path / "b"))
    status = _wait(agent, "failed")
    assert why in status["engine_build"]["why"]
    assert "\n" not in status["engine_build"]["why"]
    assert _scores(agent) == _expected(1)
    assert _metric(agent, "edgekit_engine_fallback") == 1
    assert _metric(agent, "edgekit_engine_build_failures_total") >= 1
    assert sum("ONNX Runtime serves it" in line for line in agent.log().splitlines()) >= 1
    assert agent.stop() == 0


def test_a_stop_during_a_build_leaves_no_process(start_agent: Start, behave: Behave, tmp_path: Path) -> None:
    """The agent stops while it builds, and so does the build; the next start builds it."""
    behave("build-seconds=60")
    agent = start_agent(_bundle(tmp_path / "b"))
    _wait(agent, "building")
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
    tasks = [task / "children" for task in children.parent.parent.iterdir()]
    builders = [int(pid) for task in tasks for pid in task.read_text().split()]
    assert builders
    assert agent.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in builders)
    behave("")
    agent.start()
    _wait(agent, "built")
    assert agent.stop() == 0


def test_a_gpu_that_is_full_at_the_start_costs_the_engine_and_nothing_else(
    start_agent: Start, behave: Behave, tmp_path: Path
) -> None:
    """Others hold the GPU's memory, so that not even a context fits: ONNX Runtime serves, and says why.

    Found on a GPU: what was raised there ended the model's start. The next start has the engine again.
    """
    behave("")
    agent = start_agent(_bundle(tmp_path / "b"))
    _wait(agent, "built")
    assert agent.stop() == 0
    behave("no-context")
    agent.start()
    assert "out of memory" in _wait(agent, "failed")["engine_build"]["why"]
    assert _scores(agent) == _expected(1)
    assert agent.stop() == 0
    behave("")
    agent.start()
    _wait(agent, "built")
    assert _scores(agent) == _expected(1)
    assert agent.stop() == 0


def test_timings_of_an_earlier_build_never_cost_an_engine(
    start_agent: Start, behave: Behave, tmp_path: Path
) -> None:
    """Where TensorRT makes no engine with the timing cache that lies there, it is asked once more without."""
    behave("timings-harm")
    agent = start_agent(_bundle(tmp_path / "old"))
    _wait(agent, "built")
    new = _bundle(tmp_path / "new", version=2)
    control.request(agent.control, {"op": "install", "bundle": str(new.directory)}, lambda state: None)
    _wait(agent, "built")
    assert _scores(agent) == _expected(2)
    assert agent.stop() == 0
