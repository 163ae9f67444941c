"""The switch in memory: requests move to a new version as one, and back if they have to."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Callable, Coroutine, Optional

from device_agent.errors import AgentError, Refused
from device_agent.swap_plan import SwapPlan

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel
    from device_agent.models import Models

_POLL_S = 1.0
_log = logging.getLogger(__name__)


class Swap:
    """Puts a new version in the place of the one that serves, and back.

    In order: :meth:`begin`, :meth:`take` once the new version is prepared, :meth:`make`, and then either
    :meth:`finish` or :meth:`undo`; ``undo`` is right at any point. Where memory does not hold both versions
    the old one is freed by ``begin`` and loaded again by ``undo``.

    Args:
        models: what serves.
        loop: the loop that serves; None before anything does.
        name: the model.
        planned: whether the old version has to be stopped first.
        drain_timeout_s: how long a version that is replaced may take to answer what it accepted.

    Attributes:
        old: the version that served at the beginning; None if there was none.
    """

    def __init__(
        self, models: Models, loop: OnLoop, name: str, planned: SwapPlan, drain_timeout_s: float
    ) -> None:
        self.old: Optional[LoadedModel] = models.get(name)
        self._models = models
        self._loop = loop
        self._name = name
        self._planned = planned
        self._drain_timeout_s = drain_timeout_s
        self._stopped = self._made = False
        self._new: Optional[LoadedModel] = None
        self._began_s = 0.0

    @property
    def paused(self) -> bool:
        """Whether the old version was freed first."""
        return self._stopped

    def begin(self) -> None:
        """Stop the old version if that is planned; clients are told when to come back."""
        if self._planned.pause_s is None:
            return
        _log.warning("%s: %s", self._name, self._planned)
        self._began_s = time.monotonic()
        self._stopped = True
        self._loop.call(lambda: self._models.begin_pause(self._name, self._planned))
        if self.old is not None:
            self._retire(self.old)

    def take(self, loaded: LoadedModel) -> None:
        """Have the new version, which is freed if it comes to nothing."""
        self._new = loaded

    def make(self) -> None:
        """Send new requests to the new version; the old one still finishes its own."""
        new = self._new
        if new is None:
            raise RuntimeError("there is no version to switch to")
        self._loop.call(lambda: self._models.switch(new))
        self._made = True
        self._end_pause()

    def finish(self) -> None:
        """Free the old version once it has answered what it accepted."""
        if self.old is not None and not self._stopped:
            self._retire(self.old)

    def undo(self) -> None:
        """Send requests to the old version again, if they were moved at all, and free the new one."""
        if self._stopped:
            self._undo_with_pause()
            return
        if self._made:
            self._loop.call(self._switch_back)
        if self._new is not None:
            self._retire(self._new)

    def _switch_back(self) -> None:
        if self.old is not None:
            self._models.switch(self.old)
        else:
            self._models.unload(self._name)

    def _undo_with_pause(self) -> None:
        self._loop.call(lambda: self._models.begin_pause(self._name, self._planned))
        try:
            if self._new is not None:
                self._retire(self._new)
            if self.old is not None:
                self._bring_back(self.old)
        finally:
            self._end_pause()

    def _bring_back(self, old: LoadedModel) -> None:
        try:
            loaded = self._models.prepare(old.directory, old.manifest, old.digest)
        except AgentError as error:  # the reason why the new version failed matters more
            _log.error("%s: the old version does not come up again: %s", self._name, error)
            return
        self._loop.call(lambda: self._models.switch(loaded))

    def _end_pause(self) -> None:
        if self._stopped:
            self._loop.call(lambda: self._models.end_pause(self._name))
            _log.info("%s: the pause took %.1f s", self._name, time.monotonic() - self._began_s)

    def _retire(self, loaded: LoadedModel) -> None:
        try:
            self._loop.wait(self._models.retire(loaded), self._drain_timeout_s)
        except asyncio.TimeoutError:
            _log.error(
                "%s: %s is left as it is: it did not answer what it accepted within %g s",
                self._name, loaded.digest[:12], self._drain_timeout_s,
            )  # fmt: skip


class OnLoop:
    """Calls what belongs to the event loop from another thread; at once where no loop serves yet.

    Args:
        loop: the loop; None: there is none.
    """

    def __init__(self, loop: Optional[asyncio.AbstractEventLoop]) -> None:
        self._loop = loop

    @property
    def serves(self) -> bool:
        """Whether there is a loop, and so requests may come."""
        return self._loop is not None

    def call(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` between two requests."""
        if self._loop is None:
            return function()

        async def call() -> Any:
            return function()

        return self.wait(call())

    def wait(self, coroutine: Coroutine[Any, Any, Any], timeout_s: Optional[float] = None) -> Any:
        """Run ``coroutine`` to its end.

        Raises:
            asyncio.TimeoutError: it took longer than ``timeout_s`` and was cancelled.
            Refused: the loop ended meanwhile.
        """
        bounded = asyncio.wait_for(coroutine, timeout_s)
        if self._loop is None:
            return asyncio.run(bounded)
        future = asyncio.run_coroutine_threadsafe(bounded, self._loop)
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except FutureTimeoutError:
                if future.done():
                    return future.result()
                if not self._loop.is_running():
                    raise Refused(
                        "the operation was interrupted", "the agent stops", "run it again once it is up"
                    ) from None
