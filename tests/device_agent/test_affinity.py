from __future__ import annotations

import http.client
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable, Set

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_testing import AgentProcess, linear, linear_bundle
from device_agent import affinity
from device_agent.affinity import Placement
from device_agent.core_list import format_cpus, parse_cpus
from device_agent.engines.base import EngineSettings
from device_agent.engines.onnxruntime import open_graph
from device_agent.errors import Refused
from device_agent.server import control

ONE_CORE = min(os.sched_getaffinity(0))
HAS_NODES = Path("/sys/devices/system/node/node0/cpulist").exists()


@given(st.sets(st.integers(0, 1023)))
def test_a_list_of_cores_is_read_as_it_is_written(cores: Set[int]) -> None:
    """Any set of cores survives being written in the kernel's form and read again."""
    assert parse_cpus(format_cpus(cores)) == tuple(sorted(cores))


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,,2", "2-1", "0-1024", "0-999999999", "\u0661", "1 2"])
def test_a_malformed_list_of_cores_is_refused(text: str) -> None:
    """What is no list of cores is an error, never fewer cores than were meant."""
    with pytest.raises(ValueError, match=r"core|range"):
        parse_cpus(text)


def test_cores_that_are_not_there_are_refused() -> None:
    """Asking for a core that this process may not use names the core and those that it may."""
    with pytest.raises(Refused, match="1023") as caught:
        affinity.resolve(Placement((ONE_CORE, 1023)))
    assert format_cpus(os.sched_getaffinity(0)) in caught.value.why


def test_a_node_that_is_not_there_is_refused() -> None:
    """Asking for a memory node that the machine lacks says which it has."""
    with pytest.raises(Refused, match="node 999 is not there"):
        affinity.resolve(Placement(numa_node=999))


def _in_thread(function: Any) -> Any:
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_placed_thread_returns_to_where_it_was() -> None:
    """Placing a thread for a while binds it and what it starts, and leaves the rest of the process alone."""
    before = os.sched_getaffinity(0)
    with affinity.placed(Placement((ONE_CORE,))):
        assert os.sched_getaffinity(0) == {ONE_CORE}
        assert _in_thread(lambda: os.sched_getaffinity(0)) == {ONE_CORE}
    assert os.sched_getaffinity(0) == before
    assert _in_thread(lambda: os.sched_getaffinity(0)) == before


@pytest.mark.skipif(not HAS_NODES, reason="the kernel of this machine knows no memory nodes")
def test_memory_is_bound_to_a_node_or_refused() -> None:
    """A node's cores come with it, and the kernel confirms the memory policy; or the error says why not."""

    def bind() -> Any:
        resolved = affinity.resolve(Placement(numa_node=0))
        assert resolved.cpus
        try:
            with affinity.placed(resolved):
                inside = affinity.policy_of_thread()
        except Refused as error:
            return error
        return inside, affinity.policy_of_thread()

    result = _in_thread(bind)
    if isinstance(result, Refused):
        assert "node" in result.what
    else:
        assert result[0] == "bind 0"
        assert result[1] != "bind 0"


def test_the_threads_of_a_session_are_where_they_were_asked_for(tmp_path: Path) -> None:
    """The kernel confirms the cores of every thread that ONNX Runtime starts for a model."""
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    before = affinity.threads_of(os.getpid())
    engine = open_graph(path, EngineSettings(threads=3, placement=Placement((ONE_CORE,))))
    started = affinity.threads_of(os.getpid()) - before
    report = affinity.describe(os.getpid(), started)
    assert len(report) == 2  # the thread that runs the session is the third
    assert {entry["cpus"] for entry in report} == {str(ONE_CORE)}
    assert {entry["last_core"] for entry in report} == {ONE_CORE}
    assert engine.run({"x": np.ones((1, 8), np.float32)})["scores"].shape == (1, 4)
    engine.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_session_with_a_core_for_each_thread_keeps_one_on_each(tmp_path: Path) -> None:
    """With as many threads as cores, the session's own threads have a core each."""
    path = tmp_path / "m.onnx"
    path.write_bytes(linear().SerializeToString())
    first, second = sorted(os.sched_getaffinity(0))[:2]
    before = affinity.threads_of(os.getpid())
    engine = open_graph(path, EngineSettings(placement=Placement((first, second))))
    started = affinity.threads_of(os.getpid()) - before
    deadline_s = time.monotonic() + 20.0
    cpus: Any = None
    while cpus != [str(second)] and time.monotonic() < deadline_s:  # a thread binds itself once it runs
        cpus = [entry["cpus"] for entry in affinity.describe(os.getpid(), started)]
    assert cpus == [str(second)]
    engine.close()


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_status_says_where_a_model_really_runs(
    tmp_path: Path, start_agent: Callable[..., AgentProcess], isolate: str
) -> None:
    """``status`` reads the cores of a model's threads back from the kernel, beside what was asked for."""
    settings = f"\n[models.model]\nthreads = 2\ncpus = '{ONE_CORE}'\nisolate = {isolate}\n"
    agent = start_agent(linear_bundle(tmp_path / "b"), settings=settings)
    document = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 8], "data": [1.0] * 8}]}
    connection = http.client.HTTPConnection(agent.http, timeout=30)
    connection.request("POST", "/v2/models/model/infer", json.dumps(document))
    assert connection.getresponse().status == 200
    connection.close()
    (status,) = control.request(agent.control, {"op": "status"}, lambda state: None)
    engine = status["engine"]
    assert engine["asked"] == {"threads": 2, "cpus": str(ONE_CORE), "numa_node": None}
    assert engine["isolated"] == (isolate == "true") == (engine["process"] != agent.process.pid)
    assert len(engine["threads"]) >= 2
    assert {thread["cpus"] for thread in engine["threads"]} == {str(ONE_CORE)}
    assert engine["placed"] is True
    # The rest of the agent is where it was.
    assert affinity.describe(agent.process.pid, {agent.process.pid})[0]["cpus"] == format_cpus(
        os.sched_getaffinity(0)
    )


def test_a_process_that_has_ended_has_no_threads() -> None:
    """Reading back about a process that is gone finds nothing, and is no error."""
    gone = 2**22 + 1  # above the largest process id
    assert affinity.threads_of(gone) == set()
    assert affinity.describe(gone, {gone}) == []
    assert affinity.pages_by_node(gone) == {}
