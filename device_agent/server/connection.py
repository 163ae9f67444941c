"""One HTTP/1.1 client: its requests are handled one after the other, and each is answered.

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

from device_agent.server.fields import error_body
from device_agent.server.receiving import Receiver
from device_agent.server.request import Request
from device_agent.tensors import Buffer

if TYPE_CHECKING:
    from device_agent.server.access import Access
    from device_agent.server.http import HttpServer

JSON = b"application/json"
BINARY = b"application/octet-stream"

_LINGER_S = 2.0
_SPARE_S = 5.0

_HEADS = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: ".encode()
    for status in HTTPStatus
}

_log = logging.getLogger(__name__)


class Connection(Receiver):
    """One client.

    Attributes:
        on_cancel: called if the client goes away before its request is answered.
    """

    def __init__(self, server: HttpServer, access: Optional[Access] = None) -> None:
        super().__init__(server.limits, access)
        self.on_cancel: Optional[Callable[[], Any]] = None
        self._server = server
        self._spare_until_s = 0.0
        self._active: Optional[Request] = None  # being answered
        self._pending: Deque[Request] = deque()
        self._paused = False  # reading
        self._writable = True  # the client reads its answers

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = transport  # type: ignore[assignment]  # a socket's transport reads and writes
        self._server.connections.add(self)
        self._deadline_s = time.monotonic() + self._limits.header_timeout_s
        if len(self._server.connections) > self._limits.max_connections:
            self._fail(503, "too many connections are open")

    def connection_lost(self, error: Optional[Exception]) -> None:
        """The client is gone, or was closed."""
        self._transport = None
        self._server.connections.discard(self)
        self._pending.clear()
        cancel, self.on_cancel = self.on_cancel, None
        if cancel is not None:
            cancel()

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

    # Answering

    def _take(self, request: Request) -> None:
        """See :meth:`Receiver._take`."""
        if self._active is not None or self._pending or not self._writable:
            if self._active is not None:
                self._deadline_s = None
            self._pending.append(request)
            self._pause_reading()
        else:
            self._handle(request)

    def _handle(self, request: Request) -> None:
        self._active = request
        self._deadline_s = None
        try:
            self._server.handler(request, self)
        except Exception:
            # One request must not take the agent down; the cause is in the log.
            _log.exception("%s %r failed", request.method, request.target)
            self.respond(500, [error_body("the agent failed; its log has the cause")])

    def cancel_with(self, cancel: Callable[[], Any]) -> None:
        """Call ``cancel`` if the client goes away; not where its request has been answered meanwhile."""
        if self._active is not None:
            self.on_cancel = cancel

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
            self._deadline_s = now_s + self._limits.idle_timeout_s
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

    def _fail(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer a request that cannot be received, and close when all before it are answered."""
        if self._closing or self._stopped:
            return
        self._server.count_error(status)
        if self._has_work():
            self._stop_reading()  # those before it still get their answers
            return
        self._write(status, [error_body(message)], JSON, b"Connection: close\r\n" + headers)
        self._linger()

    # Ending

    @property
    def owes_answer(self) -> bool:
        """Whether a request that came whole is to be answered: not one behind answers that nobody reads."""
        if self._transport is None or self._closing:
            return False
        return self._active is not None or (bool(self._pending) and self._writable)

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
        self._deadline_s = time.monotonic() + self._limits.header_timeout_s
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
