"""A light HTTP client on plain sockets: the same prebuilt bytes each time, and little done with the answer.

Sending is blocking with a generous buffer, receiving is told by epoll. An answer whose head equals the last
one's byte for byte is not parsed again. All times are seconds of ``time.perf_counter``.
"""

from __future__ import annotations

import gc
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from serving.wire import Head, parse_head

Address = tuple[str, int]

_BUFFER_BYTES = 1 << 20
_RECEIVE_BYTES = 1 << 18
_TIMEOUT_S = 10.0
_POLL_S = 0.05


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


def ask(address: Address, request: bytes, timeout_s: float = _TIMEOUT_S) -> bytes:
    """Send one request on a connection of its own, and return the whole answer.

    Raises:
        OSError: nobody answered.
    """
    with _connect(address, timeout_s) as connection:
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
    with _connect(address) as connection, _no_collection():
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


class _Connection:
    __slots__ = ("asked_s", "reader", "send", "sock", "waiting")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = Reader(sock)
        self.send = sock.sendall
        self.asked_s = 0.0
        self.waiting = False


class ClosedLoop:
    """Clients that each send their next request when the last is answered.

    A client whose connection ends makes a new one; if that is turned away, it gives up.
    """

    def __init__(self, address: Address, requests: Sequence[bytes]) -> None:
        """Connect one client for each of ``requests``; each repeats its own."""
        self.outcome = Outcome()
        self._asks = True
        self._address = address
        self._requests = dict(enumerate(requests))
        self._epoll = select.epoll()
        self._connections: dict[int, tuple[int, _Connection]] = {}
        for client in self._requests:
            self._open(client)

    def __enter__(self) -> ClosedLoop:
        return self

    def __exit__(self, *_: object) -> None:
        for _, connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()

    def run(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Go on for ``seconds``, until ``stop()`` holds, or until every client has given up."""
        begin = perf_counter()
        with _no_collection():
            end = begin + seconds
            for client, connection in list(self._connections.values()):
                if not connection.waiting:
                    self._ask(client, connection)
            while perf_counter() < end and self._connections and not stop():
                for descriptor, _ in self._epoll.poll(_POLL_S):
                    self._ready(descriptor)
        self.outcome.seconds += perf_counter() - begin
        return self.outcome

    def collect(self, seconds: float = _TIMEOUT_S) -> Outcome:
        """Ask nothing more, and wait for the answers that are due."""
        self._asks = False
        end = perf_counter() + seconds
        while perf_counter() < end and any(c.waiting for _, c in self._connections.values()):
            for descriptor, _ in self._epoll.poll(_POLL_S):
                self._ready(descriptor)
        return self.outcome

    def _ready(self, descriptor: int) -> None:
        client, connection = self._connections[descriptor]
        try:
            status = connection.reader.receive()
        except OSError:
            self._ended(client, connection)
            return
        if status is None:
            return
        now = perf_counter()
        connection.waiting = False
        outcome = self.outcome
        outcome.last_answer_s = now
        if status == 200:
            outcome.latencies_s.append(now - connection.asked_s)
        else:
            outcome.record(status, now - connection.asked_s)
        if connection.reader.closes:
            self._ended(client, connection)
        elif self._asks:
            self._ask(client, connection)

    def _ask(self, client: int, connection: _Connection) -> None:
        connection.asked_s = perf_counter()
        connection.waiting = True
        try:
            connection.send(self._requests[client])
        except OSError:
            connection.waiting = False  # it was not sent whole, so nobody accepted it
            self._ended(client, connection)

    def _ended(self, client: int, connection: _Connection) -> None:
        self.outcome.lost += connection.waiting
        self.outcome.told_to_close += connection.reader.closes
        self.outcome.dropped += not connection.waiting and not connection.reader.closes
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        fresh = self._open(client) if self._asks else None
        if fresh is not None:
            self._ask(client, fresh)

    def _open(self, client: int) -> _Connection | None:
        try:
            connection = _Connection(_connect(self._address))
        except OSError:
            self.outcome.refused_connections += 1
            return None
        descriptor = connection.sock.fileno()
        self._connections[descriptor] = (client, connection)
        self._epoll.register(descriptor, select.EPOLLIN)
        return connection


def open_loop(
    address: Address, request: bytes, arrivals_s: Sequence[float], grace_s: float, connections: int = 256
) -> Outcome:
    """Send at given times whatever became of earlier requests, so that a slow server meets a growing queue.

    A latency counts from the time at which the request should have been sent. The loop never sleeps: it has
    a core of its own.

    Args:
        address: of the server.
        request: what is sent.
        arrivals_s: ascending, from zero on.
        grace_s: how long to wait for answers after the last request; who has none then is ``unanswered_s``.
        connections: how many at most are open; beyond that, requests wait on the client's side.
    """
    with _OpenLoop(address, request, connections) as loop, _no_collection():
        return loop.run(arrivals_s, grace_s)


class _OpenLoop:
    def __init__(self, address: Address, request: bytes, limit: int) -> None:
        self._address = address
        self._request = request
        self._limit = limit
        self._outcome = Outcome()
        self._epoll = select.epoll()
        self._idle: list[_Connection] = []
        self._waiting: dict[int, _Connection] = {}
        self._backlog: deque[float] = deque()

    def __enter__(self) -> _OpenLoop:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in [*self._idle, *self._waiting.values()]:
            connection.sock.close()
        self._epoll.close()

    def run(self, arrivals_s: Sequence[float], grace_s: float) -> Outcome:
        begin = perf_counter()
        due, count = 0, len(arrivals_s)
        now, give_up = begin, begin + arrivals_s[-1] + grace_s
        while now < give_up and (due < count or self._waiting or self._backlog):
            while due < count and begin + arrivals_s[due] <= now:
                self._backlog.append(begin + arrivals_s[due])
                due += 1
            while self._backlog and self._send(self._backlog[0]):
                self._backlog.popleft()
            for descriptor, _ in self._epoll.poll(0):
                self._ready(descriptor)
            now = perf_counter()
        self._outcome.seconds = arrivals_s[-1]
        self._outcome.unanswered_s = [now - c.asked_s for c in self._waiting.values()]
        self._outcome.unanswered_s += [now - scheduled for scheduled in self._backlog]
        return self._outcome

    def _send(self, scheduled_s: float) -> bool:
        connection = self._take()
        if connection is None:
            return False
        connection.asked_s = scheduled_s
        self._waiting[connection.sock.fileno()] = connection
        try:
            connection.send(self._request)
        except OSError:
            self._ended(connection)
        return True

    def _take(self) -> _Connection | None:
        if self._idle:
            return self._idle.pop()
        if len(self._waiting) >= self._limit:
            return None
        try:
            connection = _Connection(_connect(self._address))
        except OSError:
            self._outcome.refused_connections += 1
            return None
        self._epoll.register(connection.sock.fileno(), select.EPOLLIN)
        return connection

    def _ready(self, descriptor: int) -> None:
        connection = self._waiting.get(descriptor)
        if connection is None:  # the server closed a connection that nothing was asked on
            self._forget_idle(descriptor)
            return
        try:
            status = connection.reader.receive()
        except OSError:
            self._ended(connection)
            return
        if status is None:
            return
        self._outcome.record(status, perf_counter() - connection.asked_s)
        del self._waiting[descriptor]
        if connection.reader.closes:
            connection.sock.close()
        else:
            self._idle.append(connection)

    def _ended(self, connection: _Connection) -> None:
        del self._waiting[connection.sock.fileno()]
        connection.sock.close()
        self._outcome.lost += 1

    def _forget_idle(self, descriptor: int) -> None:
        for connection in [c for c in self._idle if c.sock.fileno() == descriptor]:
            self._idle.remove(connection)
            connection.sock.close()
            self._outcome.dropped += 1


def _connect(address: Address, timeout_s: float = _TIMEOUT_S) -> socket.socket:
    connection = socket.create_connection(address, timeout=timeout_s)
    connection.settimeout(None)  # blocking in Python; the kernel keeps the time, which costs nothing
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    limit = struct.pack("ll", int(timeout_s), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)
    return connection


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection of garbage in the client would look like a slow server."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
