"""Messages between the agent and an engine process: a length, a kind, and what belongs to it.

    agent -> OPEN {source, settings}    engine -> READY {inputs, ...} or REFUSED {what, why, fix}
    agent -> RUN header                 engine -> DONE header, FAILED text or BAD_INPUT text

The headers are those of :mod:`device_agent.engines.process_memory`. One message is under way at a time.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, Dict, Tuple

OPEN, READY, REFUSED, RUN, DONE, FAILED, BAD_INPUT = range(1, 8)

_HEAD = struct.Struct("<IB")
_LONGEST_BYTES = 16 * 1024 * 1024


class ConnectionLost(Exception):
    """The other process is gone."""


def send(channel: socket.socket, kind: int, body: bytes = b"") -> None:
    """Send a message.

    Raises:
        ConnectionLost: nobody reads any more.
        socket.timeout: the channel's timeout passed.
    """
    try:
        channel.sendall(_HEAD.pack(len(body), kind) + body)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ConnectionLost from error


def send_json(channel: socket.socket, kind: int, document: Dict[str, Any]) -> None:
    """Send a message whose body is a JSON object; raises as ``send``."""
    send(channel, kind, json.dumps(document).encode())


def receive(channel: socket.socket) -> Tuple[int, bytes]:
    """Wait for a message.

    Returns:
        Its kind and its body.

    Raises:
        ConnectionLost: the other end was closed, or talks nonsense.
        socket.timeout: the channel's timeout passed.
    """
    length, kind = _HEAD.unpack(_exactly(channel, _HEAD.size))
    if length > _LONGEST_BYTES:
        raise ConnectionLost
    return kind, _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = b""
    while len(parts) < count:
        try:
            part = channel.recv(count - len(parts))
        except ConnectionResetError as error:
            raise ConnectionLost from error
        if not part:
            raise ConnectionLost
        parts += part
    return parts
