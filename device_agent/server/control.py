"""Administration over a Unix socket: one JSON object a line each way.

    -> {"op": "install", "bundle": "/path/on/this/device", "activate": true}
    <- {"state": "verified"}
    <- {"state": "staged"}
    <- {"ok": true, "result": {...}}
    <- {"ok": false, "what": "...", "why": "...", "fix": "...", "exit_code": 5}

Operations and their arguments: ``install`` (bundle, activate, allow_downgrade), ``activate`` (digest),
``rollback`` (name), ``remove`` (digest), ``trust`` (document: the text of a rotation document), ``list``,
``status``, ``keys``. The socket's file permissions are the access control: it belongs
to its owner alone. Several requests may follow each other on one connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from device_agent.errors import AgentError, BadInput, Refused
from device_agent.lifecycle import Lifecycle
from device_agent.server.unix_socket import bind, unlinked

MAX_LINE_BYTES = 64 * 1024

_log = logging.getLogger(__name__)
_Handler = Callable[[Lifecycle, "_Arguments", Callable[[str], None]], Any]


async def start(
    path: Path, lifecycle: Lifecycle, passed: Optional[socket.socket] = None
) -> asyncio.AbstractServer:
    """Answer on the Unix socket ``path``, and make the lifecycle's switches on the running loop.

    The socket has mode 0600 from the moment it exists; a missing parent directory is created with 0700; a
    socket that no process listens on is replaced.

    Args:
        path: where the socket is made.
        lifecycle: what is administered.
        passed: a socket that the service manager opened and keeps open, in the place of ``path``.

    Raises:
        Refused: another agent answers there.
        BadInput: something else than a socket is in the way, or the path cannot be used.
    """
    listener = passed or bind(path, 0o600, "control_socket")
    lifecycle.bind(asyncio.get_running_loop())
    connections = _Connections(lifecycle)
    kept = unlinked(passed is not None)
    return await asyncio.start_unix_server(connections.serve, sock=listener, limit=MAX_LINE_BYTES, **kept)


def request(path: Path, message: Mapping[str, Any], on_state: Callable[[str], None]) -> Any:
    """Ask the agent that answers on ``path``; the client's side of ``start``.

    Args:
        path: the socket.
        message: one request.
        on_state: called with each state that the agent reports.

    Returns:
        The agent's result.

    Raises:
        OSError: no agent answers.
        AgentError: what the agent answered, with its exit code.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        client.sendall(json.dumps(dict(message)).encode() + b"\n")
        with client.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                if "ok" in answer:
                    return _result(answer)
                on_state(str(answer.get("state")))
    raise Refused("the agent went away", "it closed the connection before it answered", "look at its log")


def perform(lifecycle: Lifecycle, message: Mapping[str, Any], on_state: Callable[[str], None]) -> Any:
    """Carry out one request; blocks until it is done.

    Returns:
        A result that JSON can hold.

    Raises:
        BadInput: the request is malformed.
        AgentError: what the operation raises.
    """
    arguments = dict(message)
    operation = arguments.pop("op", None)
    if not isinstance(operation, str) or operation not in _OPERATIONS:
        raise _bad_request(f"the operation {operation!r} is not one of: {', '.join(_OPERATIONS)}")
    return _OPERATIONS[operation](lifecycle, _Arguments(arguments), on_state)


def _result(answer: Mapping[str, Any]) -> Any:
    if answer["ok"]:
        return answer.get("result")
    error = AgentError(str(answer.get("what")), str(answer.get("why")), str(answer.get("fix")))
    error.exit_code = int(answer.get("exit_code", 1))
    raise error


# Operations


class _Arguments:
    """The arguments of a request, each used once and of the right type."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = dict(raw)

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._raw.pop(key, default)
        if type(value) is not kind:
            raise _bad_request(f"{key!r} is missing or not a {kind.__name__}")
        return value

    def end(self) -> None:
        if self._raw:
            raise _bad_request(f"the argument {next(iter(self._raw))!r} is unknown")


def _install(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    bundle, activate = arguments.take("bundle", str), arguments.take("activate", bool, True)
    allow_downgrade = arguments.take("allow_downgrade", bool, False)
    arguments.end()
    if not bundle.startswith("/") or "\0" in bundle:
        raise _bad_request("'bundle' is not an absolute path")
    return asdict(lifecycle.install(Path(bundle), activate, on_state, allow_downgrade=allow_downgrade))


def _activate(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    digest = arguments.take("digest", str)
    arguments.end()
    return asdict(lifecycle.activate(digest, on_state))


def _rollback(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    name = arguments.take("name", str)
    arguments.end()
    return asdict(lifecycle.rollback(name, on_state))


def _remove(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    digest = arguments.take("digest", str)
    arguments.end()
    return lifecycle.remove(digest).label()


def _trust(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    document = arguments.take("document", str)
    arguments.end()
    return asdict(lifecycle.rotate(document.encode("utf-8", "replace")))


def _keys(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    arguments.end()
    return lifecycle.trusted_keys()


def _list(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    arguments.end()
    return lifecycle.list()


def _status(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    arguments.end()
    return lifecycle.status()


_OPERATIONS: Dict[str, _Handler] = {
    "install": _install,
    "activate": _activate,
    "rollback": _rollback,
    "remove": _remove,
    "trust": _trust,
    "list": _list,
    "status": _status,
    "keys": _keys,
}
_REPORTS = ("list", "status", "keys")


# Connections


class _Connections:
    """Serves connections; changes and reports have a thread each, so that a long update hides nothing."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="control-change")
        self._reports = ThreadPoolExecutor(1, thread_name_prefix="control-report")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                line = await self._read_line(reader, writer)
                if line is None:
                    break
                await self._answer(line, writer)
                await writer.drain()
        except ConnectionError:
            _log.info("a control client went away")
        finally:
            writer.close()

    async def _read_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Optional[bytes]:
        try:
            return await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            _send(writer, _failure(_bad_request(f"a line is longer than {MAX_LINE_BYTES} bytes")))
            await writer.drain()
            return None

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()

        def on_state(state: str) -> None:
            loop.call_soon_threadsafe(_send, writer, {"state": state})

        try:
            message, pool = self._parse(line)
            result = await loop.run_in_executor(pool, perform, self._lifecycle, message, on_state)
        except AgentError as error:
            _send(writer, _failure(error))
        except Exception as error:  # the agent must answer and go on, whatever an engine raised
            _log.exception("a control request failed unexpectedly")
            why = f"{type(error).__name__}: {error}"
            _send(writer, _failure(AgentError("the agent failed unexpectedly", why, "look at its log")))
        else:
            _send(writer, {"ok": True, "result": result})

    def _parse(self, line: bytes) -> Tuple[Mapping[str, Any], ThreadPoolExecutor]:
        try:
            message = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _bad_request("the line is not JSON") from error
        if not isinstance(message, dict):
            raise _bad_request("the line is not a JSON object")
        return message, self._reports if message.get("op") in _REPORTS else self._changes


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def _failure(error: AgentError) -> Dict[str, Any]:
    return {
        "ok": False,
        "what": error.what,
        "why": error.why,
        "fix": error.fix,
        "exit_code": error.exit_code,
    }


def _bad_request(why: str) -> BadInput:
    return BadInput("the control request is malformed", why, "see docs/lifecycle.md for the requests")
