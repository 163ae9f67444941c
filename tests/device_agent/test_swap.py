from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest

from agent_testing import AgentProcess, TestBundle, linear, linear_bundle, session_of, write_bundle
from device_agent import swap_plan
from device_agent.config import Config
from device_agent.errors import AgentError, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.manifest import FileEntry, Manifest
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server import control
from device_agent.signature import Trust
from device_agent.store import Store
from device_agent.swap_plan import Cost, estimate, plan

X = np.ones((1, 8), np.float32)
#: Nothing fits beside anything, so every update has its pause.
NO_ROOM = "\n[limits]\nmemory_reserve_bytes = 1000000000000000\n"


def test_both_versions_are_kept_where_they_fit() -> None:
    """The old version is stopped first only where the new one does not fit beside it."""
    assert plan(100, 100, 2.0).pause_s is None
    assert plan(101, 100, 2.0).pause_s == 2.0
    assert plan(101, None, 2.0).pause_s is None


def _with_size(manifest: Manifest, size_bytes: int) -> Manifest:
    return replace(manifest, files=(FileEntry("model.onnx", "0" * 64, size_bytes),))


def test_the_estimate_follows_what_was_measured(tmp_path: Path) -> None:
    """A version twice as large is expected to need twice what was measured, and more than its files."""
    small = _with_size(linear_bundle(tmp_path / "b").manifest, 100_000_000)
    large = _with_size(small, 200_000_000)
    assert estimate(large, small, Cost(memory_bytes=700_000_000)) == 1_400_000_000
    assert estimate(large, small, Cost()) > 200_000_000
    assert estimate(_with_size(small, 0), _with_size(small, 0), Cost(memory_bytes=5)) > 0


def test_a_tiny_model_says_little_of_a_large_one(tmp_path: Path) -> None:
    """What the runtime itself took for a model of a kilobyte is not multiplied for one of 30 MB."""
    large = _with_size(linear_bundle(tmp_path / "b").manifest, 30_000_000)
    assert estimate(large, _with_size(large, 1000), Cost(memory_bytes=10_000_000)) == 85_000_000


def test_what_is_free_keeps_the_reserve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smaller of the system's and the service's own limit counts, less the reserve."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    (tmp_path / "cgroup").write_text("0::/agent\n")
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "memory.max").write_text("600000\n")
    (tmp_path / "agent" / "memory.current").write_text("100000\n")
    monkeypatch.setattr(swap_plan, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(swap_plan, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(swap_plan, "_CGROUPS", tmp_path)
    assert swap_plan.available_bytes(1000) == 499_000
    assert swap_plan.available_bytes(10**9) == 0
    (tmp_path / "agent" / "memory.max").write_text("max\n")
    assert swap_plan.available_bytes(1000) == 1_023_000
    (tmp_path / "meminfo").unlink()
    assert swap_plan.available_bytes(1000) is None


def test_what_no_memory_can_hold_is_refused_before_a_byte_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle whose weights alone exceed what could be freed leaves nothing in the store."""
    manifest = _with_size(linear_bundle(tmp_path / "b").manifest, 1000)
    swap_plan.require_memory(manifest, 600, 400)
    swap_plan.require_memory(manifest, None, 0)
    with pytest.raises(Refused, match="no memory"):
        swap_plan.require_memory(manifest, 599, 400)
    monkeypatch.setattr("device_agent.models.available_bytes", lambda reserve_bytes: 0)
    with Store(tmp_path / "state") as store:
        trust = Trust(tmp_path / "keys", allow_unsigned=True)
        lifecycle = Lifecycle(store, trust, Models(Config(threads=1), Metrics()))
        with pytest.raises(Refused, match="no memory"):
            lifecycle.install(tmp_path / "b")
        assert store.names() == []


# With an agent


class _Client(threading.Thread):
    """Asks without pause, and keeps what came: status, Retry-After, answer."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.outcomes: List[Tuple[int, Any, Any]] = []
        self._address = address
        self._stop_asking = threading.Event()

    def run(self) -> None:
        import http.client

        connection = http.client.HTTPConnection(self._address, timeout=30)
        document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [1.0] * 8}]}
        while not self._stop_asking.is_set():
            connection.request("POST", "/v2/models/model/infer", json.dumps(document))
            response = connection.getresponse()
            body = json.loads(response.read())
            self.outcomes.append((response.status, response.getheader("Retry-After"), body))
        connection.close()

    def stop(self) -> List[Tuple[int, Any, Any]]:
        self._stop_asking.set()
        self.join(30)
        return self.outcomes


def _install(agent: AgentProcess, bundle: TestBundle) -> Tuple[Dict[str, Any], List[str]]:
    told: List[str] = []
    message = {"op": "install", "bundle": str(bundle.directory), "activate": True}
    return control.request(agent.control, message, told.append), told


def _answers(outcomes: List[Tuple[int, Any, Any]]) -> List[Any]:
    return [body["outputs"][0]["data"] for status, _, body in outcomes if status == 200]


def _expected(seed: int) -> Any:
    return pytest.approx(session_of(linear(seed=seed)).run(None, {"x": X})[0][0].tolist(), abs=1e-5)


def test_without_room_the_pause_is_told_first_and_clients_are_asked_to_come_back(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """The operator hears of the pause before it begins; clients get answers or 503 with Retry-After."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=NO_ROOM)
    client = _Client(agent.http)
    client.start()
    result, told = _install(agent, linear_bundle(tmp_path / "2", seed=1, version=2))
    time.sleep(0.2)
    outcomes = client.stop()
    announced = next(i for i, text in enumerate(told) if "stopped first, pause about" in text)
    assert told.index("staged") < announced < told.index("prepared")
    assert "stopped first, pause about" in result["pause"]
    assert "stopped first, pause about" in agent.log()
    refused = [outcome for outcome in outcomes if outcome[0] != 200]
    assert {status for status, _, _ in refused} <= {503}
    assert all(int(retry_after) >= 1 for _, retry_after, _ in refused)
    assert all("changes its version" in body["error"] for _, _, body in refused)
    answers = _answers(outcomes)
    assert answers[0] == _expected(0)
    assert answers[-1] == _expected(1)


def test_with_room_no_request_fails(tmp_path: Path, start_agent: Callable[..., AgentProcess]) -> None:
    """Where both versions fit, clients notice nothing but new answers."""
    agent = start_agent(linear_bundle(tmp_path / "1"))
    client = _Client(agent.http)
    client.start()
    result, told = _install(agent, linear_bundle(tmp_path / "2", seed=1, version=2))
    time.sleep(0.2)
    outcomes = client.stop()
    assert {status for status, _, _ in outcomes} == {200}
    assert _answers(outcomes)[-1] == _expected(1)
    assert result["pause"] == ""
    assert told[-1] == "committed"


def test_a_version_that_fails_in_its_pause_gives_way_to_the_old_one(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """If the new version does not pass its self-test, the old one is loaded again and serves."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=NO_ROOM)
    bad = write_bundle(
        tmp_path / "2", linear(), {"x": X}, {"scores": np.full((1, 4), 99, np.float32)}, version=2
    )
    with pytest.raises(AgentError, match="self-test"):
        _install(agent, bad)
    client = _Client(agent.http)
    client.start()
    time.sleep(0.1)
    outcomes = client.stop()
    assert {status for status, _, _ in outcomes} == {200}
    assert _answers(outcomes)[-1] == _expected(0)
    (status,) = control.request(agent.control, {"op": "status"}, lambda state: None)
    assert status["serving"] == status["active"]
    assert status["pause"] is None


def test_the_command_prints_the_pause(tmp_path: Path, start_agent: Callable[..., AgentProcess]) -> None:
    """``edgekit-agent install`` tells a person of the pause, beforehand and in its result."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=NO_ROOM)
    bundle = linear_bundle(tmp_path / "2", seed=1, version=2)
    config = tmp_path / "agent0" / "agent.toml"
    command = ["install", str(bundle.directory), "--config", str(config)]
    done = subprocess.run(
        [sys.executable, "-m", "device_agent.cli", *command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "pause about" in done.stderr
    assert "pause about" in done.stdout
    assert agent.stop() == 0
