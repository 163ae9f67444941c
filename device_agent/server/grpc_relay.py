"""Serves gRPC on a socket that the service manager opened, which gRPC's library cannot take.

gRPC listens on a private Unix socket, and the bytes of each connection are carried there and back. So
clients that connect while the agent starts again wait in the kernel. Those that are connected are told to go
at the end: a GOAWAY that names no stream is written between two frames (RFC 9113, section 6.8). They send new
calls over a new connection; every call that they had sent before they read it is still answered, which
gRPC's own way to stop does not do.

Python 3.8.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import ssl
import time
from typing import Any, Dict, Optional, Set

from device_agent.config import Limits
from device_agent.server.frames import GOAWAY, Frames
from device_agent.server.listeners import stop_accepting
from device_agent.temporary import OwnDirectory

_BACKLOG = 1024
_LEAVING_S = 1.0  # for clients to read that they should go; what they sent before is answered
_POLL_S = 0.005

_log = logging.getLogger(__name__)


class GrpcRelay:
    """The connections between a passed socket and gRPC.

    Attributes:
        address: where gRPC has to listen, in its own notation.
    """

    def __init__(self, limits: Limits, context: Optional[ssl.SSLContext] = None) -> None:
        """Make the place for gRPC's socket, which nobody else can reach.

        Args:
            limits: what a client may cost.
            context: TLS, which ends here; None: there is none.
        """
        self._directory = OwnDirectory("grpc")
        self._path = str(self._directory.path / "grpc.sock")
        self.address = f"unix:{self._path}"
        self._limits = limits
        self._context = context
        self._clients: Set[_Client] = set()
        self._listener: Optional[asyncio.Server] = None
        self._is_leaving = False

    async def serve(self, listener: socket.socket) -> None:
        """Accept on a socket; gRPC listens already."""
        tls: Dict[str, Any] = {}
        if self._context is not None:
            tls = {"ssl": self._context, "ssl_handshake_timeout": self._limits.header_timeout_s}
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Client(self), sock=listener, backlog=_BACKLOG, **tls
        )

    async def let_go(self, timeout_s: float) -> None:
        """Accept no more, tell the clients to go, and wait until they had the time to read that."""
        if self._listener is not None:
            await stop_accepting([self._listener])
        self._is_leaving = True
        for client in self._clients:
            client.send_away()
        until_s = time.monotonic() + min(_LEAVING_S, timeout_s)
        while self._clients and time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Close what is left, after gRPC stopped."""
        for client in list(self._clients):
            client.close()
        await asyncio.sleep(0)
        self._directory.remove()

    # For the clients

    def admit(self, client: _Client) -> bool:
        """Take a client, unless there are too many."""
        if len(self._clients) >= self._limits.max_connections:
            return False
        self._clients.add(client)
        if self._is_leaving:  # its handshake took until now
            client.send_away()
        return True

    def forget(self, client: _Client) -> None:
        """A client is gone."""
        self._clients.discard(client)

    async def connect(self, client: _Client, host: str) -> None:
        """Connect a client's other end to gRPC."""
        try:
            await asyncio.get_running_loop().create_unix_connection(
                lambda: _Server(client), sock=await self._connected(host)
            )
        except OSError as error:
            _log.error("gRPC cannot be reached: %s", error)
            client.close()

    async def _connected(self, host: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            # The name is what gRPC shows as the peer, and has the form of its own: HOST:PORT.
            connection.bind(f"\0[{host}]:{secrets.token_hex(8)}")
            await asyncio.get_running_loop().sock_connect(connection, self._path)
        except OSError:
            connection.close()
            raise
        return connection


class _End(asyncio.Protocol):
    """One end of a connection: what it reads, the other one writes, no faster than that can."""

    transport: Optional[asyncio.Transport] = None
    other: Optional[_End] = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a socket's transport reads and writes

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)

    def connection_lost(self, error: Optional[Exception]) -> None:
        self.transport = None
        if self.other is not None:
            self.other.close()

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def close(self) -> None:
        """Close when everything is sent."""
        if self.transport is not None:
            self.transport.close()


class _Client(_End):
    """The end at a client."""

    def __init__(self, relay: GrpcRelay) -> None:
        self._relay = relay
        self._connecting: Optional[asyncio.Future[None]] = None
        self._early = b""
        self._frames = Frames()
        self._leaving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.transport is None or not self._relay.admit(self):
            self.close()
            return
        host = str(transport.get_extra_info("peername")[0])
        self._connecting = asyncio.ensure_future(self._relay.connect(self, host))

    def data_received(self, data: bytes) -> None:
        if self.other is not None:
            self.other.write(data)
            return
        self._early += data
        if self.transport is not None:
            self.transport.pause_reading()  # in connection_made, older Pythons read on all the same

    def connection_lost(self, error: Optional[Exception]) -> None:
        super().connection_lost(error)
        self._relay.forget(self)

    def join(self, server: _Server) -> None:
        """The other end is there."""
        self.other = server
        if self.transport is None:
            server.close()
        elif self._early:
            server.write(self._early)
            self._early = b""
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Pass on what gRPC wrote, and the GOAWAY as soon as a frame has ended."""
        ended = self._frames.advance(data)
        if self._leaving and ended is not None:
            self._leaving = False
            data = b"".join([data[:ended], GOAWAY, data[ended:]])
        super().write(data)

    def send_away(self) -> None:
        """Tell the client to send no more calls over this connection."""
        if self._frames.between:
            super().write(GOAWAY)
        else:
            self._leaving = True


class _Server(_End):
    """The end at gRPC."""

    def __init__(self, client: _Client) -> None:
        self.other = self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._client.join(self)
