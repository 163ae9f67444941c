"""Administration over a Unix socket: one JSON object a line each way.

    -> {"op": "install", "bundle": "/path/on/this/device", "activate": true}
    <- {"state": "verified"}
    <- {"state": "staged"}
    <- {"ok": true, "result": {...}}
    <- {"ok": false, "what": "...", "why": "...", "fix": "...", "exit_code": 5}

Operations and their arguments: ``install`` (bundle, activate, allow_downgrade), ``activate`` (digest),
``rollback`` (name), ``remove`` (digest), ``trust`` (document: the text of a rotation document), ``list``,
``status``, ``keys``, ``agent``. The socket's file permissions are the access control: unless the
configuration says otherwise, it belongs to its owner alone. Several requests may follow each other on one
connection. Who asked for a change is logged. How a bundle comes over a connection is in
``device_agent.transfer.session``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import platform
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional

from device_agent import __version__, json_text
from device_agent.errors import AgentError, BadInput
from device_agent.lifecycle import Lifecycle
from device_agent.server.control_client import Client
from device_agent.server.unix_socket import bind, peer_of, unlinked
from device_agent.transfer.incoming import Incoming
from device_agent.transfer.session import OPERATIONS as TRANSFERS
from device_agent.transfer.session import Session

MAX_LINE_BYTES = 64 * 1024

_log = logging.getLogger(__name__)
_Handler = Callable[[Lifecycle, "_Arguments", Callable[[str], None]], Any]


async def start(
    path: Path, lifecycle: Lifecycle, mode: int = 0o600, passed: Optional[socket.socket] = None
) -> asyncio.AbstractServer:
    """Answer on the Unix socket ``path``, and make the lifecycle's switches on the running loop.

    The socket has its mode from the moment it exists; a missing parent directory is created with 0700, or
    0755 where the group may connect; a socket that no process listens on is replaced.

    Args:
        path: where the socket is made.
        lifecycle: what is administered.
        mode: the socket's permissions.
        passed: a socket that the service manager opened and keeps open, in the place of ``path``.

    Raises:
        Refused: another agent answers there.
        BadInput: something else than a socket is in the way, or the path cannot be used.
    """
    listener = passed or bind(path, mode, "control_socket")
    lifecycle.bind(asyncio.get_running_loop())
    connections = _Connections(lifecycle)
    kept = unlinked(passed is not None)
    return await asyncio.start_unix_server(connections.serve, sock=listener, limit=MAX_LINE_BYTES, **kept)


async def answer(connection: socket.socket, lifecycle: Lifecycle) -> None:
    """Answer on one connection until its other end is closed; where no agent runs."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES)
    await _Connections(lifecycle).serve(reader, writer)


def request(path: Path, message: Mapping[str, Any], on_state: Callable[[str], None]) -> Any:
    """Ask the agent that answers on ``path`` one thing.

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
    with Client.connect(path) as client:
        return client.ask(message, on_state)


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


def _agent(lifecycle: Lifecycle, arguments: _Arguments, on_state: Callable[[str], None]) -> Any:
    """What a fleet's owner asks every device."""
    arguments.end()
    return {
        "version": __version__,
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "models": lifecycle.status(),
    }


_OPERATIONS: Dict[str, _Handler] = {
    "install": _install,
    "activate": _activate,
    "rollback": _rollback,
    "remove": _remove,
    "trust": _trust,
    "list": _list,
    "status": _status,
    "keys": _keys,
    "agent": _agent,
}
_REPORTS = ("list", "status", "keys", "agent")


# Connections


class _Connections:
    """Serves connections; changes and reports have a thread each, so that a long update hides nothing."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="control-change")
        self._reports = ThreadPoolExecutor(1, thread_name_prefix="control-report")
        self._transfers = ThreadPoolExecutor(1, thread_name_prefix="control-transfer")
        self._incoming = Incoming(lifecycle)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self._incoming, self._transfers, reader)
        try:
            while True:
                line = await self._read_line(reader, writer)
                if line is None or not await self._answer(line, session, writer):
                    break
                await writer.drain()
        except ConnectionError:
            _log.info("a control client went away")
        finally:
            session.close()
            writer.close()

    async def _read_line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Optional[bytes]:
        try:
            return await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            _send(writer, failure(_bad_request(f"a line is longer than {MAX_LINE_BYTES} bytes")))
            await writer.drain()
            return None

    async def _answer(self, line: bytes, session: Session, writer: asyncio.StreamWriter) -> bool:
        """Carry out one request; return whether another can follow it."""
        message: Mapping[str, Any] = {}
        try:
            message = _parse(line)
            result = await self._carry_out(message, session, writer)
        except AgentError as error:
            _send(writer, failure(error))
            # The bytes that follow such a request are unread: what comes next cannot be told from them.
            return message.get("op") not in TRANSFERS
        except ConnectionError:
            raise
        except Exception as error:  # the agent must answer and go on, whatever an engine raised
            _log.exception("a control request failed unexpectedly")
            why = f"{type(error).__name__}: {error}"
            _send(writer, failure(AgentError("the agent failed unexpectedly", why, "look at its log")))
            return message.get("op") not in TRANSFERS
        _send(writer, {"ok": True, "result": result})
        return True

    async def _carry_out(
        self, message: Mapping[str, Any], session: Session, writer: asyncio.StreamWriter
    ) -> Any:
        loop = asyncio.get_running_loop()
        operation = message.get("op")
        pool = self._reports if operation in _REPORTS else self._changes

        def on_state(state: str) -> None:
            loop.call_soon_threadsafe(_send, writer, {"state": state})

        async def run(arguments: Mapping[str, Any]) -> Any:
            return await loop.run_in_executor(pool, perform, self._lifecycle, arguments, on_state)

        if operation not in _REPORTS:
            _log.info("%s, asked for by %s", operation, peer_of(writer.get_extra_info("socket")))
        if operation == "offer":
            return await session.offer(message)
        if operation == "receive":
            return await session.receive(partial(_send, writer))
        if operation == "install" and message.get("offered") is True:
            rest = {key: value for key, value in message.items() if key != "offered"}
            return await session.install(lambda path: run({**rest, "bundle": path}))
        return await run(message)


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        message = json_text.loads(line)
    except ValueError as error:
        raise _bad_request("the line is not JSON") from error
    if not isinstance(message, dict):
        raise _bad_request("the line is not a JSON object")
    return message


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")


def failure(error: AgentError) -> Dict[str, Any]:
    """The answer that carries an error to the client."""
    return {
        "ok": False,
        "what": error.what,
        "why": error.why,
        "fix": error.fix,
        "exit_code": error.exit_code,
    }


def _bad_request(why: str) -> BadInput:
    return BadInput("the control request is malformed", why, "see docs/lifecycle.md for the requests")
