"""The receiving half of an HTTP/1.1 connection: an ``asyncio.BufferedProtocol`` around httptools.

A client that sends frames sends the same head before each. Such a head is compared and not parsed again, and
what follows goes to memory of its own in one copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Optional

import httptools

from device_agent.config import Limits
from device_agent.server.body import Body
from device_agent.server.request import KnownHead, Request, parse_length, without_upgrade
from device_agent.tensors import Buffer

if TYPE_CHECKING:
    from device_agent.server.access import Access

_CHUNKED = b"chunked"
_RECEIVE_BYTES = 128 * 1024
_PIECE_BYTES = 16 * 1024  # what the parser is given at once; it copies what it delivers
_MAX_HEAD_BYTES = 32 * 1024
_CHUNK_HEAD_BYTES = 16  # what a chunk may spend on its length; more is charged to the head
_MIN_BODY_BYTES_PER_S = 64 * 1024

# One for all connections: a transport asks for a buffer, fills it and says so without a turn of the loop in
# between. Memory that is always in use is in the processor's cache.
_BUFFER = bytearray(_RECEIVE_BYTES)
_VIEW = memoryview(_BUFFER)

_log = logging.getLogger(__name__)


class Receiver(asyncio.BufferedProtocol):
    """Makes requests of the bytes of one client."""

    def __init__(self, limits: Limits, access: Optional[Access]) -> None:
        self._limits = limits
        self._access = access
        self._transport: Optional[asyncio.Transport] = None
        self._parser = httptools.HttpRequestParser(self)
        self._parser_waits = False  # for a body that it will not be given
        self._known: Optional[KnownHead] = None
        self._incoming: Optional[Request] = None  # being received
        self._upgrading: Optional[Request] = None  # its head came, with a wish that is ignored
        self._repeatable: Optional[Request] = None  # its head says all that there is to know of it
        self._in_head = True
        self._fed_bytes = 0  # of the request that is being received, its body included
        self._body = Body()
        self._stopped = False  # nothing more is read; what was received is still answered
        self._closing = False
        self._deadline_s: Optional[float] = None

    @abstractmethod
    def _take(self, request: Request) -> None:
        """A request has come whole."""

    @abstractmethod
    def _fail(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer a request that cannot be received, and close when all before it are answered."""

    # From the transport

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the transport puts what it reads next."""
        rest = self._body.rest
        return _VIEW if rest is None else rest[self._body.received :]

    def buffer_updated(self, count: int) -> None:
        """The transport read ``count`` bytes."""
        if self._closing:
            return
        if self._body.rest is not None:
            self._extend_body(count)
        else:
            self._use_buffer(count)

    def _use_buffer(self, count: int) -> None:
        position = 0
        while position < count and not self._closing and not self._stopped:
            known = self._known
            if self._body.rest is not None:
                position = self._copy_body(position, count)
            elif known and self._incoming is None and _BUFFER.startswith(known.data, position, count):
                position = self._repeat(known, position, count)
            else:
                position = self._parse_piece(position, min(count, position + _PIECE_BYTES))

    # Without the parser

    def _repeat(self, known: KnownHead, position: int, count: int) -> int:
        """Take a request with the head of one before; the position after what was used."""
        request = known.request()
        if self._access is not None and self._is_refused(self._access, request):
            return count
        position += len(known.data)
        rest = self._body.expect(known.body_bytes, known.json_bytes)
        stop = position + known.body_bytes
        if stop <= count:
            rest[:] = _VIEW[position:stop]
            self._end(request)
            return stop
        self._incoming = request
        self._in_head = False
        allowed_s = self._limits.header_timeout_s + known.body_bytes / _MIN_BODY_BYTES_PER_S
        self._deadline_s = time.monotonic() + allowed_s
        return position

    def _copy_body(self, position: int, count: int) -> int:
        body = self._body
        rest = body.rest if body.rest is not None else _VIEW[:0]
        used = min(count - position, len(rest) - body.received)
        rest[body.received : body.received + used] = _VIEW[position : position + used]
        self._extend_body(used)
        return position + used

    def _extend_body(self, count: int) -> None:
        """The next ``count`` bytes of the body are in their place."""
        body = self._body
        body.received += count
        if body.received != body.announced:
            return
        if self._parser_waits:
            self._parser = httptools.HttpRequestParser(self)
            self._parser_waits = False
        self.on_message_complete()

    def _end(self, request: Request) -> None:
        self._fed_bytes = 0
        request.body, request.memory = self._body.finish()
        self._take(request)

    # Through the parser

    def _parse_piece(self, start: int, stop: int) -> int:
        """Let the parser have a piece of the buffer; the position after it."""
        fresh = self._incoming is None
        self._feed(_VIEW[start:stop])
        repeatable, self._repeatable = self._repeatable, None
        if fresh and repeatable is not None:
            self._remember(repeatable, start, stop)
        if self._incoming is not None and not self._closing and self._body.is_cut():
            json_bytes = self._incoming.headers.get(b"inference-header-content-length")
            self._body.expect(self._body.announced or 0, parse_length(json_bytes) or 0)
            self._parser_waits = True
        return stop

    def _remember(self, request: Request, start: int, stop: int) -> None:
        """Know the head again, if the piece was nothing but the request's head and its body."""
        end = _BUFFER.find(b"\r\n\r\n", start, stop) + 4
        body_bytes = parse_length(request.headers.get(b"content-length")) or 0
        came = self._body.received if self._incoming is request else body_bytes
        if end > start + 4 and stop - end == came:
            self._known = KnownHead(bytes(_VIEW[start:end]), request, body_bytes)

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

    def _is_refused(self, access: Access, request: Request) -> bool:
        """Refuse a request of somebody unknown before its body is read."""
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        refusal = access.refusal(request.headers.get(b"authorization"), peer[0] if peer else "")
        if refusal is not None:
            self._fail(refusal.status, refusal.message, refusal.headers)
        return refusal is not None

    def on_message_begin(self) -> None:
        """A request starts."""
        if self._stopped or self._closing:
            return
        self._incoming = Request()
        self._in_head = True
        self._deadline_s = time.monotonic() + self._limits.header_timeout_s

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
        if self._access is not None and self._is_refused(self._access, incoming):
            return
        if incoming.method == "CONNECT":
            incoming.keep_alive = False  # what follows is for whom it wants to be connected to
        elif self._parser.should_upgrade():
            self._incoming, self._upgrading = None, incoming
        elif incoming.headers.get(b"transfer-encoding", _CHUNKED).lower() != _CHUNKED:
            self._fail(501, "the only Transfer-Encoding that is supported is chunked")
        else:
            self._expect_body(incoming)

    def _expect_body(self, incoming: Request) -> None:
        headers = incoming.headers
        announced = parse_length(headers.get(b"content-length"))
        waits = headers.get(b"expect", b"").lower() == b"100-continue"
        if announced is not None:
            limit = self._limits.max_body_bytes
            if announced > limit:
                self._fail(413, f"the body has {announced} bytes; the limit is {limit}")
                return
            self._body.announced = announced
            self._deadline_s = (self._deadline_s or 0.0) + announced / _MIN_BODY_BYTES_PER_S
            if not waits and incoming.keep_alive and b"transfer-encoding" not in headers:
                self._repeatable = incoming
        if waits and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if self._closing or self._incoming is None:
            return
        self._body.add(piece)
        limit = self._limits.max_body_bytes
        if self._body.received > limit:
            self._fail(413, f"the body has more than {limit} bytes")

    def on_message_complete(self) -> None:
        """The request is whole."""
        request, self._incoming = self._incoming, None
        self._fed_bytes = 0
        if request is not None and not self._closing:
            self._end(request)
