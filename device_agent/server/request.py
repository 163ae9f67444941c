"""A request as it is received, and what its head says. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Optional

if TYPE_CHECKING:
    from device_agent.server.body import Memory

_MAX_DIGITS = 18  # of a length; more is no length, and Python itself refuses thousands


class Request:
    """A received request.

    Attributes:
        method: such as ``POST``.
        target: path and query as they were sent.
        headers: by lower-case name; the values of a repeated one are joined by commas. Not to be changed:
            requests with the same head share them.
        body: everything after the head; de-chunked, not decompressed.
        keep_alive: whether the client will send more on this connection.
        memory: what the body lies in; None: it has none of its own.
    """

    __slots__ = ("body", "headers", "is_http_1_0", "keep_alive", "memory", "method", "target")

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.headers: Dict[bytes, bytes] = {}
        self.body: memoryview = memoryview(b"")
        self.keep_alive = True
        self.is_http_1_0 = False
        self.memory: Optional[Memory] = None


class KnownHead:
    """A head that a client has sent before, and will send again with its next frame.

    Attributes:
        data: the head as it is sent, its empty line included.
        body_bytes: length of the body that it announces.
        json_bytes: where in the body its tensors start.
    """

    __slots__ = ("_request", "body_bytes", "data", "json_bytes")

    def __init__(self, data: bytes, request: Request, body_bytes: int) -> None:
        """Know a head.

        Args:
            data: its bytes.
            request: what the parser made of them.
            body_bytes: length of the body that it announces.
        """
        self.data = data
        self.body_bytes = body_bytes
        self.json_bytes = parse_length(request.headers.get(b"inference-header-content-length")) or 0
        self._request = request

    def request(self) -> Request:
        """Another request with this head, still without a body."""
        known, request = self._request, Request.__new__(Request)
        request.method, request.target, request.headers = known.method, known.target, known.headers
        request.keep_alive, request.is_http_1_0 = known.keep_alive, known.is_http_1_0
        return request


def without_upgrade(request: Request) -> bytes:
    """The head of a request again, without its wish for another protocol, which a server may ignore."""
    version = b"1.0" if request.is_http_1_0 else b"1.1"
    lines = [b"%s %s HTTP/%s" % (request.method.encode("ascii"), request.target, version)]
    lines += [
        b"%s: %s" % (name, value)
        for name, value in request.headers.items()
        if name not in (b"upgrade", b"connection")
    ]
    lines.append(b"Connection: keep-alive" if request.keep_alive else b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n"


def parse_length(value: Optional[bytes]) -> Optional[int]:
    """A header's value as a length; None: there is none, or it is no length."""
    return int(value) if value is not None and value.isdigit() and len(value) <= _MAX_DIGITS else None
