"""The way of a staged version into service: prepared, self-tested, switched, on probation, committed.

Until the switch the old version serves and nothing on disk says otherwise; where that is asked for, the new
one computes copies of live requests meanwhile (see ``probation.shadow``). The switch is one atomic write of
``state.json``. From then on the next start comes up with the new version, which is on probation until a
second write commits it. An error, a verdict of the health gate or a time-out takes both writes back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple

from device_agent.bounded import Timeouts, bounded
from device_agent.errors import AgentError, Refused
from device_agent.journal import Operation
from device_agent.manifest import Manifest
from device_agent.model_state import ModelState
from device_agent.probation.shadow import Shadow
from device_agent.probation.watch import Interrupted, Watch
from device_agent.signature import Signer
from device_agent.startup import recording
from device_agent.store import Store
from device_agent.swap import OnLoop, Swap
from device_agent.swap_plan import NOTHING_TO_STOP, SwapPlan

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel
    from device_agent.models import Models

#: Reads the manifest of an installed version (name, digest) and checks its files and signature.
Check = Callable[[str, str], Tuple[Manifest, Signer]]
_log = logging.getLogger(__name__)


class Activation:
    """Brings versions into service, one at a time; every method blocks.

    Args:
        store: the versions on disk.
        models: the versions in memory.
        check: checks an installed version again.
        timeouts: how long each step may take.
    """

    def __init__(self, store: Store, models: Models, check: Check, timeouts: Timeouts) -> None:
        self._store = store
        self._models = models
        self._check = check
        self._timeouts = timeouts
        self._loop = OnLoop(None)
        self._stop = threading.Event()
        self._watches: Dict[str, Watch] = {}
        self._shadows: Dict[str, Shadow] = {}

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make switches on the event loop that serves."""
        self._loop = OnLoop(loop)

    def stop(self) -> None:
        """Leave a probation that runs to the next start."""
        self._stop.set()

    def probation_of(self, name: str) -> Optional[Dict[str, Any]]:
        """How a model's probation stands; None: it has none."""
        watch = self._watches.get(name)
        return None if watch is None else watch.describe()

    def shadow_of(self, name: str) -> Optional[Dict[str, Any]]:
        """How a version does that computes copies of live requests now; None: there is none."""
        shadow = self._shadows.get(name)
        return None if shadow is None else shadow.describe()

    def load(self, name: str, digest: str) -> None:
        """Serve an installed version at a start, when nothing of that name serves yet."""
        swap = self._swap(name, NOTHING_TO_STOP)
        swap.take(self._prepare(self._check(name, digest)[0], digest))
        swap.make()

    def bring_up(self, operation: Operation, manifest: Manifest, target: ModelState) -> SwapPlan:
        """Take a staged version to ``committed``; on any error everything is as it was.

        Where memory does not hold both versions, the old one is stopped first, which is told beforehand.

        Args:
            operation: journals the states.
            manifest: of the version.
            target: the model's state in which the version is active.

        Raises:
            Refused: the version failed its self-test or its probation, or a step took too long.
            Interrupted: the agent stops; the version stays on probation.
        """
        self._build(operation, manifest)
        planned = self._models.plan_swap(manifest)
        if planned.pause_s is not None and operation.on_state is not None:
            operation.on_state(str(planned))
        before = self._store.state(operation.name)
        swap = self._swap(operation.name, planned)
        try:
            self._replace(operation, manifest, target, swap)
        except Interrupted:
            swap.finish()
            raise
        except BaseException:
            try:
                swap.undo()
            finally:
                self._write_back(operation.name, before)
            raise
        swap.finish()
        self._tidy(operation.name, operation.digest)
        return planned

    def resume(self, operation: Operation) -> None:
        """Let a version that a start came up with go on with its probation, and commit it or return."""
        name, state = operation.name, self._store.state(operation.name)
        loaded = self._models.get(name)
        if loaded is None or loaded.digest != operation.digest or state.active != operation.digest:
            return
        try:
            self._hold_probation(operation, loaded)
        except Interrupted:
            return
        except Exception as failure:  # whatever it was, the version has not proven itself
            _log.error("%s: %s is given up after its start: %s", name, operation.digest[:12], failure)
            self._return(operation, state, loaded, failure)
            return
        with recording(name):
            self._store.set_state(name, state.with_commit())
            operation.enter(operation.goal)
            self._tidy(name, operation.digest)

    def reload(self, loaded: LoadedModel) -> None:
        """Serve the same version with the best engine that is here now; nothing if it serves no more.

        Raises:
            Refused: nothing of it comes up any more. What served, serves on.
        """
        if self._models.get(loaded.manifest.name) is loaded:
            self._serve_instead(loaded.manifest.name, loaded.digest)

    # Steps

    def _build(self, operation: Operation, manifest: Manifest) -> None:
        """Build the engine while the old version serves; where none does, ONNX Runtime serves first."""
        if self._models.get(operation.name) is None:
            return
        directory = self._store.directory(operation.name, operation.digest)
        self._models.builds.build(directory, manifest, self._stop, operation.on_state or _nobody)

    def _replace(self, operation: Operation, manifest: Manifest, target: ModelState, swap: Swap) -> None:
        name, digest = operation.name, operation.digest
        swap.begin()
        loaded = self._prepare(manifest, digest)
        swap.take(loaded)
        operation.enter("prepared")
        operation.enter("selftested")
        if digest not in target.committed:
            self._shadow(operation, loaded, swap)
        # Disk first: if this write fails nothing has happened yet, and if the power goes after it the next
        # start comes up on a version that has just passed its self-test here.
        self._store.set_state(name, target)
        swap.make()
        operation.enter("switched")
        if digest not in target.committed:  # a version that was committed before has proven itself here
            operation.begin_attempt()
            self._hold_probation(operation, loaded, swap)
        self._store.set_state(name, target.with_commit())
        operation.enter("committed")

    def _prepare(self, manifest: Manifest, digest: str) -> LoadedModel:
        directory = self._store.directory(manifest.name, digest)
        return bounded(
            lambda: self._models.prepare(directory, manifest, digest),
            self._timeouts.prepare_s,
            f"{manifest.name} version {manifest.version} was not ready in time",
            self._models.discard,
        )

    def _shadow(self, operation: Operation, loaded: LoadedModel, swap: Swap) -> None:
        """Before the switch, have the version compute copies of live requests, if that is asked for."""
        shadow = self._models.shadow(
            loaded, swap.old, paused=swap.paused, live=self._loop.serves, stop=self._stop
        )
        if shadow is None:
            return
        _log.info("%s: %s", operation.name, shadow)
        if operation.on_state is not None:
            operation.on_state(str(shadow))
        self._shadows[operation.name] = shadow
        try:
            self._loop.wait(shadow.run())
        finally:
            del self._shadows[operation.name]
            operation.shadow = shadow.describe()

    def _hold_probation(self, operation: Operation, loaded: LoadedModel, swap: Optional[Swap] = None) -> None:
        watch = self._models.watch(
            loaded,
            None if swap is None else swap.old,
            paused=swap is not None and swap.paused,
            live=self._loop.serves,
            stop=self._stop,
            seen_s=operation.seen_s,
        )
        self._watches[operation.name] = watch
        try:
            self._loop.wait(watch.run())
        except Interrupted:
            with recording(operation.name):
                operation.interrupt(watch.seen_s)
            raise
        finally:
            del self._watches[operation.name]

    def _return(
        self, operation: Operation, state: ModelState, loaded: LoadedModel, failure: Exception
    ) -> None:
        """Serve the fallback in the place of a version that did not hold; nothing where there is none."""
        name = operation.name
        try:
            if state.fallback is None:
                self._unload(loaded)
            else:
                self._serve_instead(name, state.fallback)
        except AgentError as error:
            _log.error("%s: the fallback does not come up, so it serves on: %s", name, error)
            return
        with recording(name):
            self._store.set_state(name, state.given_up())
            operation.fail(failure)

    def _serve_instead(self, name: str, digest: str) -> None:
        manifest, _ = self._check(name, digest)
        swap = self._swap(name, self._models.plan_swap(manifest))
        try:
            swap.begin()
            swap.take(self._prepare(manifest, digest))
            swap.make()
        except BaseException:
            swap.undo()
            raise
        swap.finish()

    def _unload(self, loaded: LoadedModel) -> None:
        swap = self._swap(loaded.manifest.name, NOTHING_TO_STOP)
        self._loop.call(lambda: self._models.unload(loaded.manifest.name))
        swap.finish()

    # Helpers

    def _swap(self, name: str, planned: SwapPlan) -> Swap:
        return Swap(self._models, self._loop, name, planned, self._timeouts.drain_s)

    def _tidy(self, name: str, digest: str) -> None:
        """Free the space of old versions; a failure here takes nothing from what was committed."""
        try:
            self._store.set_starts(name, digest, 0)
            self._store.collect(name)
        except Refused as error:
            _log.error("old versions of %s could not be removed: %s", name, error.why)

    def _write_back(self, name: str, before: ModelState) -> None:
        try:
            if self._store.state(name) != before:
                self._store.set_state(name, before)
        except Refused as error:
            _log.error("the state of %s could not be written back: %s", name, error.why)


def _nobody(line: str) -> None:
    """Nobody reads how far a build is."""
