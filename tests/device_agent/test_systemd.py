"""The agent under systemd: what it tells the manager, the watchdog, and sockets that outlive it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import tritonclient.http

from activation_kit import listen
from agent_testing import AgentProcess, linear_bundle
from device_agent import cli
from device_agent.batching.execution import EngineThread
from device_agent.batching.job import Job
from device_agent.errors import BadInput
from device_agent.server.control import request
from device_agent.systemd import activation
from device_agent.systemd.log_format import formatter
from device_agent.systemd.notify import ServiceManager
from device_agent.systemd.watchdog import given_time, watched

Start = Callable[..., AgentProcess]


class Manager:
    """The manager's end of ``NOTIFY_SOCKET``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.bind("\0" + address[1:] if address.startswith("@") else address)
        self._receiver.settimeout(20)

    def next(self) -> str:
        """The next message."""
        return self._receiver.recv(4096).decode()

    def until(self, wanted: str) -> List[str]:
        """All messages up to one that is ``wanted``."""
        got = [self.next()]
        while got[-1] != wanted:
            got.append(self.next())
        return got

    def drain(self) -> List[str]:
        """What has come until now."""
        got = []
        self._receiver.setblocking(False)
        try:
            while True:
                got.append(self.next())
        except BlockingIOError:
            return got
        finally:
            self._receiver.settimeout(20)

    def close(self) -> None:
        """Listen no more."""
        self._receiver.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Who is told."""
    receiving = Manager(str(tmp_path / "notify.sock"))
    yield receiving
    receiving.close()


# What is told


def test_the_service_manager_is_told(
    start_agent: Start, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY=1 comes when the models serve, time is asked for before it, STOPPING=1 before the doors close."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    agent = start_agent(linear_bundle(tmp_path / "b"))
    starting = manager.until("READY=1")
    assert "STATUS=loading models" in starting
    assert any(re.fullmatch(r"EXTEND_TIMEOUT_USEC=\d+", message) for message in starting)
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        assert client.is_model_ready("model")
    agent.stop()
    assert manager.until("STOPPING=1") == ["STOPPING=1"]


def test_an_abstract_socket_is_reached_too() -> None:
    """Containers pass NOTIFY_SOCKET with an @ before its name."""
    receiving = Manager(f"@edgekit-test-{os.getpid()}")
    try:
        ServiceManager(receiving.address).status("loads\nmodel 1")
        assert receiving.next() == "STATUS=loads model 1"
    finally:
        receiving.close()


def test_children_are_not_the_service() -> None:
    """What the manager left in the environment is read once and taken out."""
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}
    assert ServiceManager.take(environment).watchdog_s == 0.5
    assert environment == {}
    assert ServiceManager.take(environment).watchdog_s is None


@pytest.mark.parametrize(
    "variables", [{"WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}]
)
def test_a_watchdog_of_somebody_else_is_left_alone(variables: Dict[str, str]) -> None:
    """An interval for another process, of zero or of no number means that nobody watches."""
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "500000", **variables}
    assert ServiceManager.take(environment).watchdog_s is None


def test_a_manager_that_is_gone_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A message that cannot be delivered is logged; the agent goes on."""
    ServiceManager(str(tmp_path / "gone.sock")).ready()
    assert "READY=1" in caplog.text


# The watchdog


def test_the_agent_answers_its_watchdog(
    start_agent: Start, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WATCHDOG=1 keeps coming while the agent serves."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", "150000")
    start_agent()
    manager.until("READY=1")
    for _ in range(3):
        assert manager.until("WATCHDOG=1")[-1] == "WATCHDOG=1"


def test_a_problem_silences_the_watchdog(manager: Manager) -> None:
    """While something is wrong no WATCHDOG=1 is sent, and the status says what it is."""

    async def scenario() -> None:
        problem = [""]
        async with watched(ServiceManager(manager.address, watchdog_s=0.03), lambda: problem[0]):
            assert await asyncio.get_running_loop().run_in_executor(None, manager.next) == "WATCHDOG=1"
            problem[0] = "the engine hangs"
            await asyncio.sleep(0.05)
            manager.drain()
            await asyncio.sleep(0.1)
            assert manager.drain() == []
            problem[0] = ""
            got = await asyncio.get_running_loop().run_in_executor(None, manager.until, "WATCHDOG=1")
            assert got == ["WATCHDOG=1"]

    asyncio.run(scenario())


def test_a_loop_that_hangs_answers_no_watchdog(manager: Manager) -> None:
    """The answers come from the event loop itself, so they stop when it does."""

    async def scenario() -> None:
        async with watched(ServiceManager(manager.address, watchdog_s=0.03), lambda: ""):
            await asyncio.get_running_loop().run_in_executor(None, manager.next)
            threading.Event().wait(0.05)  # holds the loop
            manager.drain()
            threading.Event().wait(0.1)
            assert manager.drain() == []

    asyncio.run(scenario())


class HangingEngine:
    """A double of an engine whose run does not come back."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def run(self, inputs: Any) -> Any:
        """Hang."""
        self.entered.set()
        self.let_go.wait(20)
        return inputs


def test_an_engine_that_hangs_is_seen() -> None:
    """The time that the run under way takes can be read while the engine's thread is lost in it."""

    async def scenario() -> None:
        engine, loop, back = HangingEngine(), asyncio.get_running_loop(), asyncio.Event()
        thread = EngineThread(engine, loop, lambda batch: back.set())  # type: ignore[arg-type]  # only run
        assert thread.running_s == 0.0
        thread.run([Job({"x": np.zeros(1)}, 1, (), lambda job: None)])
        engine.entered.wait(20)
        assert 0.0 < thread.running_s < thread.running_s
        engine.let_go.set()
        await back.wait()
        assert thread.running_s == 0.0
        thread.stop()

    asyncio.run(scenario())


def test_a_start_that_does_not_move_on_gets_no_more_time(manager: Manager) -> None:
    """The manager is asked to wait only for so long without progress."""

    async def scenario() -> None:
        async with given_time(ServiceManager(manager.address), 0.0, lambda: 0):
            await asyncio.sleep(0.05)
        async with given_time(ServiceManager(manager.address), 60.0, lambda: 0):
            await asyncio.sleep(0.05)

    asyncio.run(scenario())
    assert manager.drain() == ["EXTEND_TIMEOUT_USEC=30000000"]


# Sockets that systemd opened

_BODY = b'{"inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [1, 1, 1, 1, 1, 1, 1, 1]}]}'
_REQUEST = b"POST /v2/models/model/infer HTTP/1.1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_BODY),
    _BODY,
)


def ask(address: Any) -> str:
    """Send an inference on a connection of its own; the status line of the answer."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(30)
        client.connect(address)
        client.sendall(_REQUEST)
        with client.makefile("rb") as stream:
            return stream.readline().decode().strip()


def test_every_door_may_be_passed(activated: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """HTTP over TCP and Unix, metrics and control are served on systemd's sockets, which the agent leaves."""
    unix, control = str(tmp_path / "http.sock"), str(tmp_path / "passed.sock")
    with listen() as http, listen(unix) as http_unix, listen() as metrics, listen(control) as administration:
        agent = activated({"http": http, "http+": http_unix, "metrics": metrics, "control": administration})
        agent.start()
        assert agent.http == activation.describe(http)
        assert agent.metrics == activation.describe(metrics)
        assert f"control={control} unix={unix}" in agent.log()
        assert ask(http.getsockname()) == ask(unix) == "HTTP/1.1 200 OK"
        assert request(Path(control), {"op": "status"}, print)[0]["serving"] is not None
        assert agent.stop() == 0
        assert Path(unix).is_socket()
        assert Path(control).is_socket()


def test_a_new_start_of_the_agent_loses_no_request(activated: Callable[..., AgentProcess]) -> None:
    """While one agent ends and the next one starts, clients wait, and every request is answered with 200."""
    with listen() as http:
        agent = activated({"http": http})
        agent.start()
        address, over = http.getsockname(), threading.Event()
        outcomes: List[Tuple[int, str]] = []

        def client(number: int) -> None:
            while not over.is_set():
                try:
                    outcomes.append((number, ask(address)))
                except OSError as error:
                    outcomes.append((number, repr(error)))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for each in clients:
            each.start()
        for _ in range(2):
            assert agent.stop() == 0
            agent.start()
        ask(address)
        over.set()
        for each in clients:
            each.join(30)
        assert {outcome for _, outcome in outcomes} == {"HTTP/1.1 200 OK"}
        assert {number for number, _ in outcomes} == {0, 1, 2, 3}


def test_a_passed_socket_on_the_network_is_refused(activated: Callable[..., AgentProcess]) -> None:
    """The rule for addresses in agent.toml, loopback only, holds for sockets of systemd too."""
    with listen(("0.0.0.0", 0)) as http:
        agent = activated({"http": http})
        with pytest.raises(AssertionError, match=r"the one for http is bound to 0\.0\.0\.0:"):
            agent.start()
        assert agent.process.wait(timeout=20) == 2
        assert "Traceback" not in agent.log()


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("video",), "nothing is served on a TCP socket named 'video'"),
        (("",), "nothing is served on a TCP socket named ''"),
        (("control",), "nothing is served on a TCP socket named 'control'"),
        (("http", "http+"), "two sockets were passed for http"),
    ],
)
def test_a_socket_without_use_is_refused(
    activated: Callable[..., AgentProcess], names: Tuple[str, ...], why: str
) -> None:
    """A socket that nothing answers would let clients wait for ever; the agent says what is wrong instead."""
    sockets = {name: listen() for name in names}
    agent = activated(sockets)
    with pytest.raises(AssertionError, match=why):
        agent.start()
    assert agent.process.wait(timeout=20) == 2
    for listener in sockets.values():
        listener.close()


def test_a_passed_socket_must_listen(activated: Callable[..., AgentProcess]) -> None:
    """A datagram socket is refused by its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        agent = activated({"http": datagrams})
        with pytest.raises(AssertionError, match="'http' does not listen for streams"):
            agent.start()


def test_sockets_of_another_process_are_left_alone() -> None:
    """Variables that were meant for the parent are dropped without touching a descriptor."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    assert activation.take(environment) == {}
    assert environment == {}
    with pytest.raises(BadInput, match="LISTEN_FDS is not a number"):
        activation.take({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"})


# The journal


def test_the_journal_gets_the_priority_of_every_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Errors are errors in `journalctl -p err`, a traceback's lines too; on a terminal there is no prefix."""
    status = os.fstat(sys.stderr.fileno())
    record = logging.LogRecord("device_agent", logging.ERROR, "", 0, "it broke\nhere", (), None)
    journal = formatter({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    assert journal.format(record) == "<3>device_agent: it broke\n<3>here"
    assert formatter({"JOURNAL_STREAM": "1:1"}).format(record) == "ERROR device_agent: it broke\nhere"


def stand_in_journalctl(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a double of journalctl, which would need a running systemd, on PATH."""
    tool = directory / "journalctl"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_logs_shows_the_units_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON document with the time, priority and text of each line; bytes that are not text are shown."""
    stand_in_journalctl(
        tmp_path,
        monkeypatch,
        """
printf '{"__REALTIME_TIMESTAMP": "1000000", "PRIORITY": "3", "MESSAGE": "%s"}\n' "$2 $4"
echo '{"__REALTIME_TIMESTAMP": "2000000", "MESSAGE": [104, 105, 255]}'
""",
    )
    assert cli.main(["logs", "--lines", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"time": "1970-01-01T00:00:01.000+00:00", "priority": 3, "message": "edgekit-agent.service 7"},
        {"time": "1970-01-01T00:00:02.000+00:00", "priority": 6, "message": "hi\ufffd"},
    ]


def test_logs_says_what_is_in_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No journalctl is exit code 4; a journal that this user may not read is 5, with journalctl's reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["logs"]) == 4
    assert "journalctl is not on this machine" in capsys.readouterr().err
    stand_in_journalctl(tmp_path, monkeypatch, "echo 'No permission' >&2; exit 1")
    assert cli.main(["logs"]) == 5
    assert "No permission" in capsys.readouterr().err
