"""HTTP as careful as a device in the field needs it: bounded in time and size, and its secrets stay home.

One request is one connection. Certificates are verified; plain HTTP is for loopback, or where it was asked
for. Redirects are followed for reading, and ``Authorization`` never goes with them to another origin.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Dict, Iterator, List, Mapping, Optional, Tuple, Union
from urllib.parse import SplitResult, urljoin, urlsplit

from device_agent import __version__
from device_agent.errors import BadInput
from device_agent.oci.errors import RegistryError
from device_agent.oci.reference import is_loopback

Body = Union[bytes, BinaryIO]

_TIMEOUT_S = 30.0  # of one step: connecting, one read, one write
_ANSWER_TIMEOUT_S = 120.0  # from the request's last byte to the end of the answer's headers
_SMALL_TIMEOUT_S = 120.0  # for the whole of a small document
_STALL_S = 60.0
_STALL_BYTES = 4096
_CHUNK_BYTES = 256 * 1024
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_FIX = "check the network, the address and the registry"


@dataclass(frozen=True)
class Security:
    """How far a connection is trusted.

    Attributes:
        ca_file: certificates of the authorities to trust in the system's place; empty: the system's.
        plain_http: also talk to hosts beyond loopback without TLS.
    """

    ca_file: str = ""
    plain_http: bool = False

    def base_url(self, host: str) -> str:
        """The registry's address: HTTPS, but for loopback without ``ca_file`` or where HTTP is asked for."""
        host = "registry-1.docker.io" if host == "docker.io" else host
        plain = self.plain_http or (not self.ca_file and is_loopback(_hostname(f"//{host}")))
        return f"{'http' if plain else 'https'}://{host}"

    def allows(self, url: str) -> bool:
        """Whether a request may go there."""
        scheme = urlsplit(url).scheme
        return scheme == "https" or (scheme == "http" and (self.plain_http or is_loopback(_hostname(url))))

    def allows_secrets(self, url: str) -> bool:
        """Whether a password or a token may go there: never in the clear over a network."""
        return urlsplit(url).scheme == "https" or is_loopback(_hostname(url))


class Response:
    """An answer whose body was not read yet."""

    def __init__(self, raw: http.client.HTTPResponse, sock: socket.socket, url: str) -> None:
        self._raw = raw
        self._sock = sock
        self.url = url
        self.status = raw.status

    def header(self, name: str) -> str:
        """A header's value; empty if it is missing."""
        return self._raw.getheader(name) or ""

    def headers(self, name: str) -> List[str]:
        """Every value of a header that may come several times."""
        return self._raw.headers.get_all(name) or []

    def read(self, limit_bytes: int) -> bytes:
        """The whole body of a small document.

        Raises:
            RegistryError: it is larger than the limit, cut short, or does not come in time.
        """
        announced = self.header("Content-Length")
        if announced.isdecimal() and int(announced) > limit_bytes:
            raise _too_large(self.url, limit_bytes)
        with _within(self._sock, _SMALL_TIMEOUT_S), _failures(self.url):
            data = self._raw.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise _too_large(self.url, limit_bytes)
        if announced.isdecimal() and len(data) != int(announced):
            raise _cut(self.url)
        return data

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes; ends early, without an error, where the peer does.

        Raises:
            RegistryError: the connection broke, or nearly nothing comes any more.
        """
        since_s, brought = time.monotonic(), 0
        while True:
            with _failures(self.url):
                chunk = self._raw.read1(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk
            brought += len(chunk)
            if time.monotonic() - since_s > _STALL_S:
                if brought < _STALL_BYTES:
                    why = f"it sent {brought} bytes in {_STALL_S:.0f} s"
                    raise RegistryError(f"{_shown(self.url)} is too slow", why, _FIX)
                since_s, brought = time.monotonic(), 0


class Transport:
    """Makes requests, one at a time, until it is closed."""

    def __init__(self, security: Security) -> None:
        self.security = security
        self._context: Optional[ssl.SSLContext] = None
        self._sock: Optional[socket.socket] = None
        self._closed = False

    def close(self) -> None:
        """Begin no request any more and break off the one that runs; from any thread."""
        self._closed = True
        sock = self._sock
        if sock is not None:
            _break_off(sock)

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Optional[Body] = None,
        size_bytes: int = 0,
    ) -> Iterator[Response]:
        """Make a request, following redirects where it only reads.

        Args:
            method: ``GET``, ``HEAD``, ``POST``, ``PUT``.
            url: absolute.
            headers: of the request. ``Authorization`` stays at the origin of ``url``.
            body: bytes, or a file that is sent from where it stands.
            size_bytes: of a body that is a file.

        Yields:
            The answer, whatever its status.

        Raises:
            RegistryError: no answer, too many redirects, or one to where no request may go.
            BadInput: ``url`` itself is where no request may go, or ``ca_file`` cannot be used.
        """
        sent = {**headers, "Connection": "close", "User-Agent": f"edgekit/{__version__}"}
        origin = _origin(url)
        for _ in range(_MAX_REDIRECTS + 1):
            self._check(url)
            with self._exchange(method, url, sent, body, size_bytes) as response:
                location = response.header("Location")
                if method not in ("GET", "HEAD") or response.status not in _REDIRECTS or not location:
                    yield response
                    return
            url = urljoin(url, location)
            if not self.security.allows(url) or (origin[0] == "https" and urlsplit(url).scheme != "https"):
                why = f"it redirects to {_shown(url)}, which is not encrypted"
                raise RegistryError(f"{origin[1]} cannot be used", why, "tell the registry's administrator")
            if _origin(url) != origin:
                sent.pop("Authorization", None)
        raise RegistryError(f"{origin[1]} cannot be used", "it redirects in a circle", _FIX)

    def _check(self, url: str) -> None:
        if not self.security.allows(url):
            raise BadInput(
                f"{_shown(url)} would be asked without encryption",
                "plain HTTP is taken for loopback only",
                "give the registry a certificate, or allow plain HTTP explicitly",
            )

    @contextmanager
    def _exchange(
        self, method: str, url: str, headers: Dict[str, str], body: Optional[Body], size_bytes: int
    ) -> Iterator[Response]:
        self._refuse_if_closed()  # to connect may take as long as the network lets it
        connection = self._connect(urlsplit(url))
        if body is not None:
            length = len(body) if isinstance(body, bytes) else size_bytes
            headers = {**headers, "Content-Length": str(length)}
        try:
            with _failures(url):
                connection.connect()
                # The connection hands its socket to the response; whoever breaks it off needs it still.
                sock = self._sock = connection.sock
                self._refuse_if_closed()
                connection.request(method, _path(url), body=body, headers=headers)
                with _within(sock, _ANSWER_TIMEOUT_S):
                    raw = connection.getresponse()
            with closing(raw):
                yield Response(raw, sock, url)
        finally:
            self._sock = None
            connection.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RegistryError("the transfer was broken off", "the agent stops", "it goes on at its start")

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        with _failures(parts.geturl()):
            host, port = parts.hostname or "", parts.port
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=self._tls())

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            try:
                context = ssl.create_default_context(cafile=self.security.ca_file or None)
            except (OSError, ValueError) as error:
                raise BadInput(
                    f"the certificates in {self.security.ca_file} cannot be used",
                    str(error),
                    "give ca_file a readable file of PEM certificates",
                ) from error
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context = context
        return self._context


@contextmanager
def _within(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Break the connection off after a time, however often a single byte arrives to keep it alive."""
    timer = threading.Timer(seconds, _break_off, (sock,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _break_off(sock: socket.socket) -> None:
    try:
        # Below TLS, whose own shutdown would pull the object from under the reader.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """Turn what the network and a confused peer do into an error that a person can read."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
        raise RegistryError(f"no answer from {_shown(url)}", why, _FIX) from error


def _origin(url: str) -> Tuple[str, str, int]:
    parts = urlsplit(url)
    with _failures(url):
        return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _path(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _hostname(url: str) -> str:
    return urlsplit(url).hostname or ""


def _shown(url: str) -> str:
    """An address for people: without the query, which may hold a secret of a blob store."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _too_large(url: str, limit_bytes: int) -> RegistryError:
    return RegistryError(
        f"{_shown(url)} is larger than it may be",
        f"at most {limit_bytes} bytes are taken",
        "check that the reference names a bundle that `edgekit push` made",
    )


def _cut(url: str) -> RegistryError:
    return RegistryError(f"{_shown(url)} was cut short", "the connection ended early", _FIX)
