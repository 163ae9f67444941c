"""HTTP over a Unix-domain socket: who may connect, and what happens to what lies in its place."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Callable

import pytest

from agent_testing import AgentProcess, linear_bundle
from device_agent.errors import BadInput, Refused
from device_agent.server.unix_socket import bind


class UnixConnection(http.client.HTTPConnection):
    """The standard library's HTTP client on a Unix-domain socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def test_the_protocol_is_served_on_a_socket(start_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """Beside the TCP port, with the permissions that were asked for, and gone after the agent."""
    path = tmp_path / "made" / "http.sock"
    settings = f'[http]\nport = 0\nunix = "{path}"\nunix_mode = 0o620\n'
    agent = start_agent(linear_bundle(tmp_path / "bundle"), settings=settings)
    assert f"unix={path}" in agent.log()
    assert stat.S_IMODE(path.stat().st_mode) == 0o620
    connection = UnixConnection(path)
    for _ in range(2):  # also on a kept connection
        tensor = {"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [0.5] * 8}
        connection.request("POST", "/v2/models/model/infer", json.dumps({"inputs": [tensor]}))
        answer = connection.getresponse()
        assert answer.status == 200
        assert json.loads(answer.read())["outputs"][0]["shape"] == [1, 4]
    connection.close()
    assert agent.stop() == 0
    assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """What a crashed agent left behind keeps no new one from starting."""
    path = tmp_path / "s.sock"
    bind(path, 0o600, "http.unix").close()
    with bind(path, 0o660, "http.unix") as listener:
        listener.listen()
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    """A second agent is told that another one answers there."""
    path = tmp_path / "s.sock"
    with bind(path, 0o600, "http.unix") as listener:
        listener.listen()
        with pytest.raises(Refused, match="another agent"):
            bind(path, 0o600, "http.unix")
        assert path.is_socket()


def test_nothing_else_is_removed(tmp_path: Path) -> None:
    """A file in the way, or a path that no socket can have, is an error that names the setting."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=r"http\.unix"):
        bind(tmp_path / "file", 0o600, "http.unix")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(BadInput, match=r"http\.unix"):
        bind(tmp_path / ("long" * 50), 0o600, "http.unix")


def test_it_is_never_more_open_than_asked(tmp_path: Path) -> None:
    """Not even for a moment: whoever watches the directory never sees a wider mode."""
    seen, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            for entry in os.scandir(str(tmp_path)):
                try:
                    seen.add(stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode))
                except FileNotFoundError:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    before = os.umask(0)
    try:
        for number in range(200):
            bind(tmp_path / f"s{number % 5}.sock", 0o600, "http.unix").close()
    finally:
        os.umask(before)
        stop.set()
        watching.join()
    assert seen <= {0o600}
