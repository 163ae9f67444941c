"""The update of a model as a state machine: every step journaled, nothing in between.

    received -> verified -> staged -> prepared -> selftested -> switched -> probation -> committed

    received    the bundle's head was read: it is a bundle that this agent understands
    verified    a trusted key signed the manifest; no byte was stored yet
    staged      every file is in the store, checked and synced
    prepared    an engine is open
    selftested  it reproduced the golden outputs and is warm
    switched    the next start comes up with it, and new requests go to it
    probation   its live traffic is watched (see ``probation``); the old version stays loaded
    committed   it has proven itself; versions that it made needless are removed

An error in any state leaves the old version active and its reason in the journal. After a crash ``restore``
comes up on the old version or on the new one, whole, and ``resume`` ends what was on probation. From
``prepared`` on, the way is that of :mod:`device_agent.activation`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Optional

from device_agent import archive, journal, startup
from device_agent.activation import Activation
from device_agent.admission import Admission, Rotated
from device_agent.bounded import Timeouts, bounded
from device_agent.errors import AgentError, BadInput, Refused
from device_agent.installed import Version
from device_agent.journal import Operation, abandon_interrupted
from device_agent.model_state import ModelState
from device_agent.outcome import Installed, outcome_of
from device_agent.probation.watch import Interrupted
from device_agent.signature import Trust
from device_agent.store import Store
from device_agent.swap_plan import NOTHING_TO_STOP

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel
    from device_agent.models import Models

OnState = Callable[[str], None]
_DEFAULT_TIMEOUTS = Timeouts()
_log = logging.getLogger(__name__)


class Lifecycle:
    """Installs, activates, rolls back and restores the versions in a store.

    Every operation blocks, and one runs at a time. Once ``bind`` was called, operations must run on other
    threads than the event loop's.
    """

    def __init__(
        self, store: Store, trust: Trust, models: Models, timeouts: Timeouts = _DEFAULT_TIMEOUTS
    ) -> None:
        self._store = store
        self._admission = Admission(store, trust)
        self._models = models
        self._timeouts = timeouts
        self._activation = Activation(store, models, self._admission.check, timeouts)
        self._busy = threading.Lock()
        self._closed = False
        self._describe_followers: Callable[[], Mapping[str, Mapping[str, Any]]] = dict
        self._on_probation: Dict[str, Operation] = {}  # since the last start

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make switches on the event loop that serves; before this, nothing serves yet."""
        self._activation.bind(loop)

    def close(self) -> None:
        """Wait for the operation that runs, and begin no other: the store is about to be closed.

        A probation is not waited for: it goes on at the next start.
        """
        self._activation.stop()
        with self._busy:
            self._closed = True

    def show_followers(self, describe: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        """Show in ``status`` which tags the models follow; ``describe`` gives that by model."""
        self._describe_followers = describe

    # Operations

    def preflight(
        self,
        head: archive.Head,
        download_bytes: int,
        *,
        activate: bool = True,
        allow_downgrade: bool = False,
    ) -> None:
        """What ``install`` would refuse before it stores a byte, before a byte is even fetched.

        Args:
            head: of the bundle.
            download_bytes: what would be fetched to a place beside the store.
            activate: as in ``install``.
            allow_downgrade: as in ``install``.

        Raises:
            TrustError: it is not trusted.
            Refused: it is older than what was committed (DowngradeError), or there is no space or memory
                for it.
        """
        self._admission.admit(head, allow_downgrade)
        self._store.require_space(head, download_bytes)
        if activate:
            self._models.require_memory(head.manifest)

    def install(
        self,
        bundle: Path,
        activate: bool = True,
        on_state: Optional[OnState] = None,
        *,
        allow_downgrade: bool = False,
    ) -> Installed:
        """Take a bundle, either form, through the whole state machine.

        Args:
            bundle: its path on this device.
            activate: False stops at ``staged``.
            on_state: called with each state once it is reached.
            allow_downgrade: take it though a newer version was committed; for a person at the device.

        Raises:
            BadInput: not a bundle, damaged, too new, or not trusted (ManifestError, TrustError).
            Missing: a runtime that it needs is not here.
            Refused: it is older than what was committed (DowngradeError), there is no space or memory, or it
                failed its self-test or its probation. In every case the old version serves on.
        """
        with self._turn():
            head = self._read_head(bundle)
            goal = "committed" if activate else "staged"
            operation = Operation(self._store, "install", head.manifest.name, head.digest, goal, on_state)
            with _journaled(operation):
                operation.enter("received")
                signer = self._admission.admit(head, allow_downgrade)
                abandon_interrupted(self._store, operation.name)
                operation.fresh = not self._store.has(operation.name, operation.digest)
                if operation.fresh and not self._store.owns(bundle):
                    self._store.require_space(head)  # before the journal takes the last bytes
                if activate:
                    self._models.require_memory(head.manifest)
                operation.enter("verified")
                self._store.add(bundle, head, self._timeouts.stage_s)
                operation.enter("staged")
                before = self._store.state(operation.name)
                planned = NOTHING_TO_STOP
                if activate:
                    planned = self._activation.bring_up(
                        operation, head.manifest, before.activated(head.digest)
                    )
                return outcome_of(operation, head.manifest, before, signer, planned)

    def activate(self, digest: str, on_state: Optional[OnState] = None) -> Installed:
        """Serve an installed version; ``digest`` may be shortened to six characters.

        Raises:
            BadInput: no such version, or it is not trusted any more.
            Refused: it failed its self-test or its probation; or it was never committed, and a newer one
                was. The old version serves on.
        """
        with self._turn():
            version = self._store.find(digest)
            abandon_interrupted(self._store, version.name)
            target = self._store.state(version.name).activated(version.digest)
            operation = Operation(self._store, "activate", version.name, version.digest, on_state=on_state)
            return self._change(operation, target)

    def rollback(self, name: str, on_state: Optional[OnState] = None) -> Installed:
        """Return to the fallback version; what was active becomes the fallback.

        It was committed before, so it is self-tested and has no probation.

        Raises:
            BadInput: there is no fallback.
            Refused: the fallback failed its self-test. The active version serves on.
        """
        with self._turn():
            abandon_interrupted(self._store, name)
            state = self._store.state(name)
            if state.fallback is None:
                raise BadInput(
                    f"{name!r} has no version to return to",
                    "no other version was committed on this device",
                    "`edgekit-agent list` shows what is installed",
                )
            operation = Operation(self._store, "rollback", name, state.fallback, on_state=on_state)
            return self._change(operation, state.rolled_back())

    def remove(self, digest: str) -> Version:
        """Remove an installed version that is not active.

        Raises:
            BadInput: no such version, or it is active.
        """
        with self._turn():
            version = self._store.find(digest)
            self._store.remove(version.name, version.digest)
            return version

    def restore(self) -> None:
        """Bring up the active version of every model at start; the fallback where that fails.

        A model that cannot be brought up at all is logged and left out: the others serve.
        """
        with self._turn():
            self._on_probation = startup.restore(self._store, self._activation.load)

    def resume(self) -> None:
        """End the probations that a stop interrupted; call it once requests can come."""
        with self._turn():
            pass  # which every operation does first

    def reload(self, loaded: LoadedModel) -> None:
        """Serve a version with an engine that was built meanwhile; nothing if it serves no more.

        Raises:
            Refused: nothing of it comes up any more. What served, serves on.
        """
        with self._turn():
            self._activation.reload(loaded)

    def rotate(self, document: bytes) -> Rotated:
        """Take a rotation document: see ``Admission.rotate``, which says what is refused."""
        with self._turn():
            return self._admission.rotate(document)

    def trusted_keys(self) -> List[Dict[str, Any]]:
        """Describe every key that signs, or signed once."""
        return self._admission.keys()

    def status(self) -> List[Dict[str, Any]]:
        """Describe every model: versions on disk, what serves, and the last operation with its failure."""
        followers = self._describe_followers()
        names = sorted({*self._store.names(), *followers})
        return [{**self._describe(name), "follow": followers.get(name)} for name in names]

    def list(self) -> List[Dict[str, Any]]:
        """Describe every installed version."""
        return [version.describe() for version in self._store.list()]

    @property
    def incoming(self) -> Path:
        """Where bundles are put together of chunks; ``install`` moves them from there."""
        return self._store.incoming

    def holds(self, head: archive.Head) -> bool:
        """Whether a version is installed, whole; reads all of it."""
        return self._store.holds(head)

    # The machine

    def _read_head(self, bundle: Path) -> archive.Head:
        what = f"the bundle {bundle.name} was not read in time"
        return bounded(partial(archive.read_head, bundle), self._timeouts.stage_s, what)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until no other operation runs, and end what a stop interrupted.

        Afterwards what was committed raises the ratchet.
        """
        with self._busy:
            if self._closed:
                raise Refused("nothing can be changed now", "the agent stops", "try again once it is up")
            try:
                while self._on_probation:
                    self._activation.resume(self._on_probation.popitem()[1])
                yield
            finally:
                self._admission.settle_all()

    def _change(self, operation: Operation, target: ModelState) -> Installed:
        """Bring up an installed version; ``target`` is the state in which it is active."""
        with _journaled(operation):
            parsed, signer = self._admission.readmit(operation.name, operation.digest)
            operation.enter("staged")
            before = self._store.state(operation.name)
            planned = self._activation.bring_up(operation, parsed, target)
            return outcome_of(operation, parsed, before, signer, planned)

    # Reports

    def _describe(self, name: str) -> Dict[str, Any]:
        serving, pause = self._models.get(name), self._models.pause_of(name)
        entry = self._store.journal(name)
        return {
            "name": name,
            **asdict(self._store.state(name)),
            "serving": None if serving is None else serving.digest,
            "pause": None if pause is None else str(pause),
            "engine": self._models.describe_engine(name),
            "engine_build": self._models.builds.report(name),
            "probation": self._activation.probation_of(name),
            "shadow": self._activation.shadow_of(name),
            "last_operation": None if entry is None else journal.last(entry),
            "history": [] if entry is None else journal.past(entry),
            "versions": [version.describe() for version in self._store.versions(name)],
        }


@contextmanager
def _journaled(operation: Operation) -> Iterator[None]:
    """If the operation fails, keep the reason and take back what it added."""
    try:
        yield
    except Interrupted:
        raise  # the version stays, on probation
    except BaseException as error:
        why = error.what if isinstance(error, AgentError) else type(error).__name__
        state = operation.state or "the beginning"
        _log.error("%s of %s failed after %s: %s", operation.kind, operation.digest[:12], state, why)
        operation.fail(error)
        raise
