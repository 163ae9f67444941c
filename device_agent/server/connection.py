"""One HTTP/1.1 client: an ``asyncio.BufferedProtocol`` around httptools.

A connection carries one request at a time; requests that a client sends ahead wait their turn. A long body
is received straight into the memory that its tensors will be viewed in. Clients that send too slowly, too
much or nonsense are answered where that is possible, and closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, List, Optional, Sequence

import httptools
import numpy as np

from device_agent.server.fields import error_body
from device_agent.tensors import Buffer

if TYPE_CHECKING:
    from device_agent.server.http import HttpServer

JSON = b"application/json"
BINARY = b"application/octet-stream"

_RECEIVE_BYTES = 16 * 1024
_MAX_HEAD_BYTES = 32 * 1024
_MIN_BODY_BYTES_PER_S = 64 * 1024
_ALIGNMENT_BYTES = 64
_LINGER_S = 2.0
_SPARE_S = 5.0

_HEADS = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: ".encode()
    for status in HTTPStatus
}

_log = logging.getLogger(__name__)


class Request:
    """A received request.

    Attributes:
        method: such as ``POST``.
        target: path and query as they were sent.
        headers: by lower-case name; of a repeated header, the last.
        body: everything after the head; de-chunked, not decompressed.
        keep_alive: whether the client will send more on this connection.
        memory: what a long body lies in; None: it has none of its own.
    """

    __slots__ = ("body", "headers", "is_http_1_0", "keep_alive", "memory", "method", "target")

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.headers: Dict[bytes, bytes] = {}
        self.body: memoryview = memoryview(b"")
        self.keep_alive = True
        self.is_http_1_0 = False
        self.memory: Optional[np.ndarray[Any, Any]] = None


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
        self._in_head = True
        self._head_bytes = 0
        self._chunks: List[bytes] = []
        self._body: Optional[memoryview] = None  # a long body's own memory
        self._spare: Optional[np.ndarray[Any, Any]] = None  # memory of an answered request, for the next
        self._spare_until_s = 0.0
        self._body_bytes = 0
        self._announced_bytes: Optional[int] = None
        self._active: Optional[Request] = None  # being answered
        self._pending: Deque[Request] = deque()
        self._paused = False  # reading
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
        return self._receive if self._body is None else self._body[self._body_bytes :]

    def buffer_updated(self, count: int) -> None:
        """The transport read ``count`` bytes."""
        if self._closing:
            return
        if self._body is None:
            self._feed(self._receive[:count])
            return
        self._body_bytes += count
        if self._body_bytes == self._announced_bytes:
            self._parser = httptools.HttpRequestParser(self)  # the old one still waits for this body
            self.on_message_complete()

    def eof_received(self) -> Optional[bool]:
        """The client closed its side; HTTP clients do that when they give up, so the request is dropped."""
        return False

    def pause_writing(self) -> None:
        """The client reads slowly: read no more from it."""
        self._pause_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        if self._active is None:
            self._next()

    # From the parser

    def _feed(self, data: memoryview) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._fail(431, f"the request's head is longer than {_MAX_HEAD_BYTES} bytes")
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request itself was delivered; it is answered in HTTP/1.1, and what follows is not read.
            self._stop_reading()
        except httptools.HttpParserCallbackError:
            _log.exception("a request could not be received")
            self._fail(500, "the agent failed; its log has the cause")
        except httptools.HttpParserError as error:
            self._fail(400, f"the request is not HTTP/1.1: {error}")
        else:
            if self._announced_bytes is not None and self._body_bytes < self._announced_bytes:
                self._receive_directly(self._announced_bytes)

    def _receive_directly(self, size: int) -> None:
        """Give the rest of the body its own memory, with the tensors behind the JSON aligned."""
        incoming = self._incoming
        json_bytes = (
            _parse_int(incoming.headers.get(b"inference-header-content-length")) if incoming else None
        )
        memory = self._spare
        if memory is None or len(memory) < size + _ALIGNMENT_BYTES:
            memory = np.empty(size + _ALIGNMENT_BYTES, dtype=np.uint8)
        self._spare = None
        if incoming is not None:
            incoming.memory = memory
        offset = -(memory.ctypes.data + (json_bytes or 0)) % _ALIGNMENT_BYTES
        self._body = memory.data[offset : offset + size]
        position = 0
        for chunk in self._chunks:
            self._body[position : position + len(chunk)] = chunk
            position += len(chunk)
        self._chunks = []

    def on_message_begin(self) -> None:
        """A request starts."""
        self._incoming = Request()
        self._body_bytes = 0
        self._announced_bytes = None
        self._deadline_s = time.monotonic() + self._server.limits.header_timeout_s

    def on_url(self, part: bytes) -> None:
        """A piece of the target."""
        if self._incoming is not None:
            self._incoming.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if self._incoming is not None:
            self._incoming.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The head is whole: check what it announces before the body comes."""
        incoming = self._incoming
        if incoming is None or self._closing:
            return
        self._in_head, self._head_bytes = False, 0
        incoming.method = self._parser.get_method().decode("ascii")
        incoming.keep_alive = self._parser.should_keep_alive()
        incoming.is_http_1_0 = self._parser.get_http_version() == "1.0"
        announced = _parse_int(incoming.headers.get(b"content-length"))
        limit = self._server.limits.max_body_bytes
        if announced is not None:
            if announced > limit:
                self._fail(413, f"the body has {announced} bytes; the limit is {limit}")
                return
            self._announced_bytes = announced
            self._deadline_s = (self._deadline_s or 0.0) + announced / _MIN_BODY_BYTES_PER_S
        if incoming.headers.get(b"expect", b"").lower() == b"100-continue" and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, chunk: bytes) -> None:
        """A piece of the body."""
        if self._closing:
            return
        self._chunks.append(chunk)
        self._body_bytes += len(chunk)
        limit = self._server.limits.max_body_bytes
        if self._body_bytes > limit:
            self._fail(413, f"the body has more than {limit} bytes")

    def on_message_complete(self) -> None:
        """The request is whole."""
        request, self._incoming = self._incoming, None
        self._in_head = True
        if request is None or self._closing:
            return
        if self._body is not None:
            request.body, self._body = self._body, None
        elif self._chunks:
            whole = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            request.body, self._chunks = memoryview(whole), []
        self._announced_bytes = None
        if self._active is not None or self._pending:
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
        close = self._server.draining or not request.keep_alive
        if request.method == "HEAD":
            parts = []
        self._write(status, parts, content_type, headers + _connection_header(request, close))
        if close:
            self._close()
        else:
            now_s = time.monotonic()
            self._deadline_s = now_s + self._server.limits.idle_timeout_s
            # Its pages are mapped already, which saves as much time as reading the next body into it takes.
            self._spare, self._spare_until_s = request.memory, now_s + _SPARE_S
            if self._paused:
                # Not at once: a client that sends ahead must not keep others from their turn.
                asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._transport is None or self._closing or self._active is not None:
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
        if self._closing:
            return
        self._server.count_error(status)
        if self._active is not None or self._pending:
            self._stop_reading()  # those before it still get their answers
            return
        self._write(status, [error_body(message)], JSON, b"Connection: close\r\n")
        self._linger()

    # Ending

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        if self._incoming is None and self._active is None and not self._pending:
            self._close()

    def close_if_overdue(self, now_s: float) -> None:
        """Close if the client has been too slow; let go of memory that an idle one no longer needs."""
        if now_s > self._spare_until_s:
            self._spare = None
        if self._deadline_s is None or now_s < self._deadline_s:
            return
        if self._closing:
            self.abort()
        elif self._incoming is not None:
            self._fail(408, "the request did not arrive in time")
        else:
            self._close()

    def abort(self) -> None:
        """Close now, losing what was not sent yet."""
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
        self._incoming, self._body, self._chunks = None, None, []
        self._deadline_s = time.monotonic() + _LINGER_S
        if self._transport is not None:
            try:
                self._transport.write_eof()
            except OSError:
                self._transport.abort()  # the client is gone already

    def _stop_reading(self) -> None:
        """Close after the last request that was received."""
        self._pause_reading()
        self._incoming = None
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


def _parse_int(value: Optional[bytes]) -> Optional[int]:
    return int(value) if value is not None and value.isdigit() else None
