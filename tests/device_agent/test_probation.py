"""Probation: live traffic decides whether a new version stays, and golden rows where there is none."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from agent_testing import AgentProcess, TestBundle, linear_bundle, make_model, picky, write_bundle
from device_agent import engines
from device_agent.config import Config
from device_agent.errors import AgentError, Refused
from device_agent.manifest import Contract, TensorSpec
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.probation.settings import ProbationSettings
from device_agent.probation.verdict import (
    CONFIRMING_RUNS,
    Evidence,
    Reference,
    against,
    exceeds_share,
    needs_confirmation,
)
from device_agent.server import control

SETTINGS = ProbationSettings()
NO_CONTRACT = Contract()
P95_10MS = Contract(latency_quantile="p95", latency_ms=10.0)
MB = 1024 * 1024


# The rules


@given(st.integers(1, 300), st.floats(0, 0.5))
def test_a_share_within_its_limit_never_counts_as_missed(of: int, allowed: float) -> None:
    """However few requests there were, no version is given up for less than what is allowed."""
    assert not exceeds_share(int(allowed * of), of, allowed)


@given(st.integers(1, 300), st.floats(0, 0.5), st.integers(0, 299))
def test_more_failures_never_look_better(of: int, allowed: float, bad: int) -> None:
    """If some failures are too many, one more is too many as well; all of ten always are."""
    if bad < of and exceeds_share(bad, of, allowed):
        assert exceeds_share(bad + 1, of, allowed)
    assert exceeds_share(10, 10, min(allowed, 0.49))


def test_one_hiccup_costs_no_version_and_two_failures_of_two_do() -> None:
    """Chance is told from cause: 1 of 20 may happen at 1%, 4 of 20 and 2 of 2 do not."""
    assert not exceeds_share(1, 20, 0.01)
    assert exceeds_share(4, 20, 0.01)
    assert exceeds_share(2, 2, 0.01)
    assert exceeds_share(1, 1000, 0.0)


GOOD = Evidence(total_s=[0.004] * 100, run_s=[0.003] * CONFIRMING_RUNS, memory_bytes=[100 * MB] * 40)
OLD = Reference(total_s=[0.004] * 100, run_s=0.003)
VERDICTS: Dict[str, Tuple[Evidence, Reference, Contract, str]] = {
    "a healthy version": (GOOD, OLD, NO_CONTRACT, ""),
    "the first version of a model": (GOOD, Reference(), NO_CONTRACT, ""),
    "wrong outputs": (replace(GOOD, wrong="output 'y' is off"), OLD, NO_CONTRACT, "is off"),
    "a crash": (replace(GOOD, crash="signal 11 (SIGSEGV)"), OLD, NO_CONTRACT, "SIGSEGV"),
    "failing requests": (replace(GOOD, failed=9), OLD, NO_CONTRACT, "9 of 109 requests failed"),
    "clients that make any version fail": (
        replace(GOOD, failed=9), replace(OLD, error_fraction=0.1), NO_CONTRACT, "",
    ),
    "slower than the old one": (
        replace(GOOD, total_s=[0.012] * 100, run_s=[0.011] * 20), OLD, NO_CONTRACT, "2 times the old",
    ),
    "slow by its traffic alone": (replace(GOOD, total_s=[0.012] * 100), OLD, NO_CONTRACT, ""),
    "slower, without live requests": (
        Evidence([0.011] * 20, run_s=[0.011] * 20, old_run_s=[0.003]), Reference(), NO_CONTRACT, "3.7 times",
    ),
    "slower than one that is not loaded any more": (
        Evidence(total_s=[0.011] * 20, run_s=[0.011] * 20), Reference(run_s=0.003), NO_CONTRACT, "2.8 times",
    ),
    "a cold engine beside one that was warm": (
        Evidence(total_s=[1e-4] * 20, run_s=[5e-5] * 20), Reference(run_s=1e-5), NO_CONTRACT, "",
    ),
    "two runs of microseconds that differ by chance": (
        Evidence([1e-3] * 20, run_s=[1.1e-4] * 20, old_run_s=[5e-5] * 20), Reference(), NO_CONTRACT, "",
    ),
    "requests turned away": (
        replace(GOOD, total_s=[0.004] * 80 + [math.inf] * 20, run_s=[0.007] * 20), OLD, NO_CONTRACT, "20 of",
    ),
    "within its contract though slower": (
        replace(GOOD, total_s=[0.009] * 100, run_s=[0.008] * 20), OLD, P95_10MS, "",
    ),
    "past its contract": (
        replace(GOOD, total_s=[0.011] * 100, run_s=[0.0105] * 20), OLD, P95_10MS, "the contract's p95",
    ),
    "past its contract by its traffic alone": (replace(GOOD, total_s=[0.011] * 100), OLD, P95_10MS, ""),
    "past a contract that the old one misses too": (
        replace(GOOD, total_s=[0.03] * 100, run_s=[0.02] * 20),
        Reference(total_s=[0.02] * 100, run_s=0.015),
        P95_10MS,
        "",
    ),
    "a leak": (
        replace(GOOD, memory_bytes=[(100 + 5 * i) * MB for i in range(40)]), OLD, NO_CONTRACT, "goes on",
    ),
    "buffers that are allocated once": (
        replace(GOOD, memory_bytes=[100 * MB] * 5 + [400 * MB] * 35), OLD, NO_CONTRACT, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VERDICTS)
def test_what_speaks_against_a_version(case: str) -> None:
    """Each way to be unhealthy is named; what traffic or clients do to any version is not held against it."""
    evidence, reference, contract, reason = VERDICTS[case]
    found = against(evidence, reference, contract, SETTINGS)
    assert (found or "") == "" if not reason else reason in (found or "")


def test_slow_traffic_asks_for_golden_rows_before_it_costs_a_version() -> None:
    """Until enough golden rows were run, latency alone gives no version up, and the rows are asked for."""
    doubtful = Evidence(total_s=[0.012] * 100)
    assert needs_confirmation(doubtful, OLD, NO_CONTRACT, SETTINGS)
    assert against(doubtful, OLD, NO_CONTRACT, SETTINGS) is None
    assert not needs_confirmation(GOOD, OLD, NO_CONTRACT, SETTINGS)
    assert not needs_confirmation(
        replace(doubtful, run_s=[0.003] * CONFIRMING_RUNS), OLD, NO_CONTRACT, SETTINGS
    )


# With an agent

DURATION = "\n[probation]\nduration_s = {}\n"


class Traffic(threading.Thread):
    """Clients that ask until they are stopped; keeps each status and answer."""

    def __init__(self, address: str, value: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.outcomes: List[Tuple[int, Any]] = []
        self.value = value
        self._address = address
        self._end = threading.Event()

    def run(self) -> None:
        """Ask without pause."""
        import http.client
        import json

        connection = http.client.HTTPConnection(self._address, timeout=30)
        while not self._end.is_set():
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [self.value] * 8}
            connection.request("POST", "/v2/models/model/infer", json.dumps({"inputs": [tensor]}))
            response = connection.getresponse()
            self.outcomes.append((response.status, json.loads(response.read())))
        connection.close()

    def stop(self) -> List[Tuple[int, Any]]:
        """End, and return what came."""
        self._end.set()
        self.join(30)
        return self.outcomes


@pytest.fixture(name="traffic")
def _traffic() -> Iterator[Callable[..., Traffic]]:
    started: List[Traffic] = []

    def start(agent: AgentProcess, value: float = 1.0) -> Traffic:
        started.append(Traffic(agent.http, value))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


def _install(agent: AgentProcess, bundle: TestBundle) -> Tuple[Any, List[str]]:
    states: List[str] = []
    message = {"op": "install", "bundle": str(bundle.directory), "activate": True}
    return control.request(agent.control, message, states.append), states


def _status(agent: AgentProcess) -> Any:
    (status,) = control.request(agent.control, {"op": "status"}, lambda state: None)
    return status


def _assert_rolled_back(agent: AgentProcess, old: TestBundle, new: TestBundle, reason: str) -> None:
    """The old version serves, the new one is gone, and the reason is kept."""
    status = _status(agent)
    assert (status["serving"], status["active"]) == (old.digest, old.digest)
    assert [version["digest"] for version in status["versions"]] == [old.digest]
    last = status["last_operation"]
    assert (last["digest"], last["state"]) == (new.digest, "probation")
    assert reason in last["failure"]["why"]


def test_a_version_that_holds_is_committed_after_its_probation(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], traffic: Callable[..., Traffic]
) -> None:
    """Success is reported only after the commit; live requests are the evidence, and none fails."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=DURATION.format(0.5))
    clients = traffic(agent)
    result, states = _install(agent, linear_bundle(tmp_path / "2", seed=1, version=2))
    assert states[-3:] == ["switched", "probation", "committed"]
    assert result["state"] == "committed"
    assert {status for status, _ in clients.stop()} == {200}
    assert _status(agent)["probation"] is None


def heavy(seed: int, width: int = 1200, layers: int = 6) -> Any:
    """Like :func:`agent_testing.linear`, at a hundred times the cost."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((width, width)).astype(np.float32) / width
    ends = (rng.standard_normal((8, width)), rng.standard_normal((width, 4)))
    named = {"first": ends[0].astype(np.float32), "middle": weights, "last": ends[1].astype(np.float32)}
    nodes, tensor = [helper.make_node("MatMul", ["x", "first"], ["t0"])], "t0"
    for index in range(layers):
        nodes.append(helper.make_node("MatMul", [tensor, "middle"], [f"t{index + 1}"]))
        tensor = f"t{index + 1}"
    nodes.append(helper.make_node("MatMul", [tensor, "last"], ["scores"]))
    return make_model(
        nodes,
        [TensorSpec("x", "FP32", (-1, 8))],
        [TensorSpec("scores", "FP32", (-1, 4))],
        [numpy_helper.from_array(array, name) for name, array in named.items()],
    )


GOLDEN = {"x": np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)}


@pytest.mark.parametrize("asked", [True, False])
def test_a_slow_version_is_rolled_back(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], traffic: Callable[..., Traffic], asked: bool
) -> None:
    """Much slower than the old version: told from live requests, and from golden rows where none come."""
    old = linear_bundle(tmp_path / "1")
    agent = start_agent(old, settings=DURATION.format(10))
    if asked:
        clients = traffic(agent)
        while len(clients.outcomes) < 100:
            time.sleep(0.01)
    new = write_bundle(tmp_path / "2", heavy(1, layers=30), GOLDEN, tolerance=1e-2, version=2)
    with pytest.raises(AgentError, match="did not hold in its probation") as refused:
        _install(agent, new)
    assert refused.value.exit_code == 5
    _assert_rolled_back(agent, old, new, "old version's")


def test_a_version_that_breaks_its_contract_is_rolled_back(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """The latency that a bundle promises is held against this device's clock, also for a first version."""
    agent = start_agent(settings=DURATION.format(10))
    new = write_bundle(
        tmp_path / "1",
        heavy(1),
        GOLDEN,
        tolerance=1e-2,
        contract=Contract(latency_quantile="p95", latency_ms=0.01),
    )
    with pytest.raises(AgentError, match="the contract's p95"):
        _install(agent, new)
    status = _status(agent)
    assert (status["serving"], status["active"], status["versions"]) == (None, None, [])


def test_a_version_that_fails_on_live_requests_is_rolled_back(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], traffic: Callable[..., Traffic]
) -> None:
    """A model that passes every golden row and fails on what clients send serves for moments only."""
    old = linear_bundle(tmp_path / "1")
    agent = start_agent(old, settings=DURATION.format(10))
    clients = traffic(agent, value=100.0)
    new = write_bundle(tmp_path / "2", picky(), {"x": np.ones((2, 8), np.float32)}, version=2)
    with pytest.raises(AgentError, match="requests failed"):
        _install(agent, new)
    _assert_rolled_back(agent, old, new, "requests failed")
    time.sleep(0.1)
    outcomes = clients.stop()
    assert {status for status, _ in outcomes} == {200, 500}
    assert [status for status, _ in outcomes[-5:]] == [200] * 5


def test_clients_errors_are_not_held_against_a_version(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], traffic: Callable[..., Traffic]
) -> None:
    """What fails with the old version too does not cost the new one its place."""
    agent = start_agent(
        write_bundle(tmp_path / "1", picky(), {"x": np.ones((2, 8), np.float32)}),
        settings=DURATION.format(0.5),
    )
    clients = traffic(agent, value=100.0)
    while len(clients.outcomes) < 20:
        time.sleep(0.01)
    result, _ = _install(
        agent, write_bundle(tmp_path / "2", picky(), {"x": np.full((2, 8), 2, np.float32)}, version=2)
    )
    assert result["state"] == "committed"
    assert {status for status, _ in clients.stop()} == {500}


class _Installing(threading.Thread):
    """An install that is asked for in the background; keeps how it ended."""

    def __init__(self, agent: AgentProcess, bundle: TestBundle) -> None:
        super().__init__(daemon=True)
        self.error: Optional[AgentError] = None
        self._ask = partial(_install, agent, bundle)
        self.start()
        _until_on_probation(agent)

    def run(self) -> None:
        """Ask, and wait for the end."""
        try:
            self._ask()
        except AgentError as error:
            self.error = error

    def ended_with(self) -> str:
        """What and why it failed."""
        self.join(30)
        return str(self.error)


def _until_on_probation(agent: AgentProcess) -> Any:
    deadline_s = time.monotonic() + 30
    while True:
        status = _status(agent)
        if status["probation"] is not None:
            return status
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.02)


def test_a_version_whose_engine_crashes_is_rolled_back(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """If the process of an isolated engine ends, its version has not proven itself; the old one serves."""
    old, new = linear_bundle(tmp_path / "1"), linear_bundle(tmp_path / "2", seed=1, version=2)
    agent = start_agent(old, settings=DURATION.format(30) + "[models.model]\nisolate = true\n")
    installing = _Installing(agent, new)
    os.kill(_status(agent)["engine"]["process"], signal.SIGKILL)
    assert "SIGKILL" in installing.ended_with()
    _assert_rolled_back(agent, old, new, "SIGKILL")


def test_a_stop_in_a_probation_is_no_verdict_and_two_kills_are(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """SIGTERM leaves the probation to the next start, as does one kill; after two the old one serves."""
    old, new = linear_bundle(tmp_path / "1"), linear_bundle(tmp_path / "2", seed=1, version=2)
    agent = start_agent(old, settings=DURATION.format(60))
    installing = _Installing(agent, new)
    assert agent.stop() == 0
    assert "the agent stops before model version 2 has proven itself" in installing.ended_with()
    for _ in range(2):
        agent.start()
        assert _until_on_probation(agent)["serving"] == new.digest
        agent.kill()
    agent.start()
    _assert_rolled_back(agent, old, new, "ended 2 times during it")


def test_a_stopped_probation_ends_committed_after_the_restart(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """What was seen before the stop counts; the version is committed without another word from anybody."""
    agent = start_agent(linear_bundle(tmp_path / "1"), settings=DURATION.format(2))
    new = linear_bundle(tmp_path / "2", seed=1, version=2)
    installing = _Installing(agent, new)
    assert agent.stop() == 0
    installing.ended_with()
    agent.start()
    deadline_s = time.monotonic() + 30
    while _status(agent)["last_operation"]["state"] != "committed":
        assert time.monotonic() < deadline_s, "it never came"
        time.sleep(0.05)
    status = _status(agent)
    assert (status["serving"], new.digest in status["committed"]) == (new.digest, True)


# Watched directly


class LeakingEngine:
    """A double of an engine that keeps 2 MB of every run; all else is the real engine's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._kept: List[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, inputs: Any) -> Any:
        """Run, and keep something."""
        self._kept.append(np.ones(2 * MB, np.uint8))
        return self._engine.run(inputs)


@pytest.mark.parametrize("leaks", [True, False])
def test_a_leaking_version_is_told_by_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaks: bool
) -> None:
    """Memory that grows with every request is noticed within the probation; a steady engine's is not."""
    settings = replace(SETTINGS, duration_s=1.0, max_memory_growth_bytes=8 * MB)
    models = Models(replace(Config(threads=1), probation=settings), Metrics())
    bundle = linear_bundle(tmp_path / "1")
    if leaks:
        candidates = engines.candidates
        monkeypatch.setattr(
            "device_agent.loading.candidates",
            lambda *arguments: (LeakingEngine(engine) for engine in candidates(*arguments)),
        )
    loaded = models.prepare(bundle.directory, bundle.manifest, bundle.digest)

    async def probation() -> None:
        watch = models.watch(loaded, None, paused=False, live=True, stop=threading.Event(), seen_s=0.0)
        try:
            await watch.run()
        finally:
            await models.retire(loaded)

    if leaks:
        with pytest.raises(Refused, match=r"grew by .* and goes on"):
            asyncio.run(probation())
    else:
        asyncio.run(probation())
