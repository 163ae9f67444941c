"""Clients that wait: each sends its next request when its last one is answered."""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from time import perf_counter

from serving.client import TIMEOUT_S, Address, Connection, Outcome, connect, no_collection

_POLL_S = 0.05


class ClosedLoop:
    """Clients that each send their next request when the last is answered.

    A client whose connection ends makes a new one; if that is turned away, it gives up. For as long as they
    are connected no garbage is collected, between two runs neither: a server that is told to end meanwhile
    would take the pause for clients that have gone quiet.
    """

    def __init__(self, address: Address, requests: Sequence[bytes]) -> None:
        """Connect one client for each of ``requests``; each repeats its own."""
        self.outcome = Outcome()
        self._asks = True
        self._address = address
        self._requests = dict(enumerate(requests))
        self._epoll = select.epoll()
        self._connections: dict[int, tuple[int, Connection]] = {}
        for client in self._requests:
            self._open(client)

    def __enter__(self) -> ClosedLoop:
        self._quiet = ExitStack()
        self._quiet.enter_context(no_collection())
        return self

    def __exit__(self, *error: object) -> None:
        self._quiet.close()
        for _, connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()

    def run(self, seconds: float, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Go on for ``seconds``, until ``stop()`` holds, or until every client has given up."""
        begin = perf_counter()
        end = begin + seconds
        for number, open_connection in list(self._connections.values()):
            if not open_connection.waiting:
                self._ask(number, open_connection)
        while perf_counter() < end and self._connections and not stop():
            for descriptor, _ in self._epoll.poll(_POLL_S):
                self._ready(descriptor)
        self.outcome.seconds += perf_counter() - begin
        return self.outcome

    def collect(self, seconds: float = TIMEOUT_S) -> Outcome:
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

    def _ask(self, client: int, connection: Connection) -> None:
        connection.asked_s = perf_counter()
        connection.waiting = True
        try:
            connection.send(self._requests[client])
        except OSError:
            connection.waiting = False  # it was not sent whole, so nobody accepted it
            self._ended(client, connection)

    def _ended(self, client: int, connection: Connection) -> None:
        self.outcome.lost += connection.waiting
        self.outcome.told_to_close += connection.reader.closes
        self.outcome.dropped += not connection.waiting and not connection.reader.closes
        del self._connections[connection.sock.fileno()]
        connection.sock.close()
        fresh = self._open(client) if self._asks else None
        if fresh is not None:
            self._ask(client, fresh)

    def _open(self, client: int) -> Connection | None:
        try:
            connection = Connection(connect(self._address))
        except OSError:
            self.outcome.refused_connections += 1
            return None
        descriptor = connection.sock.fileno()
        self._connections[descriptor] = (client, connection)
        self._epoll.register(descriptor, select.EPOLLIN)
        return connection
