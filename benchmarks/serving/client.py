"""A light HTTP client on plain sockets: the same prebuilt bytes each time, and little done with the answer.

Sending is blocking with a generous buffer, receiving is told by epoll. An answer whose head equals the last
one's byte for byte is not parsed again. All times are seconds of ``time.perf_counter``.
"""

from __future__ import annotations

import gc
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from serving.wire import Head, parse_head

Address = tuple[str, int]

_BUFFER_BYTES = 1 << 20
_RECEIVE_BYTES = 1 << 14  # beyond 128 KiB, malloc would map fresh memory each time
TIMEOUT_S = 10.0


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        latencies_s: of the answers with status 200.
        refused_s: of the answers with status 503.
        failed: answers with any other status.
        lost: requests that were sent whole and never answered.
        unanswered_s: how long those had waited that had no answer when an open loop ended.
        seconds: how long it took.
        told_to_close: connections whose end the server announced in its last answer.
        dropped: connections that the server closed while nothing was asked on them.
        refused_connections: attempts to connect that were turned away.
        last_answer_s: when the last answer came; zero: never.
    """

    latencies_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    unanswered_s: list[float] = field(default_factory=list)
    failed: int = 0
    lost: int = 0
    seconds: float = 0.0
    told_to_close: int = 0
    dropped: int = 0
    refused_connections: int = 0
    last_answer_s: float = 0.0

    @property
    def rate(self) -> float:
        """Good answers each second."""
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0

    def record(self, status: int, latency_s: float) -> None:
        """Count one answer."""
        if status == 200:
            self.latencies_s.append(latency_s)
        elif status == 503:
            self.refused_s.append(latency_s)
        else:
            self.failed += 1


def ask(address: Address, request: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """Send one request on a connection of its own, and return the whole answer.

    Raises:
        OSError: nobody answered.
    """
    with connect(address, timeout_s) as connection:
        connection.sendall(request)
        data = bytearray()
        while True:
            head = parse_head(data)
            if head is not None and len(data) >= head.total_bytes:
                return bytes(data)
            part = connection.recv(_RECEIVE_BYTES)
            if not part:
                raise ConnectionResetError("the server closed the connection before it answered")
            data += part


def ping(address: Address, request: bytes, count: int) -> list[float]:
    """Ask ``count`` times on one connection, each after the answer before; latencies in seconds.

    Raises:
        OSError: the server closed the connection.
        RuntimeError: an answer was not a 200.
    """
    latencies_s = []
    with connect(address) as connection, no_collection():
        reader = Reader(connection)
        for _ in range(count):
            begin = perf_counter()
            connection.sendall(request)
            while (status := reader.receive()) is None:
                pass
            latencies_s.append(perf_counter() - begin)
            if status != 200:
                raise RuntimeError(f"a request was answered with {status}")
    return latencies_s


class Reader:
    """Receives answers from one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.closes = False
        self._receive = connection.recv
        self._known = b""  # the last head
        self._known_answer: Head | None = None
        self._data = bytearray()

    def receive(self) -> int | None:
        """Receive what is there, waiting if nothing is.

        Returns:
            The status, if an answer is whole.

        Raises:
            ConnectionResetError: the server closed the connection.
        """
        part = self._receive(_RECEIVE_BYTES)
        if not part:
            raise ConnectionResetError("closed by the server")
        known = self._known_answer
        if known and not self._data and len(part) == known.total_bytes and part.startswith(self._known):
            return known.status
        self._data += part
        head = parse_head(self._data)
        if head is None or len(self._data) < head.total_bytes:
            return None
        self._known, self._known_answer = bytes(self._data[: head.head_bytes]), head
        self.closes = head.closes
        del self._data[: head.total_bytes]
        return head.status


class Connection:
    """A connection of a loop.

    Attributes:
        asked_s: since when its request counts.
        waiting: whether an answer is due.
        kind: which of several requests it carries.
    """

    __slots__ = ("asked_s", "kind", "reader", "send", "sock", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = Reader(sock)
        self.send = sock.sendall
        self.asked_s = 0.0
        self.waiting = False
        self.kind = 0


def connect(address: Address, timeout_s: float = TIMEOUT_S) -> socket.socket:
    """Connect; whatever blocks for longer than ``timeout_s`` on the connection is an ``OSError``."""
    connection = socket.create_connection(address, timeout=timeout_s)
    connection.settimeout(None)  # blocking in Python; the kernel keeps the time, which costs nothing
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    limit = struct.pack("ll", int(timeout_s), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)
    return connection


@contextmanager
def no_collection() -> Iterator[None]:
    """A collection of garbage in the client would look like a slow server."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
