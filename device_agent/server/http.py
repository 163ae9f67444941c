"""The listener: accepts HTTP connections, watches over slow ones, and drains them at the end."""

from __future__ import annotations

import asyncio
import time
from typing import Callable, Optional, Set

from device_agent.config import Address, Limits
from device_agent.server.connection import Connection, Request

_SWEEP_S = 0.5
_DRAIN_GRACE_S = 0.25  # a request that is already on its way to an idle connection gets its answer

Handler = Callable[[Request, Connection], None]


class HttpServer:
    """A listener and its connections."""

    def __init__(self, handler: Handler, limits: Limits, count_error: Callable[[int], None]) -> None:
        """Create a server that does not listen yet.

        Args:
            handler: called for each request; it, or something it starts, must call ``respond`` once.
            limits: what a client may cost.
            count_error: told the status of every error answer.
        """
        self.handler = handler
        self.limits = limits
        self.count_error = count_error
        self.draining = False
        self.connections: Set[Connection] = set()
        self._server: Optional[asyncio.AbstractServer] = None
        self._sweeper: Optional[asyncio.TimerHandle] = None

    async def start(self, address: Address) -> str:
        """Listen.

        Returns:
            ``host:port`` as bound.

        Raises:
            OSError: the address is taken, or not this machine's.
        """
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self), address.host, address.port, backlog=1024)
        self._server = server
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)
        host, port = server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def drain(self, timeout_s: float) -> bool:
        """Stop accepting, answer what was accepted, close.

        Returns:
            Whether every accepted request was answered in time.
        """
        await asyncio.sleep(0)  # accept what the kernel has already connected
        if self._server is not None:
            self._server.close()
        self.draining = True
        started_s = time.monotonic()
        while self.connections and time.monotonic() - started_s < timeout_s:
            if time.monotonic() - started_s > _DRAIN_GRACE_S:
                self._close_idle()
            await asyncio.sleep(0.005)
        complete = not self.connections
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper is not None:
            self._sweeper.cancel()
        return complete

    def _close_idle(self) -> None:
        for connection in list(self.connections):
            connection.close_if_idle()

    def _sweep(self) -> None:
        now_s = time.monotonic()
        for connection in list(self.connections):
            connection.close_if_overdue(now_s)
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)
