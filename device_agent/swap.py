"""The switch in memory: requests move to a new version as one, and back if they have to."""

from __future__ import annotations

import asyncio
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Optional

from device_agent.errors import Refused

if TYPE_CHECKING:
    from device_agent.models import LoadedModel, Models

_POLL_S = 1.0


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
        self._loop = loop
        self._loaded = loaded
        self._old: Optional[LoadedModel] = None
        self._made = False

    def make(self) -> None:
        """Send new requests to the prepared version; the old one still finishes its own."""
        self._old = self._call(lambda: self._models.switch(self._loaded))
        self._made = True

    def undo(self) -> None:
        """Send requests to the old version again, if they were moved at all, and free the new one."""
        if self._made and self._old is not None:
            old = self._old
            self._call(lambda: self._models.switch(old))
        elif self._made:
            self._call(lambda: self._models.unload(self._loaded.manifest.name))
        self._wait(self._models.retire(self._loaded))

    def finish(self) -> None:
        """Free the old version once it has answered what it accepted."""
        if self._old is not None:
            self._wait(self._models.retire(self._old))

    def _call(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` between two requests."""
        if self._loop is None:
            return function()

        async def call() -> Any:
            return function()

        return self._wait(call())

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
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
