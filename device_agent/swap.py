"""The switch in memory: requests move to a new version as one, and back if they have to."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Iterator, Optional

from device_agent.errors import AgentError, Refused
from device_agent.swap_plan import SwapPlan

if TYPE_CHECKING:
    from device_agent.models import LoadedModel, Models

_POLL_S = 1.0
_log = logging.getLogger(__name__)


class Swap:
    """Puts a prepared version in the place of the one that serves.

    Args:
        models: what serves.
        loop: the event loop that dispatches requests; None before anything serves. All methods are called
            from other threads than the loop's.
        loaded: the prepared version.
    """

    def __init__(
        self, models: Models, loop: Optional[asyncio.AbstractEventLoop], loaded: LoadedModel
    ) -> None:
        self._models = models
        self._on_loop = _OnLoop(loop)
        self._loaded = loaded
        self._old: Optional[LoadedModel] = None
        self._made = False

    def make(self) -> None:
        """Send new requests to the prepared version; the old one still finishes its own."""
        self._old = self._on_loop.call(lambda: self._models.switch(self._loaded))
        self._made = True

    def undo(self) -> None:
        """Send requests to the old version again, if they were moved at all, and free the new one."""
        if self._made and self._old is not None:
            old = self._old
            self._on_loop.call(lambda: self._models.switch(old))
        elif self._made:
            self._on_loop.call(lambda: self._models.unload(self._loaded.manifest.name))
        self._on_loop.wait(self._models.retire(self._loaded))

    def finish(self) -> None:
        """Free the old version once it has answered what it accepted."""
        if self._old is not None:
            self._on_loop.wait(self._models.retire(self._old))


@contextmanager
def stopped_first(
    models: Models, loop: Optional[asyncio.AbstractEventLoop], name: str, planned: SwapPlan
) -> Iterator[None]:
    """Stop the version that serves for the length of a ``with`` block that brings up another.

    Nothing is stopped where ``planned`` has no pause. If the block fails, the old version is loaded again.
    """
    if planned.pause_s is None:
        yield
        return
    on_loop = _OnLoop(loop)
    _log.warning("%s: %s", name, planned)
    old: Optional[LoadedModel] = on_loop.call(lambda: models.begin_pause(name, planned))
    started_s = time.monotonic()
    try:
        if old is not None:
            on_loop.wait(models.retire(old))
        yield
    except BaseException:
        if old is not None:
            _bring_back(models, on_loop, old)
        raise
    finally:
        on_loop.call(lambda: models.end_pause(name))
        _log.info("%s: the pause took %.1f s", name, time.monotonic() - started_s)


def _bring_back(models: Models, on_loop: _OnLoop, old: LoadedModel) -> None:
    try:
        loaded = models.prepare(old.directory, old.manifest, old.digest)
    except AgentError as error:  # the reason why the new version failed matters more
        _log.error("%s: the old version does not come up again: %s", old.manifest.name, error)
        return
    on_loop.call(lambda: models.switch(loaded))


class _OnLoop:
    """Calls what belongs to the event loop from another thread; at once where no loop serves yet."""

    def __init__(self, loop: Optional[asyncio.AbstractEventLoop]) -> None:
        self._loop = loop

    def call(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` between two requests."""
        if self._loop is None:
            return function()

        async def call() -> Any:
            return function()

        return self.wait(call())

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run ``coroutine`` to its end."""
        if self._loop is None:
            return asyncio.run(coroutine)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except FutureTimeoutError:
                if not self._loop.is_running():
                    raise Refused(
                        "the operation was interrupted", "the agent stops", "run it again once it is up"
                    ) from None
