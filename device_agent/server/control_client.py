"""The client's side of the control socket: requests that follow each other on one connection.

Python 3.8.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from device_agent import json_text
from device_agent.errors import AgentError, Refused

OnState = Callable[[str], None]


class Client:
    """Requests to the agent at the other end of a connection, which is closed with the client."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")

    @classmethod
    def connect(cls, path: Path) -> Client:
        """Connect to the agent that answers on ``path``.

        Raises:
            OSError: none does.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()

    def ask(self, message: Mapping[str, Any], on_state: OnState, body: Iterable[bytes] = ()) -> Any:
        """Send a request and wait for its result.

        Args:
            message: one request.
            on_state: called with each state that the agent reports.
            body: the bytes that follow the request.

        Raises:
            AgentError: what the agent answered, with its exit code; or it went away.
        """
        with suppress(BrokenPipeError, ConnectionResetError):  # its answer, or the lack of one, says why
            self._connection.sendall(json.dumps(dict(message)).encode() + b"\n")
            for part in body:
                self._connection.sendall(part)
        for line in iter(self._read_line, b""):
            answer = json_text.loads(line)
            if "ok" in answer:
                return _result(answer)
            if "state" in answer:
                on_state(str(answer["state"]))
        raise Refused("the agent went away", "it closed the connection before it answered", "look at its log")

    def _read_line(self) -> bytes:
        try:
            return self._lines.readline()
        except ConnectionResetError:
            return b""


def install(client: Client, bundle: Path, on_state: OnState, *, activate: bool, allow_downgrade: bool) -> Any:
    """Hand over a bundle that this process can read, though the agent may not, and have it installed.

    Args:
        client: the agent; it asks for no more than it lacks.
        bundle: a directory or a single file.
        on_state: called with each state that the agent reports.
        activate: whether to switch to it.
        allow_downgrade: take it though a newer version was committed.

    Raises:
        BadInput: it is missing, unreadable or malformed.
        AgentError: what the agent answered, with its exit code.
    """
    from device_agent.transfer.payload import prepare  # numpy, which other requests do without

    payload = prepare(bundle)
    choices = {"activate": activate, "allow_downgrade": allow_downgrade}
    message, body = payload.offer()
    offered = client.ask({**message, **choices}, on_state, [body])
    client.ask({"op": "receive"}, on_state, payload.chunks(offered["missing"]))
    return client.ask({"op": "install", "offered": True, **choices}, on_state)


def _result(answer: Mapping[str, Any]) -> Any:
    if answer["ok"]:
        return answer.get("result")
    error = AgentError(str(answer.get("what")), str(answer.get("why")), str(answer.get("fix")))
    error.exit_code = int(answer.get("exit_code", 1))
    raise error
