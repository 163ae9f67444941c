"""``edgekit-agent connect``: the agent's end of an SSH connection.

Standard input and output become a connection to the agent's control socket. Where no agent runs, this process
answers itself, on the store; so a device can be brought its first bundle before it ever serves.

The first line says what is at this end, for shells may print something before:

    {"edgekit": "connect", "version": "0.1.0", "serving": true}
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from contextlib import suppress
from typing import BinaryIO, Optional

from device_agent import __version__
from device_agent.config import Config
from device_agent.errors import AgentError, BadInput
from device_agent.server import control

_BLOCK_BYTES = 64 * 1024


def run(config: Config, source: BinaryIO, sink: BinaryIO) -> int:
    """Carry bytes between ``source`` and ``sink`` and the agent, until either side ends.

    Returns:
        0; 1 or more if there was nobody to connect to, which is then said on ``sink`` as an answer.
    """
    try:
        agent = _connect(config)
        if agent is None:
            _act(config, source, sink)
        else:
            _greet(sink, serving=True)
            _carry(agent, source, sink)
    except AgentError as error:
        _write_line(sink, control.failure(error))
        return error.exit_code
    return 0


def _connect(config: Config) -> Optional[socket.socket]:
    """A connection to the running agent; None where there is none."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(config.control_socket))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise BadInput(
            f"the agent cannot be asked over {config.control_socket}",
            error.strerror or str(error),
            "log in as the user that the agent runs as, or join its group: see docs/deploy.md",
        ) from error
    return connection


def _act(config: Config, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer in this process, on the store."""
    from device_agent.offline import lifecycle_of  # heavy, and not needed where an agent runs

    with lifecycle_of(config) as lifecycle:
        near, far = socket.socketpair()
        answering = threading.Thread(target=lambda: asyncio.run(control.answer(far, lifecycle)))
        answering.start()
        try:
            _greet(sink, serving=False)
            _carry(near, source, sink)
        finally:
            answering.join()


def _greet(sink: BinaryIO, *, serving: bool) -> None:
    _write_line(sink, {"edgekit": "connect", "version": __version__, "serving": serving})


def _write_line(sink: BinaryIO, message: object) -> None:
    sink.write(json.dumps(message).encode() + b"\n")
    sink.flush()


def _carry(agent: socket.socket, source: BinaryIO, sink: BinaryIO) -> None:
    """Copy both ways; ends when the agent closes, or when nobody listens to it any more."""
    with agent:
        threading.Thread(target=_send, args=(source, agent), daemon=True).start()
        with suppress(BrokenPipeError):
            for block in iter(lambda: agent.recv(_BLOCK_BYTES), b""):
                sink.write(block)
                sink.flush()
        with suppress(OSError):
            agent.shutdown(socket.SHUT_RDWR)


def _send(source: BinaryIO, agent: socket.socket) -> None:
    """Copy to the agent; what it does not want any more is dropped, since its answer says why."""
    with suppress(OSError):
        for block in iter(lambda: os.read(source.fileno(), _BLOCK_BYTES), b""):
            agent.sendall(block)
        agent.shutdown(socket.SHUT_WR)
