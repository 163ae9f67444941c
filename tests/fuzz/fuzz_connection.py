"""Fuzz target: one connection, fed with requests and nonsense, cut anywhere, under every event of a socket.

Around the real connection stand doubles of what it stands on: transport, event loop and clock, each as
strict as the original. What must hold: nothing raises; nothing is written after the end; answers come in
order and belong to their requests; a request is seen exactly as it was sent; nothing is seen behind a request
whose framing is ambiguous; and a client that keeps to the protocol gets every answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fuzz_choices import Choices

from device_agent.config import Limits
from device_agent.server import connection as connection_module
from device_agent.server.connection import Connection
from device_agent.server.http import HttpServer
from device_agent.server.request import Request

LIMITS = Limits(max_body_bytes=20_000, header_timeout_s=10.0, idle_timeout_s=75.0)
STATUSES = {200, 400, 408, 413, 431, 501}
_MAX_TURNS = 400


class Broken(Exception):
    """The agent did what it must not."""


class Clock:
    """A clock that is set by hand; takes the place of the module ``time``."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        """The time that it shows."""
        return self.now_s


class Loop:
    """An event loop that only keeps what shall be called."""

    def __init__(self) -> None:
        self.ready: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    def call_soon(self, callback: Callable[..., Any], *arguments: Any) -> None:
        """Keep a callback."""
        self.ready.append((callback, arguments))

    def turn(self) -> None:
        """Call what was kept until now."""
        for _ in range(len(self.ready)):
            callback, arguments = self.ready.popleft()
            callback(*arguments)


class Transport:
    """As asyncio's: writes are kept, the end comes in a later turn of the loop."""

    def __init__(self, loop: Loop) -> None:
        self.written = bytearray()
        self.reading = True
        self.ended = False  # our side
        self.closing = False
        self.lost = False
        self.connection: Connection | None = None
        self._loop = loop

    def write(self, data: bytes) -> None:
        """Keep the data."""
        if self.ended or self.closing:
            raise Broken("written after the end")
        self.written += data

    def pause_reading(self) -> None:
        """Stop the feeder."""
        self.reading = False

    def resume_reading(self) -> None:
        """Let the feeder go on."""
        self.reading = True

    def can_write_eof(self) -> bool:
        """As a plain socket can."""
        return True

    def write_eof(self) -> None:
        """End our side."""
        if self.closing:
            raise Broken("ended after it was closed")
        self.ended = True

    def close(self) -> None:
        """Close when everything is written."""
        if not self.closing:
            self.closing = True
            self._loop.call_soon(self.lose, None)

    abort = close

    def lose(self, error: Exception | None) -> None:
        """Tell the connection that it is over."""
        self.closing = True
        if not self.lost and self.connection is not None:
            self.lost = True
            self.connection.connection_lost(error)


@dataclass(frozen=True)
class Piece:
    """A part of what a client sends.

    Attributes:
        data: the bytes.
        sees: target and body of the request that this is; None: it is none.
        open_end: whether nobody can say what the agent must make of it.
        last: whether the client says that it is its last request.
    """

    data: bytes
    sees: tuple[bytes, bytes] | None = None
    open_end: bool = False
    last: bool = False


_AMBIGUOUS = (
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\nContent-Length: 5\r\n",
    b"Content-Length: 5, 5\r\n",
    b"Content-Length: 0x5\r\n",
    b"Content-Length: -5\r\n",
    b"Content-Length: 99999999999999999999999\r\n",
    b"Content-Length: 50000\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: chunked, gzip\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding : chunked\r\n",
    b" folded: x\r\n",
    b"X: " + b"a" * 50_000 + b"\r\n",
)
_EXTRA = (
    b"", b"", b"X: y\r\n", b"Expect: 100-continue\r\n", b"Inference-Header-Content-Length: 7\r\n",
    b"Inference-Header-Content-Length: " + b"9" * 5000 + b"\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"Connection: close\r\n", b"Connection: keep-alive\r\n", b"Empty:\r\n", b"X: 1\r\nX: 2\r\n",
)  # fmt: skip
_SIZES = (0, 1, 5, 100, 300, 300, 300, 17_000)


def _request(c: Choices, number: int) -> Piece:
    extra = c.pick(_EXTRA)
    head = b"POST /%d HTTP/1.1\r\nHost: d\r\n%s" % (number, extra)
    body = (c.take(4) or b"ab") * 10_000
    body = body[: c.pick(_SIZES)]
    way = c.below(4)
    if way == 0:
        data, body = head + b"\r\n", b""
    elif way == 1:
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + _chunks(c, body)
    else:
        data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    return Piece(data, (b"/%d" % number, body), last=b"close" in extra)


def _chunks(c: Choices, body: bytes) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = max(1, c.pick((len(body), 1, 7, 4000)))
        if len(parts) > 50:
            size = len(body)
        piece = body[at : at + size]
        parts.append(b"%x%s\r\n%s\r\n" % (len(piece), c.pick((b"", b"", b";a=b")), piece))
        at += len(piece)
    trailer = c.pick((b"", b"", b"", b"Content-Encoding: gzip\r\n", b"X: y\r\n"))
    return b"".join(parts) + b"0\r\n" + trailer + b"\r\n"


def _pieces(c: Choices) -> Iterator[Piece]:
    for number in range(1 + c.below(5)):
        kind = c.below(8)
        if kind == 5:
            hidden = b"5\r\nhello\r\n0\r\n\r\nGET /hidden HTTP/1.1\r\n\r\n"
            yield Piece(b"POST /bad HTTP/1.1\r\n%s\r\n%s" % (c.pick(_AMBIGUOUS), hidden))
        elif kind == 6:
            whole = bytearray(_request(c, number).data)
            for _ in range(1 + c.below(3)):
                whole[(c.byte() * 256 + c.byte()) % len(whole)] = c.byte()
            yield Piece(bytes(whole), open_end=True)
        elif kind == 7:
            yield Piece(c.take(c.below(64)), open_end=True)
        else:
            yield _request(c, number)


class _Exchange:
    """A connection, and the client of it."""

    def __init__(self, data: bytes) -> None:
        self.c = Choices(data)
        self.loop, self.clock = Loop(), Clock()
        self.transport = Transport(self.loop)
        self.seen: list[tuple[bytes, bytes]] = []
        self.waiting = False
        self.cancelled = 0
        self.quiet = True  # the client neither went away nor let time pass nor stopped reading
        self.mode = self.c.below(3)
        self.connection = Connection(HttpServer(self._handle, LIMITS, self._count))
        self.transport.connection = self.connection

    def _count(self, status: int) -> None:
        if status not in STATUSES:
            raise Broken(f"status {status}")

    def _handle(self, request: Request, connection: Connection) -> None:
        if self.waiting:
            raise Broken("two requests at once")
        if self.transport.lost:
            raise Broken("a request of a client that is gone")
        self.waiting = True
        self.seen.append((request.target, bytes(request.body)))
        connection.on_cancel = self._cancel
        if self.mode == 0:
            self.answer()
        elif self.mode == 1:
            self.loop.call_soon(self.answer)

    def _cancel(self) -> None:
        self.cancelled += 1
        self.waiting = False

    def answer(self) -> None:
        """Answer the request that waits."""
        if self.waiting:
            self.waiting = False
            self.connection.respond(200, [b"%d" % (len(self.seen) - 1)])

    def feed(self, data: bytes) -> bytes:
        """Give the connection what it has room for; return the rest."""
        transport = self.transport
        if transport.closing or not transport.reading:
            return data
        buffer = self.connection.get_buffer(-1)
        count = min(len(buffer), len(data))
        if not count:
            raise Broken("no room to read into")
        buffer[:count] = data[:count]
        self.connection.buffer_updated(count)
        return data[count:]

    def event(self) -> None:
        """Something else happens."""
        kind = self.c.below(32)
        if kind < 12:
            self.loop.turn()
        elif kind < 20:
            self.answer()
        elif kind == 20 and not self.transport.closing:
            self.connection.pause_writing()
            self.loop.call_soon(self._resume)
        elif kind == 21:
            self.clock.now_s += self.c.pick((0.1, 3.0, 11.0, 80.0))
            self.quiet = False
            self.connection.close_if_overdue(self.clock.now_s)
        elif kind == 22:
            self.quiet = False
            self.loop.call_soon(self.transport.lose, ConnectionResetError())
        elif kind == 23:
            self.quiet = False
            if not self.transport.closing and self.transport.reading and not self.connection.eof_received():
                self.transport.close()
        elif kind == 24:
            self.quiet = False
            self.connection._server.draining = True
            self.connection.close_if_idle()

    def _resume(self) -> None:
        if not self.transport.lost:
            self.connection.resume_writing()

    def finish(self, rest: bytes) -> bytes:
        """Let everything that is under way come to its end; return what was never read."""
        for _ in range(_MAX_TURNS):
            if not self.loop.ready and not self.waiting and (not rest or self.transport.closing):
                break
            if rest:
                rest = self.feed(rest)
            self.loop.turn()
            self.answer()
        return rest


def run(data: bytes) -> str:
    """One execution.

    Returns:
        What came of it: ``open``, ``ended`` or ``lost``.

    Raises:
        Exception: whatever it is, it is a bug.
    """
    exchange = _Exchange(data)
    before = asyncio._get_running_loop()
    asyncio._set_running_loop(exchange.loop)  # type: ignore[arg-type]  # a double
    connection_module.time = exchange.clock  # type: ignore[assignment]  # likewise
    try:
        exchange.connection.connection_made(exchange.transport)  # type: ignore[arg-type]  # likewise
        pieces = list(_pieces(exchange.c))
        rest = _play(exchange, b"".join(piece.data for piece in pieces))
        _check(exchange, pieces, rest)
        if not exchange.transport.lost:
            exchange.transport.lose(None)
            if exchange.connection._server.connections:
                raise Broken("a connection that is over is still counted")
            return "ended" if exchange.transport.ended else "open"
        return "lost"
    finally:
        asyncio._set_running_loop(before)


def _play(exchange: _Exchange, stream: bytes) -> bytes:
    c, position = exchange.c, 0
    while position < len(stream) and c.left:
        size = c.pick((1, 2, 16, 300, 5000, 50_000, 50_000))
        part = stream[position : position + size]
        rest = exchange.feed(part)
        position += len(part) - len(rest)
        exchange.event()
        if exchange.transport.closing:
            break
    return exchange.finish(stream[position:])


def _check(exchange: _Exchange, pieces: list[Piece], rest: bytes) -> None:
    certain = [piece.sees for piece in _certain(pieces)]
    seen = exchange.seen
    for got, sent in zip(seen, certain, strict=False):
        if got != sent:
            raise Broken(f"{got[0]!r} with {len(got[1])} bytes was seen, not {sent and sent[0]!r}")
    if len(seen) > len(certain) and not any(piece.open_end for piece in pieces[: len(certain) + 1]):
        raise Broken(f"{seen[len(certain)]} was seen, which is no request")
    bodies = _answers(bytes(exchange.transport.written))
    if bodies != [b"%d" % number for number in range(len(bodies))]:
        raise Broken(f"answers out of order: {bodies}")
    if exchange.quiet and (len(seen) < len(certain) or len(bodies) < len(seen)):
        raise Broken(
            f"{len(certain)} sent, {len(seen)} seen, {len(bodies)} answered, {len(rest)} bytes unread"
        )


def _certain(pieces: list[Piece]) -> Iterator[Piece]:
    """The requests that stand before anything unclear."""
    for piece in pieces:
        if piece.sees is None:
            return
        yield piece
        if piece.last:
            return


def _answers(written: bytes) -> list[bytes]:
    """The bodies of all answers with status 200; an error may only be the last."""
    bodies = []
    while written:
        head, end, rest = written.partition(b"\r\n\r\n")
        if head == b"HTTP/1.1 100 Continue":
            written = rest
            continue
        if not end or b"\r\nContent-Length: " not in head:
            raise Broken(f"no answer: {head[:80]!r}")
        size = int(head.split(b"\r\nContent-Length: ")[1].split(b"\r\n")[0])
        status = int(head.split(b" ", 2)[1])
        if len(rest) < size or status not in STATUSES:
            raise Broken(f"status {status}, {len(rest)} of {size} bytes")
        written = rest[size:]
        if status == 200:
            bodies.append(rest[:size])
        elif written:
            raise Broken(f"an answer after a {status}")
    return bodies


def seeds() -> Iterator[bytes]:
    """Small inputs that reach every kind of request and event."""
    for mode in range(3):
        for kind in range(8):
            yield bytes([mode, 2, kind, kind, 1, 2, 3, 4, kind % 6, kind % 4, 0, 5, 20, 4, 12, 5, kind + 12])
            yield bytes(
                [mode, 4, 0, kind, 97, 98, 99, 100, 4, 2, kind, 0, 97, 98, 99, 100, 5, 1, 0, 5, 20, 3, 12, 6]
            )
