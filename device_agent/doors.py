"""The agent's listeners: opened in the right order, on its own sockets or on those of the service manager."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Optional, Protocol

from device_agent.config import Address, Config
from device_agent.errors import Missing
from device_agent.metrics import Metrics
from device_agent.server.http import HttpServer
from device_agent.server.routes import InferenceRoutes
from device_agent.server.service import InferenceService
from device_agent.server.status import StatusRoutes
from device_agent.systemd.activation import Passed, describe

if TYPE_CHECKING:
    from device_agent.server.access import Access
    from device_agent.server.grpc_server import GrpcServer

_STATUS_DRAIN_S = 1.0

_log = logging.getLogger(__name__)


class Server(Protocol):
    """A listener, whichever protocol it speaks."""

    async def start(self, address: Address) -> str:
        """Listen; return the address as bound. Raises OSError."""

    async def start_on(self, listener: socket.socket) -> None:
        """Serve a socket of the service manager's."""

    async def drain(self, timeout_s: float) -> bool:
        """Stop accepting, answer what was accepted, close; return whether that was done in time."""


class Doors:
    """HTTP, over TCP and a Unix socket, gRPC, and the metrics.

    Attributes:
        where: the address of each that is open, by its name in the log's ``listening`` line.
    """

    def __init__(self, config: Config, service: InferenceService, status: StatusRoutes, metrics: Metrics):
        """Make listeners that do not listen yet.

        Args:
            config: the addresses and limits.
            service: what answers inference.
            status: what answers on the metrics port.
            metrics: counts the failures.

        Raises:
            BadInput: a file of ``[tls]`` cannot be used.
        """
        self.where: Dict[str, str] = {}
        self._config = config
        self._service = service
        self._metrics = metrics
        self._access = _open_access(config)
        limits, count_error = config.limits, metrics.count_http_error
        self._http = HttpServer(InferenceRoutes(service), limits, count_error, self._access)
        self._status = HttpServer(status, limits, count_error, self._access)
        self._grpc: Optional[GrpcServer] = None

    async def open_early(self, passed: Passed, *, grpc_by_default: bool) -> None:
        """Open what answers while models load: a health check gets "live, not ready", not a refusal.

        What the service manager passed for inference stays closed: clients wait in the kernel until the
        models are there, so that a new start of the agent fails none of their requests.

        Args:
            passed: the service manager's sockets.
            grpc_by_default: whether gRPC is wanted where the settings do not say.

        Raises:
            Missing: an address cannot be bound.
            Refused, BadInput: as ``unix_socket.bind``.
        """
        if "metrics" in passed:
            await self._open_passed(self._status, "metrics", passed["metrics"])
        else:
            self.where["metrics"] = await _listen(self._status, self._config.metrics)
        if "http" not in passed:
            self.where["http"] = await _listen(self._http, self._config.http)
        if "unix" not in passed and self._config.http.unix:
            await self._http.start_unix(Path(self._config.http.unix), self._config.http.unix_mode)
            self.where["unix"] = self._config.http.unix
        if "grpc" not in passed:
            await self._start_grpc(by_default=grpc_by_default)

    async def open_late(self, passed: Passed) -> None:
        """Open the rest: the models are loaded.

        Raises:
            Missing: gRPC cannot be served.
        """
        for door in ("http", "unix"):
            if door in passed:
                await self._open_passed(self._http, door, passed[door])
        if "grpc" in passed:
            self._grpc = self._open_grpc()
            await self._open_passed(self._grpc, "grpc", passed["grpc"])

    async def drain(self) -> bool:
        """Answer what was accepted, and close all doors.

        Returns:
            Whether every accepted request was answered in time.
        """
        servers: List[Server] = [self._http] if self._grpc is None else [self._http, self._grpc]
        timeout_s = self._config.limits.drain_timeout_s
        drained = await asyncio.gather(*(each.drain(timeout_s) for each in servers))
        await self._status.drain(_STATUS_DRAIN_S)
        return all(drained)

    async def _open_passed(self, server: Server, door: str, passed: socket.socket) -> None:
        self.where[door] = describe(passed)  # a closed socket has no address any more
        await server.start_on(passed)

    async def _start_grpc(self, *, by_default: bool) -> None:
        """Listen for gRPC where that is wanted.

        Where nobody asked for it, what is in its way keeps nobody from HTTP.
        """
        wanted = self._config.grpc.enabled
        if wanted is False or (wanted is None and not by_default):
            return
        try:
            grpc = self._open_grpc()
            self.where["grpc"] = await _listen(grpc, self._config.grpc)
        except Missing as error:
            if wanted:
                raise
            _log.warning("there is no gRPC: %s: %s; %s", error.what, error.why, error.fix)
        else:
            self._grpc = grpc

    def _open_grpc(self) -> GrpcServer:
        try:
            from device_agent.server.grpc_server import GrpcServer  # megabytes, and a tenth of a second
        except ImportError as error:
            raise Missing(
                "gRPC cannot be served",
                str(error),
                "install edgekit-agent[grpc], or switch off what asks for it: [grpc] in agent.toml, or"
                " edgekit-agent-grpc.socket",
            ) from error
        limits, count_error = self._config.limits, self._metrics.count_grpc_error
        return GrpcServer(self._service, limits, count_error, self._access)


def _open_access(config: Config) -> Optional[Access]:
    if not config.tls.enabled:
        return None
    from device_agent.server.access import Access  # OpenSSL, which costs memory

    return Access(config.tls)


async def _listen(server: Server, address: Address) -> str:
    try:
        return await server.start(address)
    except OSError as error:
        raise Missing(
            f"{address.host}:{address.port} cannot be listened on",
            error.strerror or str(error),
            "stop the process that holds the port, or set another port in agent.toml",
        ) from error
