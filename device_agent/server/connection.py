"""One HTTP/1.1 client: an ``asyncio.BufferedProtocol`` around httptools.

A connection carries one request at a time; requests that a client sends ahead wait their turn. Clients that
send too slowly, too much or nonsense are answered where that is possible, and closed. A client that does not
read its answers is not read from either, so it cannot fill the device's memory with them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Callable, Deque, Optional, Sequence

import httptools

from device_agent.server.body import Body
from device_agent.server.fields import error_body
from device_agent.server.request import Request, parse_length, without_upgrade
from device_agent.tensors import Buffer

if TYPE_CHECKING:
    from device_agent.server.http import HttpServer

JSON = b"application/json"
BINARY = b"application/octet-stream"

_CHUNKED = b"chunked"
_RECEIVE_BYTES = 16 * 1024
_MAX_HEAD_BYTES = 32 * 1024
_CHUNK_HEAD_BYTES = 16  # what a chunk may spend on its length; more is charged to the head
_MIN_BODY_BYTES_PER_S = 64 * 1024
_LINGER_S = 2.0
_SPARE_S = 5.0

_HEADS = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: ".encode()
    for status in HTTPStatus
}

_log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """One client.

    Attributes:
        on_cancel: called if the client goes away before its request is answered.
    """

    def __init__(self, server: HttpServer) -> None:
        self.on_cancel: Optional[Callable[[], Any]] = None
        self._server = server
        self._transport: Optional[asyncio.Transport] = None
        self._parser = httptools.HttpRequestParser(self)
        self._receive = memoryview(bytearray(_RECEIVE_BYTES))
        self._incoming: Optional[Request] = None  # being received
        self._upgrading: Optional[Request] = None  # its head came, with a wish that is ignored
        self._in_head = True
        self._fed_bytes = 0  # of the request that is being received, its body included
        self._body = Body()
        self._spare_until_s = 0.0
        self._active: Optional[Request] = None  # being answered
        self._pending: Deque[Request] = deque()
        self._paused = False  # reading
        self._writable = True  # the client reads its answers
        self._stopped = False  # nothing more is read; what was received is still answered
        self._closing = False
        self._deadline_s: Optional[float] = None

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = transport  # type: ignore[assignment]  # a socket's transport reads and writes
        self._server.connections.add(self)
        self._deadline_s = time.monotonic() + self._server.limits.header_timeout_s
        if len(self._server.connections) > self._server.limits.max_connections:
            self._fail(503, "too many connections are open")

    def connection_lost(self, error: Optional[Exception]) -> None:
        """The client is gone, or was closed."""
        self._transport = None
        self._server.connections.discard(self)
        self._pending.clear()
        cancel, self.on_cancel = self.on_cancel, None
        if cancel is not None:
            cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what it reads next."""
        rest = self._body.rest
        return self._receive if rest is None else rest[self._body.received :]

    def buffer_updated(self, count: int) -> None:
        """The transport read ``count`` bytes."""
        if self._closing:
            return
        body = self._body
        if body.rest is None:
            self._feed(self._receive[:count])
            return
        body.received += count
        if body.received == body.announced:
            self._parser = httptools.HttpRequestParser(self)  # the old one still waits for this body
            self.on_message_complete()

    def eof_received(self) -> Optional[bool]:
        """The client closed its side; HTTP clients do that when they give up, so the request is dropped."""
        self._close()
        return False

    def pause_writing(self) -> None:
        """The client reads slowly: read no more from it."""
        self._writable = False
        self._pause_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._writable = True
        self._next()

    # From the parser

    def _feed(self, data: Buffer) -> None:
        self._fed_bytes += len(data)
        if self._fed_bytes > _MAX_HEAD_BYTES:
            self._check_framing()
        try:
            while data and not self._closing and not self._stopped:
                data = self._parse(data)
        except httptools.HttpParserCallbackError:
            _log.exception("a request could not be received")
            self._fail(500, "the agent failed; its log has the cause")
        except httptools.HttpParserError as error:
            self._fail(400, f"the request is not HTTP/1.1: {error}")
        else:
            if self._incoming is not None and self._body.is_long():
                json_bytes = self._incoming.headers.get(b"inference-header-content-length")
                self._body.receive_directly(parse_length(json_bytes) or 0)

    def _parse(self, data: Buffer) -> bytes:
        """Let the parser have ``data``.

        Returns:
            What it must have next: a request that wishes to upgrade, again and without the wish.
        """
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            request, self._upgrading = self._upgrading, None
            if request is None or self._closing:
                return b""
            # The parser takes all that follows for the other protocol, even the body of this request.
            self._parser = httptools.HttpRequestParser(self)
            return without_upgrade(request) + bytes(data[upgrade.args[0] :])
        return b""

    def _check_framing(self) -> None:
        """Refuse a head, chunk extensions or trailers without end."""
        body = self._body
        framing_bytes = self._fed_bytes - body.received - body.pieces * _CHUNK_HEAD_BYTES
        if framing_bytes > _MAX_HEAD_BYTES and self._incoming is not None:
            part = "head is" if self._in_head else "chunk extensions and trailers are"
            self._fail(431, f"the request's {part} longer than {_MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """A request starts."""
        if self._stopped or self._closing:
            return
        self._incoming = Request()
        self._in_head = True
        self._deadline_s = time.monotonic() + self._server.limits.header_timeout_s

    def on_url(self, part: bytes) -> None:
        """A piece of the target."""
        if self._incoming is not None:
            self._incoming.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer: those come too late to change how a request is read, and are ignored."""
        incoming = self._incoming
        if incoming is None or not self._in_head:
            return
        name, value = name.lower(), value.strip()
        known = incoming.headers.get(name)
        incoming.headers[name] = value if known is None else b"%s, %s" % (known, value)

    def on_headers_complete(self) -> None:
        """The head is whole: check what it announces before the body comes."""
        incoming = self._incoming
        if incoming is None or self._closing:
            return
        self._in_head = False
        incoming.method = self._parser.get_method().decode("ascii")
        incoming.keep_alive = self._parser.should_keep_alive()
        incoming.is_http_1_0 = self._parser.get_http_version() == "1.0"
        if incoming.method == "CONNECT":
            incoming.keep_alive = False  # what follows is for whom it wants to be connected to
        elif self._parser.should_upgrade():
            self._incoming, self._upgrading = None, incoming
        elif incoming.headers.get(b"transfer-encoding", _CHUNKED).lower() != _CHUNKED:
            self._fail(501, "the only Transfer-Encoding that is supported is chunked")
        else:
            self._expect_body(incoming)

    def _expect_body(self, incoming: Request) -> None:
        announced = parse_length(incoming.headers.get(b"content-length"))
        if announced is not None:
            limit = self._server.limits.max_body_bytes
            if announced > limit:
                self._fail(413, f"the body has {announced} bytes; the limit is {limit}")
                return
            self._body.announced = announced
            self._deadline_s = (self._deadline_s or 0.0) + announced / _MIN_BODY_BYTES_PER_S
        if incoming.headers.get(b"expect", b"").lower() == b"100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._closing or self._incoming is None:
            return
        self._body.add(piece)
        limit = self._server.limits.max_body_bytes
        if self._body.received > limit:
            self._fail(413, f"the body has more than {limit} bytes")

    def on_message_complete(self) -> None:
        """The request is whole."""
        request, self._incoming = self._incoming, None
        self._fed_bytes = 0
        if request is None or self._closing:
            return
        request.body, request.memory = self._body.finish()
        if self._active is not None or self._pending or not self._writable:
            if self._active is not None:
                self._deadline_s = None
            self._pending.append(request)
            self._pause_reading()
        else:
            self._handle(request)

    # Answering

    def _handle(self, request: Request) -> None:
        self._active = request
        self._deadline_s = None
        try:
            self._server.handler(request, self)
        except Exception:
            # One request must not take the agent down; the cause is in the log.
            _log.exception("%s %r failed", request.method, request.target)
            self.respond(500, [error_body("the agent failed; its log has the cause")])

    def respond(
        self,
        status: int,
        parts: Sequence[Buffer],
        content_type: bytes = JSON,
        headers: bytes = b"",
    ) -> None:
        """Answer the request that is being handled. Does nothing if the client is gone.

        Args:
            status: the HTTP status.
            parts: the body, in pieces.
            content_type: of the body.
            headers: more header lines, each ending in CRLF.
        """
        request, self._active, self.on_cancel = self._active, None, None
        if status >= 400:
            self._server.count_error(status)
        if self._transport is None or self._closing or request is None:
            return
        close = not request.keep_alive or (self._server.draining and not self._pending)
        if request.method == "HEAD":
            parts = []
        self._write(status, parts, content_type, headers + _connection_header(request, close))
        if close:
            self._close()
        else:
            now_s = time.monotonic()
            self._deadline_s = now_s + self._server.limits.idle_timeout_s
            self._body.reuse(request.memory)
            self._spare_until_s = now_s + _SPARE_S
            if self._paused and self._writable:
                # Not at once: a client that sends ahead must not keep others from their turn.
                asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._transport is None or self._closing or self._active is not None or not self._writable:
            return
        if self._pending:
            self._handle(self._pending.popleft())
        elif self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _write(self, status: int, parts: Sequence[Buffer], content_type: bytes, headers: bytes) -> None:
        size = sum(map(len, parts))
        head = b"%s%s\r\nContent-Length: %d\r\n%s\r\n" % (_HEADS[status], content_type, size, headers)
        if self._transport is not None:
            self._transport.write(b"".join([head, *parts]))

    def _fail(self, status: int, message: str) -> None:
        """Answer a request that cannot be received, and close when all before it are answered."""
        if self._closing or self._stopped:
            return
        self._server.count_error(status)
        if self._has_work():
            self._stop_reading()  # those before it still get their answers
            return
        self._write(status, [error_body(message)], JSON, b"Connection: close\r\n")
        self._linger()

    # Ending

    @property
    def owes_answer(self) -> bool:
        """Whether a request that came whole is not answered yet."""
        return self._transport is not None and not self._closing and self._has_work()

    def _has_work(self) -> bool:
        return self._active is not None or bool(self._pending)

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        if self._incoming is None and not self._has_work():
            self._close()

    def close_if_overdue(self, now_s: float) -> None:
        """Close if the client has been too slow; let go of memory that an idle one no longer needs."""
        if now_s > self._spare_until_s:
            self._body.reuse(None)
        if self._deadline_s is None or now_s < self._deadline_s:
            return
        if self._closing:
            self.abort()
        elif self._active is not None:
            self._deadline_s = None  # the one that is being answered takes what time it needs
            self._stop_reading()
        elif self._incoming is not None:
            self._fail(408, "the request did not arrive in time")
        else:
            self._close()

    def abort(self) -> None:
        """Close now, losing what was not sent yet."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _close(self) -> None:
        """Close when everything is sent; a client that does not read it is dropped at the next sweep."""
        self._closing = True
        self._deadline_s = time.monotonic() + self._server.limits.header_timeout_s
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """End our side, and throw away what still comes.

        Closing while the client sends would reset the connection, and the client would not see its answer
        (RFC 9112, section 9.6).
        """
        self._closing = True
        self._incoming = None
        self._body.clear()
        self._deadline_s = time.monotonic() + _LINGER_S
        if self._transport is None:
            return
        if not self._transport.can_write_eof():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:
            self._transport.abort()  # the client is gone already

    def _stop_reading(self) -> None:
        """Close after the last request that was received."""
        self._stopped = True
        self._pause_reading()
        self._incoming = None
        self._body.clear()
        last = self._pending[-1] if self._pending else self._active
        if last is not None:
            last.keep_alive = False

    def _pause_reading(self) -> None:
        if self._transport is not None and not self._closing and not self._paused:
            self._paused = True
            self._transport.pause_reading()


def _connection_header(request: Request, close: bool) -> bytes:
    if close:
        return b"Connection: close\r\n"
    return b"Connection: keep-alive\r\n" if request.is_http_1_0 else b""
