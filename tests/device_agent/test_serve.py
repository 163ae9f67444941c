"""The process as a whole: start, stop, and what clients see of it."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest
import tritonclient.http

from agent_testing import AgentProcess, linear_bundle

Start = Callable[..., AgentProcess]


def test_an_agent_without_models_is_ready(start_agent: Start) -> None:
    """A fresh device serves its health endpoints, and stops with exit code 0."""
    agent = start_agent()
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        assert client.is_server_ready()
        assert client.get_model_repository_index() == []
    assert agent.stop() == 0


def test_a_stop_under_load_loses_nothing(start_agent: Start, tmp_path: Path) -> None:
    """Clients that keep asking get an answer to every request until their connection is closed."""
    agent = start_agent(linear_bundle(tmp_path / "b"))
    host, port = agent.http.rsplit(":", 1)
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 8], "datatype": "FP32", "data": [1.0] * 8}]
    }).encode()  # fmt: skip
    whole = b"POST /v2/models/model/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    answered: List[int] = []
    problems: List[str] = []
    running = threading.Barrier(9)

    def client() -> None:
        count = 0
        with socket.create_connection((host, int(port)), timeout=20) as sock, sock.makefile("rb") as stream:
            while True:
                sock.sendall(whole)
                status = stream.readline()
                headers = b"".join(iter(stream.readline, b"\r\n"))
                if b" 200 " not in status:
                    problems.append(f"after {count} answers: {status!r}")
                    return
                stream.read(int(headers.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                count += 1
                if count == 20:
                    running.wait(20)
                if b"connection: close" in headers.lower():
                    answered.append(count)
                    return

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    running.wait(20)
    assert agent.stop() == 0
    for thread in threads:
        thread.join(20)
    assert problems == []
    assert len(answered) == 8
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the kernel likes
        socket.create_connection((host, int(port)), timeout=2).recv(1)


def test_idle_connections_do_not_hold_up_a_stop(start_agent: Start) -> None:
    """Open connections without a request are closed, and the agent ends."""
    agent = start_agent()
    host, port = agent.http.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        assert agent.stop() == 0
        assert sock.recv(1) == b""


def test_a_port_that_is_taken_is_an_error_of_three_lines(start_agent: Start, tmp_path: Path) -> None:
    """The agent says which address, why and what to do, without a traceback."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        root = tmp_path / "second"
        root.mkdir()
        agent = AgentProcess(root, f"[http]\nport = {port}\n")
        with pytest.raises(AssertionError, match=f"127.0.0.1:{port} cannot be listened on"):
            agent.start()
        assert agent.process.wait(timeout=20) == 4
        assert "Traceback" not in agent.log()


def test_models_come_back_after_a_restart(start_agent: Start, tmp_path: Path) -> None:
    """What was active before a stop, or a kill, serves after the next start."""
    agent = start_agent(linear_bundle(tmp_path / "b"))
    answers: List[Any] = []
    for end in (agent.stop, agent.kill, agent.stop):
        with tritonclient.http.InferenceServerClient(agent.http) as client:
            x = tritonclient.http.InferInput("x", [1, 8], "FP32")
            x.set_data_from_numpy(np.ones((1, 8), np.float32))
            answers.append(client.infer("model", [x]).as_numpy("scores").tolist())
        end()
        agent.start()
    assert answers == [answers[0]] * 3
