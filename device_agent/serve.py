"""The serving process: restore, listen, serve until told to stop, drain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Protocol, Tuple

from device_agent import provisioned
from device_agent.config import Address, Config
from device_agent.errors import Missing
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server import control
from device_agent.server.http import HttpServer
from device_agent.server.routes import InferenceRoutes
from device_agent.server.service import InferenceService
from device_agent.server.status import StatusRoutes
from device_agent.signature import Trust
from device_agent.store import Store

if TYPE_CHECKING:
    from device_agent.follow.followers import Followers
    from device_agent.repository.repository import Repository, RepositorySettings
    from device_agent.server.grpc_server import GrpcServer

_log = logging.getLogger(__name__)


class Server(Protocol):
    """A listener, whichever protocol it speaks."""

    async def start(self, address: Address) -> str:
        """Listen; return the address as bound. Raises OSError."""

    async def drain(self, timeout_s: float) -> bool:
        """Stop accepting, answer what was accepted, close; return whether that was done in time."""


def run(config: Config, repository: Optional[RepositorySettings] = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Every model that the store has active is loaded first, then those of the repository. When all doors are
    open, one line is logged: ``listening http=HOST:PORT metrics=HOST:PORT control=PATH`` and, where they are
    switched on, ``unix=PATH`` and ``grpc=HOST:PORT``.

    Args:
        config: the settings.
        repository: models in Triton's layout to serve beside the installed bundles; None: there are none.

    Returns:
        0 if every accepted request was answered; 1 if ``drain_timeout_s`` ended the wait for some.

    Raises:
        AgentError: the store cannot be opened or an address cannot be bound.
    """
    with Store(config.state_dir) as store:
        loop = _new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(_serve(config, store, repository))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            loop.close()


async def _serve(config: Config, store: Store, settings: Optional[RepositorySettings]) -> int:
    loop = asyncio.get_running_loop()
    metrics = Metrics()
    models = Models(config, metrics)
    lifecycle = Lifecycle(store, Trust(config.keys_dir, config.allow_unsigned), models)
    lifecycle.bind(loop)
    repository = _open_repository(settings, models)
    service = InferenceService(models, metrics, config, repository)
    http = HttpServer(InferenceRoutes(service), config.limits, metrics.count_http_error)
    status = HttpServer(StatusRoutes(models, metrics), config.limits, metrics.count_http_error)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    # The doors open first: a health check gets "live, not ready" while models load, not a refused connection.
    http_address = await _listen(http, config.http)
    metrics_address = await _listen(status, config.metrics)
    if config.http.unix:
        await http.start_unix(Path(config.http.unix), config.http.unix_mode)
    grpc, grpc_address = await _start_grpc(service, config, metrics, by_default=repository is not None)
    await loop.run_in_executor(None, lifecycle.restore)
    if repository is not None:
        await repository.start()
    followers = _start_following(config, lifecycle, metrics)
    control_server = await control.start(config.control_socket, lifecycle)
    service.ready = True
    doors = {
        "http": http_address,
        "metrics": metrics_address,
        "control": str(config.control_socket),
        "unix": config.http.unix,
        "grpc": grpc_address,
    }
    _log.info("listening %s", " ".join(f"{door}={where}" for door, where in doors.items() if where))
    _notify_service_manager("READY=1")
    first_start = loop.run_in_executor(None, provisioned.install, config.state_dir, lifecycle)

    await stop.wait()
    _notify_service_manager("STOPPING=1")
    _log.info("stopping: finishing accepted requests")
    service.ready = False
    control_server.close()
    if followers is not None:
        followers.stop()
    servers: List[Server] = [http] if grpc is None else [http, grpc]
    drained = await asyncio.gather(*(each.drain(config.limits.drain_timeout_s) for each in servers))
    complete = all(drained)
    await status.drain(1.0)
    await loop.run_in_executor(None, lifecycle.close)  # an update that runs is finished first
    await first_start
    if followers is not None:
        await loop.run_in_executor(None, followers.join, 2.0)
    await _retire_all(models)
    if repository is not None:
        repository.close()
    _log.info("stopped" if complete else "stopped before every request was answered")
    return 0 if complete else 1


def _open_repository(settings: Optional[RepositorySettings], models: Models) -> Optional[Repository]:
    if settings is None:
        return None
    from device_agent.repository.repository import Repository  # only where there is one

    return Repository(settings, models)


def _start_following(config: Config, lifecycle: Lifecycle, metrics: Metrics) -> Optional[Followers]:
    if not config.follow:
        return None
    from device_agent.follow.followers import Followers  # TLS and HTTP clients, only where they are needed

    followers = Followers(config.follow, config.state_dir, lifecycle, metrics)
    lifecycle.show_followers(followers.describe)
    followers.start()
    return followers


async def _retire_all(models: Models) -> None:
    """Free the engines; one that hangs is left to the end of the process."""
    retiring: List[Any] = [models.retire(loaded) for loaded in models.serving()]
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.gather(*retiring), timeout=1.0)


async def _start_grpc(
    service: InferenceService, config: Config, metrics: Metrics, *, by_default: bool
) -> Tuple[Optional[GrpcServer], str]:
    """Listen for gRPC where that is wanted.

    Where nobody asked for it, what is in its way keeps nobody from HTTP.

    Args:
        service: what answers.
        config: the settings.
        metrics: counts the failures.
        by_default: whether it is wanted where the settings do not say.

    Returns:
        The listener and its address; None and an empty string where there is none.
    """
    wanted = config.grpc.enabled
    if wanted is False or (wanted is None and not by_default):
        return None, ""
    try:
        grpc = _open_grpc(service, config, metrics)
        return grpc, await _listen(grpc, config.grpc)
    except Missing as error:
        if wanted:
            raise
        _log.warning("there is no gRPC: %s: %s; %s", error.what, error.why, error.fix)
        return None, ""


def _open_grpc(service: InferenceService, config: Config, metrics: Metrics) -> GrpcServer:
    try:
        from device_agent.server.grpc_server import GrpcServer  # megabytes, and a tenth of a second
    except ImportError as error:
        raise Missing(
            "gRPC cannot be served",
            str(error),
            "install edgekit-agent[grpc], or set enabled = false under [grpc] in agent.toml",
        ) from error
    return GrpcServer(service, config.limits, metrics.count_grpc_error)


async def _listen(server: Server, address: Address) -> str:
    try:
        return await server.start(address)
    except OSError as error:
        raise Missing(
            f"{address.host}:{address.port} cannot be listened on",
            error.strerror or str(error),
            "stop the process that holds the port, or set another port in agent.toml",
        ) from error


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """Uvloop's where it is installed, since it takes less of the processor; else asyncio's own."""
    try:
        import uvloop  # type: ignore[import-not-found]  # optional, so not there where types are checked
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _notify_service_manager(state: str) -> None:
    """Tell systemd, if it started this process, how it is (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            _log.warning("the service manager cannot be told %s: %s", state, error)
