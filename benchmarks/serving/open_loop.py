"""Clients that do not wait: requests are sent when they are due, whatever became of earlier ones."""

from __future__ import annotations

import math
import select
from collections import deque
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from serving.client import Address, Connection, Outcome, connect, no_collection


def send(
    address: Address, request: bytes, arrivals_s: Sequence[float], grace_s: float, connections: int = 256
) -> Outcome:
    """Send at given times whatever became of earlier requests, so that a slow server meets a growing queue.

    A latency counts from the time at which the request should have been sent. The loop has a core of its
    own, and sleeps where nothing is due.

    Args:
        address: of the server.
        request: what is sent.
        arrivals_s: ascending, from zero on.
        grace_s: how long to wait for answers after the last request; who has none then is ``unanswered_s``.
        connections: how many at most are open; beyond that, requests wait on the client's side.
    """
    return send_mixed(address, [request], arrivals_s, [0] * len(arrivals_s), grace_s, connections)[0]


def send_mixed(
    address: Address,
    requests: Sequence[bytes],
    arrivals_s: Sequence[float],
    kinds: Sequence[int],
    grace_s: float,
    connections: int = 256,
) -> list[Outcome]:
    """As :func:`send`, with requests of several kinds.

    Args:
        address: of the server.
        requests: one for each kind.
        arrivals_s: ascending, from zero on.
        kinds: which of ``requests`` is sent at each of these times.
        grace_s: how long to wait for answers after the last request.
        connections: how many at most are open.

    Returns:
        What became of each kind.
    """
    with _OpenLoop(address, requests, connections) as loop, no_collection():
        return loop.run(arrivals_s, kinds, grace_s)


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Ascending times of a Poisson process of ``rate`` a second, for ``seconds``."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=math.ceil(rate * seconds))
    times: list[float] = np.cumsum(gaps).tolist()
    return times


#: What waking up takes; the last of the wait is spent in the loop.
_SHORTEST_REST_S = 100e-6


class _OpenLoop:
    def __init__(self, address: Address, requests: Sequence[bytes], limit: int) -> None:
        self._address = address
        self._requests = requests
        self._limit = limit
        self._outcomes = [Outcome() for _ in requests]
        self._epoll = select.epoll()
        self._idle: list[Connection] = []
        self._waiting: dict[int, Connection] = {}
        self._backlog: deque[tuple[float, int]] = deque()

    def __enter__(self) -> _OpenLoop:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in [*self._idle, *self._waiting.values()]:
            connection.sock.close()
        self._epoll.close()

    def run(self, arrivals_s: Sequence[float], kinds: Sequence[int], grace_s: float) -> list[Outcome]:
        begin = perf_counter()
        due, count = 0, len(arrivals_s)
        now, give_up = begin, begin + arrivals_s[-1] + grace_s
        while now < give_up and (due < count or self._waiting or self._backlog):
            while due < count and begin + arrivals_s[due] <= now:
                self._backlog.append((begin + arrivals_s[due], kinds[due]))
                due += 1
            while self._backlog and self._send(*self._backlog[0]):
                self._backlog.popleft()
            self._rest((begin + arrivals_s[due] if due < count else give_up) - perf_counter())
            for descriptor, _ in self._epoll.poll(0):
                self._ready(descriptor)
            now = perf_counter()
        for outcome in self._outcomes:
            outcome.seconds = arrivals_s[-1]
        for connection in self._waiting.values():
            self._outcomes[connection.kind].unanswered_s.append(now - connection.asked_s)
        for scheduled_s, kind in self._backlog:
            self._outcomes[kind].unanswered_s.append(now - scheduled_s)
        return self._outcomes

    def _rest(self, until_due_s: float) -> None:
        """Sleep until an answer comes or a request is due: a client that spins slows a server beside it.

        ``select`` on the epoll itself, because epoll rounds its timeout up to a millisecond.
        """
        if until_due_s > _SHORTEST_REST_S:
            select.select([self._epoll], [], [], until_due_s - _SHORTEST_REST_S)

    def _send(self, scheduled_s: float, kind: int) -> bool:
        connection = self._take()
        if connection is None:
            return False
        connection.asked_s, connection.kind = scheduled_s, kind
        self._waiting[connection.sock.fileno()] = connection
        try:
            connection.send(self._requests[kind])
        except OSError:
            self._ended(connection)
        return True

    def _take(self) -> Connection | None:
        if self._idle:
            return self._idle.pop()
        if len(self._waiting) >= self._limit:
            return None
        try:
            connection = Connection(connect(self._address))
        except OSError:
            self._outcomes[0].refused_connections += 1
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
        self._outcomes[connection.kind].record(status, perf_counter() - connection.asked_s)
        del self._waiting[descriptor]
        if connection.reader.closes:
            connection.sock.close()
        else:
            self._idle.append(connection)

    def _ended(self, connection: Connection) -> None:
        del self._waiting[connection.sock.fileno()]
        connection.sock.close()
        self._outcomes[connection.kind].lost += 1

    def _forget_idle(self, descriptor: int) -> None:
        for connection in [c for c in self._idle if c.sock.fileno() == descriptor]:
            self._idle.remove(connection)
            connection.sock.close()
            self._outcomes[0].dropped += 1
