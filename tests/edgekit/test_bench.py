"""``edgekit bench``: a finished bundle under load, with real agents, every answer checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundle_kit import graph, pack
from host_testing import EDGEKIT, ONE_THREAD, Forker, assert_three_lines
from onnx import helper, numpy_helper
from ssh_devices import SSHD, WHY_SKIPPED, SshDevices

from edgekit import bundle, profile, sign
from edgekit.bench import engine, golden, job
from edgekit.bench.local_agent import LocalAgent, running
from edgekit.composition import Release, StepFile, pack_composition
from edgekit.deploy import local
from edgekit.deploy.measure import SshDevice
from edgekit.deploy.ssh import SshOptions

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def doubled(factor: float = 2.0) -> onnx.ModelProto:
    """A graph that multiplies; the bundle's name is ``double``."""
    constant = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    return graph("double", (4, 4), [helper.make_node("Mul", ["x", "factor"], ["y"])], [constant])


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> bundle.Bundle:
    """A bundle whose largest batch is 4, with three golden rows."""
    return pack(tmp_path_factory.mktemp("double"), "double", doubled(), (ROWS, 2 * ROWS))


@pytest.fixture(scope="module")
def agent(double: bundle.Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAgent]:
    """An agent that serves it."""
    home = tmp_path_factory.mktemp("agent")
    private, public = sign.keygen(home / "release")
    (home / "keys").mkdir()
    public.rename(home / "keys" / public.name)
    sign.sign(double.archive, private)
    with running(home, home / "keys") as started:
        local.deploy(double.archive, started.control, lambda state: None)
        yield started


def assert_quantiles(latency: dict[str, Any], runs: int, batch: int) -> None:
    """What every latency of a report has."""
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert (latency["runs"], latency["batch"]) == (runs, batch)
    assert latency["where"]


def agents_below(directory: Path) -> list[int]:
    """Processes whose arguments name a file below a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(directory) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def test_this_machine(double: bundle.Bundle, forked: Forker, tmp_path: Path) -> None:
    """The engine at one row and at the largest batch, and an agent of its own under 1, 4 and 16 clients;
    every answer is the golden one; nothing runs afterwards, and nothing is left.
    """
    result = forked.run("bench", double.directory, "--json", cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert result.code == 0, result.err
    document = result.json()
    assert (document["name"], document["digest"]) == ("double", double.digest)
    assert [entry["latency_ms"]["batch"] for entry in document["engine"]] == [1, 4]
    for entry in document["engine"]:
        assert_quantiles(entry["latency_ms"], engine.RUNS, entry["latency_ms"]["batch"])
    assert [some["clients"] for some in document["served"]] == [1, 4, 16]
    for some in document["served"]:
        assert_quantiles(some["latency_ms"], some["answers"], 1)
        assert some["answers"] == some["identical"]
        assert some["requests_per_second"] > 0
    assert [some["answers"] for some in document["served"]] == [200, 200, 800]
    assert document["why"] == {}
    assert list(tmp_path.glob("edgekit-*")) == []
    assert agents_below(tmp_path) == []


def test_an_agent_that_serves_already(
    double: bundle.Bundle, agent: LocalAgent, forked: Forker, tmp_path: Path
) -> None:
    """By its address: what clients of that agent see; the engine is null, and why is said."""
    on = f"http://{agent.host}:{agent.port}"
    result = forked.run("bench", double.archive, "--on", on, cwd=tmp_path)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split(",")[0] for line in lines[1:4]] == ["served"] * 3
    assert lines[4].startswith("engine not measured: ")


def test_another_bundle_of_the_same_name_is_not_measured(
    agent: LocalAgent, forked: Forker, tmp_path: Path
) -> None:
    """The figures would be those of something else; so would those of a model that is not there."""
    other = pack(tmp_path, "other", doubled(3.0), (ROWS, 3 * ROWS))
    on = f"http://{agent.host}:{agent.port}"
    text = assert_three_lines(forked.run("bench", other.archive, "--on", on, cwd=tmp_path), 2)
    assert "serves another 'double'" in text
    assert other.digest[:12] in text
    renamed = doubled()
    renamed.graph.name = "triple"
    absent = pack(tmp_path, "absent", renamed, (ROWS, 2 * ROWS))
    result = forked.run("bench", absent.archive, "--on", on, cwd=tmp_path)
    assert "does not serve 'triple'" in assert_three_lines(result, 2)


def test_an_address_where_nobody_answers(double: bundle.Bundle, forked: Forker, tmp_path: Path) -> None:
    """Nobody there is exit code 4; what is no address is 2."""
    result = forked.run("bench", double.archive, "--on", "http://127.0.0.1:9", cwd=tmp_path)
    assert "no agent answers" in assert_three_lines(result, 4)
    for wrong in ("https://host:8000", "http://host", "host:8000", "http://host:port"):
        result = forked.run("bench", double.archive, "--on", wrong, cwd=tmp_path)
        assert "no place to measure on" in assert_three_lines(result, 2)


def test_a_device_that_does_not_reproduce_the_golden_outputs(forked: Forker, tmp_path: Path) -> None:
    """No figures of a model that answers wrongly: the agent's self-test refuses it, exit code 5."""
    wrong = pack(tmp_path, "wrong", doubled(), (ROWS, 2 * ROWS + 1))
    result = forked.run("bench", wrong.archive, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert "failed its self-test" in assert_three_lines(result, 5)
    assert agents_below(tmp_path) == []


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_agent_outlives_the_command(
    double: bundle.Bundle, how: signal.Signals, code: int, tmp_path: Path
) -> None:
    """Ctrl-C, and a kill that nothing can catch: the agent that was started ends too."""
    process = subprocess.Popen(
        [EDGEKIT, "bench", str(double.archive)],
        env={**os.environ, **ONE_THREAD, "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 60
        while not agents_below(tmp_path):
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(how)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait()
    deadline_s = time.monotonic() + 30
    while agents_below(tmp_path):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_answers_are_held_against_the_tolerance() -> None:
    """Within it an answer passes and is not called identical; beyond it, of another shape, or absent, not."""
    from device_agent.manifest import Tolerance

    case = golden.Case({}, {"y": np.ones((1, 2), np.float32)}, {"y": Tolerance(0.1, 0.0)})
    near = np.array([[1.0, 1.05]], np.float32)
    assert (case.difference({"y": near}), case.identical({"y": near})) == ("", False)
    assert case.identical({"y": np.ones((1, 2), np.float32)})
    for wrong in ({"y": near + 0.2}, {"y": near[0]}, {}, {"y": near * np.nan}):
        assert case.difference(wrong) == "y"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevices]:
    """A device behind a real sshd."""
    if SSHD is None:
        pytest.skip(WHY_SKIPPED)
    made = SshDevices(tmp_path_factory.mktemp("ssh"))
    made.add("bench", agent=False, command=f"{sys.executable} -m device_agent.cli measure")
    yield made
    made.close()


def composed(home: Path) -> bundle.Bundle:
    """Two steps that run as one model."""
    steps = []
    for name, taken, made in (("first", "x", "h"), ("second", "h", "y")):
        model = doubled()
        onnx.save(model, home / f"{name}.onnx")
        steps.append(StepFile(name, home / f"{name}.onnx", {"x": taken}, {"y": made}))
    release = Release("steps", 1, "second", max_batch_size=4)
    return pack_composition(steps, {"x": ROWS}, ["y"], release, profile.load("x86-cpu"), home / "out")


def test_a_device_over_ssh(
    double: bundle.Bundle, device: SshDevices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is timed there at both batches, of several graphs each; requests are null, and why."""
    options = SshOptions(config=device.config)  # the command takes the user's own
    monkeypatch.setattr(engine, "SshDevice", lambda address: SshDevice(address, options))
    monkeypatch.setattr(engine, "RUNS", 10)
    found = job.bench(double.archive, "ssh://bench", lambda text: None)
    assert found.engine is not None
    assert [(one.step, one.latency_ms.batch) for one in found.engine] == [(None, 1), (None, 4)]
    assert all("ssh://bench" in one.latency_ms.where for one in found.engine)
    assert found.served is None
    assert found.why.keys() == {"served"}
    steps = job.bench(composed(tmp_path).archive, "ssh://bench", lambda text: None).engine
    assert steps is not None
    assert [(one.step, one.latency_ms.batch) for one in steps] == [
        ("first", 1), ("second", 1), ("first", 4), ("second", 4)
    ]  # fmt: skip


def test_several_graphs_are_measured_as_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A composition's steps run one after the other in each timed run, and are served as one model."""
    monkeypatch.setattr(engine, "RUNS", 10)
    found = job.bench(composed(tmp_path).directory, None, lambda text: None)
    assert found.engine is not None
    assert [(one.step, one.latency_ms.batch) for one in found.engine] == [(None, 1), (None, 4)]
    assert found.served is not None
    assert [some.identical for some in found.served] == [10, 8, 32]
