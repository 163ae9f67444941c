"""Tell the service manager that all is well while it is, and ask it for time while something takes long.

Both run on the event loop, so that a loop that hangs says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from typing import Any, AsyncIterator, Callable, Coroutine

from device_agent.systemd.notify import ServiceManager

_PER_INTERVAL = 3  # so that one that comes late is no harm
_EXTENSION_S = 30.0
_EXTEND_EVERY_S = 5.0

_log = logging.getLogger(__name__)


@asynccontextmanager
async def watched(manager: ServiceManager, problem: Callable[[], str]) -> AsyncIterator[None]:
    """Answer the manager's watchdog while the context lasts.

    Args:
        manager: who watches; where it does not, nothing happens.
        problem: what is wrong now, so that the service must be started again; empty: nothing.
    """
    if manager.watchdog_s is None:
        yield
        return
    async with _beside(_answer(manager, manager.watchdog_s / _PER_INTERVAL, problem)):
        yield


@asynccontextmanager
async def given_time(
    manager: ServiceManager, limit_s: float, progress: Callable[[], Any]
) -> AsyncIterator[None]:
    """Ask the manager again and again to wait, while the context lasts.

    Args:
        manager: who would otherwise lose its patience with a start or a stop.
        limit_s: without progress for so long, it is asked no more.
        progress: anything that changes when there is progress.
    """
    async with _beside(_ask_for_time(manager, limit_s, progress)):
        yield


async def _answer(manager: ServiceManager, every_s: float, problem: Callable[[], str]) -> None:
    told = ""
    while True:
        found = problem()
        if not found:
            manager.alive()
        if found != told:
            _log.error("the watchdog gets no answer: %s", found or "that is over")
            manager.status(found or "serving again")
        told = found
        await asyncio.sleep(every_s)


async def _ask_for_time(manager: ServiceManager, limit_s: float, progress: Callable[[], Any]) -> None:
    mark, since_s = progress(), time.monotonic()
    while time.monotonic() - since_s < limit_s:
        manager.extend(_EXTENSION_S)
        await asyncio.sleep(_EXTEND_EVERY_S)
        if progress() != mark:
            mark, since_s = progress(), time.monotonic()
    _log.error("nothing has moved on for %g s; the service manager is asked to wait no longer", limit_s)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
