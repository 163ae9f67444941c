"""Administration over the control socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import threading
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List

import pytest

from control_kit import RunningControl
from device_agent.errors import AgentError, BadInput, Refused
from device_agent.journal import STATES
from device_agent.lifecycle import Lifecycle
from device_agent.server import control
from device_agent.signature import Trust
from device_agent.store import Store
from storage_kit import FakeModels, make_bundle, make_key, signed_bundle


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningControl]:
    """A running agent with a trusted key and no model."""
    running = RunningControl(tmp_path)
    yield running
    running.close()


def test_a_bundle_is_installed_over_the_socket(tmp_path: Path, agent: RunningControl) -> None:
    """Every state is reported while it happens, and the result names what serves now."""
    head = signed_bundle(tmp_path / "b", make_key(tmp_path / "keys"))
    states: List[str] = []
    result = agent.ask({"op": "install", "bundle": str(tmp_path / "b")}, states.append)
    assert tuple(states) == STATES
    assert (result["digest"], result["state"], result["signer"]) == (head.digest, "committed", "release")
    assert agent.models.get("demo").digest == head.digest


def test_every_operation_is_there(tmp_path: Path, agent: RunningControl) -> None:
    """A device can be administered through the socket alone."""
    key = make_key(tmp_path / "keys")
    digests = [signed_bundle(tmp_path / str(v), key, version=v).digest for v in (1, 2, 3)]
    for version in ("1", "2"):
        agent.ask({"op": "install", "bundle": str(tmp_path / version)})
    agent.ask({"op": "install", "bundle": str(tmp_path / "3"), "activate": False})
    assert {v["digest"]: v["active"] for v in agent.ask({"op": "list"})} == {
        digests[0]: False,
        digests[1]: True,
        digests[2]: False,
    }
    assert agent.ask({"op": "rollback", "name": "demo"})["digest"] == digests[0]
    assert agent.ask({"op": "activate", "digest": digests[2][:10]})["digest"] == digests[2]
    assert agent.ask({"op": "remove", "digest": digests[0]}) == {"name": "demo", "digest": digests[0]}
    (status,) = agent.ask({"op": "status"})
    assert (status["serving"], status["fallback"]) == (digests[2], None)


def test_a_refusal_comes_with_its_reason_and_exit_code(tmp_path: Path, agent: RunningControl) -> None:
    """What the device refuses arrives as the error that it raised there."""
    make_bundle(tmp_path / "unsigned")
    with pytest.raises(AgentError, match="is not signed") as untrusted:
        agent.ask({"op": "install", "bundle": str(tmp_path / "unsigned")})
    assert untrusted.value.exit_code == 2
    broken = signed_bundle(tmp_path / "broken", make_key(tmp_path / "keys"))
    agent.models.broken.append(broken.digest)
    with pytest.raises(AgentError, match="golden outputs") as refused:
        agent.ask({"op": "install", "bundle": str(tmp_path / "broken")})
    assert refused.value.exit_code == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "is not one of"),
        (b'{"op": 1}', "is not one of"),
        (b'{"op": "format"}', "is not one of"),
        (b'{"op": "install"}', "'bundle' is missing"),
        (b'{"op": "install", "bundle": "relative"}', "not an absolute path"),
        (b'{"op": "install", "bundle": "/x", "activate": 1}', "'activate' is missing or not a bool"),
        (b'{"op": "install", "bundle": "/x", "force": true}', "'force' is unknown"),
        (b'{"op": "install", "bundle": "/x\\u0000"}', "not an absolute path"),
        (b'{"op": "rollback", "name": "../../etc"}', "is not a model's name"),
        (b'{"op": "remove", "digest": "../../etc"}', "names no installed version"),
        (b'{"op": "list", "x": 1}', "'x' is unknown"),
    ],
)
def test_a_malformed_request_is_answered(agent: RunningControl, line: bytes, reason: str) -> None:
    """Whatever arrives is answered with an error of exit code 2, and the connection goes on."""
    bad, good = agent.send(line + b'\n{"op": "list"}\n')
    assert (bad["ok"], bad["exit_code"]) == (False, 2)
    assert reason in bad["why"] + bad["what"]
    assert good == {"ok": True, "result": []}


def test_an_endless_line_is_cut_off(agent: RunningControl) -> None:
    """A line beyond the limit is refused without being kept in memory."""
    try:
        (answer,) = agent.send(b"x" * (control.MAX_LINE_BYTES + 1))
        assert "longer than" in answer["why"]
    except (BrokenPipeError, ConnectionResetError):
        pass  # the agent hung up before everything was sent
    assert agent.ask({"op": "list"}) == []


def test_an_unexpected_error_is_answered(tmp_path: Path, agent: RunningControl) -> None:
    """If an engine raises what nobody foresaw, the client hears of it and the agent lives on."""
    signed_bundle(tmp_path / "b", make_key(tmp_path / "keys"))
    agent.models.prepare = None  # type: ignore[method-assign, assignment]  # calling it is a TypeError
    with pytest.raises(AgentError, match="failed unexpectedly") as caught:
        agent.ask({"op": "install", "bundle": str(tmp_path / "b")})
    assert caught.value.exit_code == 1
    assert agent.ask({"op": "list"}) == []


def test_a_status_does_not_wait_for_an_update(tmp_path: Path, agent: RunningControl) -> None:
    """While an engine is built, the agent still says what it serves."""
    signed_bundle(tmp_path / "b", make_key(tmp_path / "keys"))
    building, finish = threading.Event(), threading.Event()
    original = agent.models.prepare

    def build(*arguments: Any) -> Any:
        building.set()
        assert finish.wait(10)
        return original(*arguments)

    agent.models.prepare = build  # type: ignore[method-assign]  # the double takes its time
    message = {"op": "install", "bundle": str(tmp_path / "b")}
    update = threading.Thread(target=agent.ask, args=(message,))
    update.start()
    assert building.wait(10)
    assert agent.ask({"op": "status"})[0]["serving"] is None
    finish.set()
    update.join(10)
    assert agent.ask({"op": "status"})[0]["serving"] is not None


def test_a_client_that_goes_away_does_not_stop_its_update(tmp_path: Path, agent: RunningControl) -> None:
    """An update that began is finished, whether or not someone waits for the answer."""
    head = signed_bundle(tmp_path / "b", make_key(tmp_path / "keys"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(agent.path))
        client.sendall(json.dumps({"op": "install", "bundle": str(tmp_path / "b")}).encode() + b"\n")
        client.recv(1)
    with pytest.raises(AgentError):
        agent.ask({"op": "remove", "digest": "0" * 64})  # changes take turns: this one waited
    assert agent.models.get("demo").digest == head.digest


def test_the_socket_belongs_to_its_owner(agent: RunningControl) -> None:
    """Nobody but the owner can connect: file mode 0600 in a directory of mode 0700."""
    mode = agent.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert stat.S_IMODE(agent.path.parent.stat().st_mode) == 0o700


def _start(path: Path, lifecycle: Any) -> Any:
    """Serve, ask once for the list, and stop; return the answer."""

    async def start_and_stop() -> Any:
        server = await control.start(path, lifecycle)
        ask = partial(control.request, path, {"op": "list"}, lambda state: None)
        answer = await asyncio.get_running_loop().run_in_executor(None, ask)
        server.close()
        await server.wait_closed()
        return answer

    return asyncio.run(start_and_stop())


@pytest.fixture
def lifecycle(tmp_path: Path) -> Iterator[Any]:
    """A life cycle on a store of its own."""
    with Store(tmp_path / "second") as store:
        yield Lifecycle(store, Trust(tmp_path / "keys"), FakeModels())  # type: ignore[arg-type]  # double


def test_a_stale_socket_is_replaced(tmp_path: Path, lifecycle: Any) -> None:
    """A socket that a killed agent left is no hindrance."""
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(tmp_path / "control.sock"))
    stale.close()
    assert _start(tmp_path / "control.sock", lifecycle) == []


def test_a_living_agent_keeps_its_socket(agent: RunningControl, lifecycle: Any) -> None:
    """A second agent is refused, and the first goes on answering."""
    with pytest.raises(Refused, match="another agent answers"):
        _start(agent.path, lifecycle)
    assert agent.ask({"op": "list"}) == []


def test_a_file_in_the_way_is_not_deleted(tmp_path: Path, lifecycle: Any) -> None:
    """Only a socket is replaced; a path that is too long or not writable is an error that names it."""
    (tmp_path / "precious").write_bytes(b"data")
    with pytest.raises(BadInput, match="something else is there"):
        _start(tmp_path / "precious", lifecycle)
    assert (tmp_path / "precious").read_bytes() == b"data"
    with pytest.raises(BadInput, match="cannot be made"):
        _start(tmp_path / ("x" * 200), lifecycle)
    assert os.listdir(str(tmp_path / "second" / "models")) == []
