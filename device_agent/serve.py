"""The serving process: restore, listen, serve until told to stop, drain."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, List, Mapping, Optional

from device_agent import provisioned, temporary
from device_agent.building.background import BackgroundBuilds
from device_agent.config import Config
from device_agent.doors import Doors
from device_agent.lifecycle import Lifecycle
from device_agent.metrics import Metrics
from device_agent.models import Models
from device_agent.server import control
from device_agent.server.service import InferenceService
from device_agent.server.status import StatusRoutes
from device_agent.signature import Trust
from device_agent.store import Store
from device_agent.systemd import activation
from device_agent.systemd.notify import ServiceManager
from device_agent.systemd.watchdog import given_time, watched

if TYPE_CHECKING:
    from device_agent.follow.followers import Followers
    from device_agent.repository.repository import Repository, RepositorySettings

_log = logging.getLogger(__name__)


def run(config: Config, repository: Optional[RepositorySettings] = None) -> int:
    """Serve until SIGTERM or SIGINT.

    Every model that the store has active is loaded first, then those of the repository. When all doors are
    open, one line is logged: ``listening http=HOST:PORT metrics=HOST:PORT control=PATH`` and, where they are
    switched on, ``unix=PATH`` and ``grpc=HOST:PORT``. Sockets that the service manager passed take the place
    of the addresses in ``config``.

    Args:
        config: the settings.
        repository: models in Triton's layout to serve beside the installed bundles; None: there are none.

    Returns:
        0 if every accepted request was answered; 1 if ``drain_timeout_s`` ended the wait for some.

    Raises:
        AgentError: the store cannot be opened or an address cannot be bound.
    """
    # When the watchdog ends a hung agent, or native code crashes, the log has every thread's stack.
    faulthandler.enable()
    manager = ServiceManager.take(os.environ)
    temporary.clear_abandoned()
    with Store(config.state_dir) as store:
        loop = _new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(_serve(config, store, repository, manager))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            loop.close()


async def _serve(
    config: Config, store: Store, settings: Optional[RepositorySettings], manager: ServiceManager
) -> int:
    loop = asyncio.get_running_loop()
    passed = activation.take(os.environ)
    if not config.tls.enabled:
        activation.refuse_remote(passed)
    if config.allow_unsigned:
        _log.warning("allow_unsigned is set: anyone who can hand this device a bundle decides what it serves")
    metrics = Metrics()
    models = Models(config, metrics)
    lifecycle = Lifecycle(store, Trust(config.keys_dir, config.allow_unsigned), models, config.timeouts)
    lifecycle.bind(loop)
    repository = _open_repository(settings, models)
    service = InferenceService(models, metrics, config, repository)
    doors = Doors(config, service, StatusRoutes(models, metrics), metrics)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    manager.status("loading models")
    async with given_time(manager, config.limits.load_timeout_s, lambda: len(models.serving())):
        await doors.open_early(passed, grpc_by_default=repository is not None)
        await loop.run_in_executor(None, lifecycle.restore)
        if repository is not None:
            await repository.start()
        await doors.open_late(passed)
        followers = _start_following(config, lifecycle, metrics)
        control_server = await control.start(
            config.control_socket, lifecycle, config.control_socket_mode, passed.get("control")
        )
    service.loaded = True
    _log.info("listening %s", _listening(doors.where, config, passed))
    manager.status("serving")
    manager.ready()
    resumed = loop.run_in_executor(None, lifecycle.resume)  # probations are held on live requests
    building = BackgroundBuilds(lifecycle, models)
    building.start()
    first_start = loop.run_in_executor(None, provisioned.install, config.state_dir, lifecycle)
    async with watched(manager, models.hung):
        await stop.wait()

    manager.stopping()
    manager.status("finishing accepted requests")
    _log.info("stopping: finishing accepted requests")
    service.loaded = False
    control_server.close()
    if followers is not None:
        followers.stop()
    building.stop()
    patience_s = config.limits.drain_timeout_s + config.limits.load_timeout_s
    async with given_time(manager, patience_s, lambda: None):
        complete = await doors.drain()
        manager.status("finishing an update")
        await loop.run_in_executor(None, lifecycle.close)
        await resumed
        await first_start
        await loop.run_in_executor(None, building.join, 2.0)
        if followers is not None:
            await loop.run_in_executor(None, followers.join, 2.0)
    await _retire_all(models)
    if repository is not None:
        repository.close()
    _log.info("stopped" if complete else "stopped before every request was answered")
    return 0 if complete else 1


def _listening(where: Mapping[str, str], config: Config, passed: activation.Passed) -> str:
    """Every open door and its address, in one order."""
    control_at = activation.describe(passed["control"]) if "control" in passed else config.control_socket
    addresses = {**where, "control": control_at}
    order = ("http", "metrics", "control", "unix", "grpc")
    return " ".join(f"{door}={addresses[door]}" for door in order if door in addresses)


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


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """Uvloop's where it is installed, since it takes less of the processor; else asyncio's own."""
    try:
        import uvloop  # type: ignore[import-not-found]  # optional, so not there where types are checked
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
