"""The listener: accepts HTTP connections, watches over slow ones, and drains them at the end."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Set

from device_agent.config import Address, Limits
from device_agent.server.connection import Connection
from device_agent.server.listeners import stop_accepting
from device_agent.server.request import Request
from device_agent.server.unix_socket import bind, serve

if TYPE_CHECKING:
    from device_agent.server.access import Access

_BACKLOG = 1024
_SWEEP_S = 0.5
_DRAIN_GRACE_S = 0.25  # a request that is already on its way to an idle connection gets its answer
_DRAIN_FLUSH_S = 1.0  # for clients to read their answers, and to finish sending what they have begun
_DRAIN_POLL_S = 0.005

Handler = Callable[[Request, Connection], None]


class HttpServer:
    """A listener and its connections."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        count_error: Callable[[int], None],
        access: Optional[Access] = None,
    ) -> None:
        """Create a server that does not listen yet.

        Args:
            handler: called for each request; it, or something it starts, must call ``respond`` once.
            limits: what a client may cost.
            count_error: told the status of every error answer.
            access: who may come in over TCP; None: everybody, without TLS.
        """
        self.handler = handler
        self.limits = limits
        self.count_error = count_error
        self._access = access
        self.draining = False
        self.connections: Set[Connection] = set()
        self._servers: List[asyncio.Server] = []
        self._unix: Optional[Path] = None
        self._sweeper: Optional[asyncio.TimerHandle] = None

    async def start(self, address: Address) -> str:
        """Listen.

        Returns:
            ``host:port`` as bound.

        Raises:
            OSError: the address is taken, or not this machine's.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            self._guarded, address.host, address.port, backlog=_BACKLOG, **self._tls()
        )
        self._serve_with(server)
        host, port = server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start_on(self, listener: socket.socket) -> None:
        """Serve a socket, TCP or Unix, that the service manager opened and keeps open after the agent."""
        if listener.family == socket.AF_UNIX:
            self._serve_with(await serve(lambda: Connection(self), listener, keep=True))
        else:
            loop = asyncio.get_running_loop()
            self._serve_with(
                await loop.create_server(self._guarded, sock=listener, backlog=_BACKLOG, **self._tls())
            )

    async def start_unix(self, path: Path, mode: int) -> None:
        """Listen on a Unix-domain socket too, as :func:`device_agent.server.unix_socket.bind` makes it.

        Raises:
            Refused: another agent answers there.
            BadInput: the path cannot be used.
        """
        listener = bind(path, mode, "http.unix")
        self._serve_with(await serve(lambda: Connection(self), listener))
        self._unix = path

    def _guarded(self) -> Connection:
        return Connection(self, self._access)

    def _tls(self) -> Dict[str, Any]:
        """How asyncio is told to speak TLS."""
        if self._access is None:
            return {}
        return {"ssl": self._access.context, "ssl_handshake_timeout": self.limits.header_timeout_s}

    def _serve_with(self, server: asyncio.Server) -> None:
        self._servers.append(server)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    async def drain(self, timeout_s: float) -> bool:
        """Stop accepting, answer what was accepted, close.

        A request is accepted when it has come whole. Clients that send without an end, or that do not read
        their answers, cannot keep the agent from stopping: a second after the last answer they are dropped.

        Returns:
            Whether every accepted request was answered in time.
        """
        await asyncio.sleep(0)  # accept what the kernel has already connected
        if self._unix is not None:
            self._unix.unlink(missing_ok=True)  # before it closes: a later one there is another agent's
        await stop_accepting(self._servers)
        self.draining = True
        now_s = started_s = answered_s = time.monotonic()
        while self.connections and now_s - started_s < timeout_s and now_s - answered_s < _DRAIN_FLUSH_S:
            if now_s - started_s > _DRAIN_GRACE_S:
                self._close_idle()
            await asyncio.sleep(_DRAIN_POLL_S)
            now_s = time.monotonic()
            if self._owes_answers():
                answered_s = now_s
        complete = not self._owes_answers()
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        return complete

    def _owes_answers(self) -> bool:
        return any(connection.owes_answer for connection in self.connections)

    def _close_idle(self) -> None:
        for connection in list(self.connections):
            connection.close_if_idle()

    def _sweep(self) -> None:
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
        if self._access is not None:
            self._access.refresh()
        now_s = time.monotonic()
        for connection in list(self.connections):
            connection.close_if_overdue(now_s)
