"""One model follows one tag: look, fetch, wait for a maintenance window, install; for months, unattended.

A follower has a thread of its own, since everything it does blocks. Nothing that a registry, a network or a
bundle does ends it: what fails is kept for ``status`` and tried again later. Before a large blob is asked
for, the bundle's signature was checked and the disk has room. The registry is trusted with nothing.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional

from device_agent import archive, durable
from device_agent.errors import AgentError, BadInput, TrustError
from device_agent.follow import backoff, record, windows
from device_agent.follow.credential_files import credentials
from device_agent.follow.local import files_here, standing
from device_agent.follow.report import describe
from device_agent.follow.settings import Follow
from device_agent.metrics import FollowMetrics
from device_agent.oci import reference
from device_agent.oci.assembly import Assembly, fetch_head
from device_agent.oci.client import Repository
from device_agent.oci.errors import RegistryError
from device_agent.oci.transport import Security, Transport

if TYPE_CHECKING:
    from device_agent.lifecycle import Lifecycle

_WINDOW_LOOK_S = 600.0  # the clock may be set while a follower waits for a window
_chance = random.SystemRandom().random
_log = logging.getLogger(__name__)


class _Fetched(NamedTuple):
    """A bundle that is on this device, whole, and not installed."""

    artifact: str
    head: archive.Head
    directory: Path


class Follower:
    """Follows the tag of one model until it is stopped."""

    def __init__(
        self, name: str, follow: Follow, state_dir: Path, lifecycle: Lifecycle, metrics: FollowMetrics
    ) -> None:
        self.name = name
        self._follow = follow
        self._reference = reference.parse(follow.reference)
        self._windows = [window for window in map(windows.parse, follow.windows) if window is not None]
        self._state_dir = state_dir
        self._work = work_directory(state_dir, name)
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._record = record.read(state_dir, name, follow.reference)
        self._fetched: Optional[_Fetched] = None
        self._phase = "starting"
        self._failures = 0
        self._last_error: Optional[Dict[str, Any]] = None
        self._last_success_s = metrics.last_success_s = self._record.last_success_s
        self._transport: Optional[Transport] = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"follow-{name}", daemon=True)

    def start(self) -> None:
        """Begin to look, after a moment."""
        self._thread.start()

    def stop(self) -> None:
        """Break off a transfer and look no more; an installation that runs is finished."""
        self._stopping.set()
        transport = self._transport
        if transport is not None:
            transport.close()

    def join(self, timeout_s: float) -> None:
        """Wait until it has stopped; a name server that does not answer is not waited for."""
        self._thread.join(timeout_s)

    def describe(self) -> Dict[str, Any]:
        """What ``status`` shows of it."""
        return describe(self._record, self._phase, self._last_success_s, self._failures, self._last_error)

    def turn(self) -> float:
        """Look once and do what there is to do.

        Returns:
            Seconds to wait before the next turn.
        """
        try:
            wait_s = self._look()
        except (AgentError, OSError) as error:
            return self._failed(error)
        except Exception as error:  # whatever it was, there must be a next time
            _log.exception("%s: following %s failed unexpectedly", self.name, self._reference)
            return self._failed(error)
        self._failures, self._last_error = 0, None
        return wait_s

    def _run(self) -> None:
        wait_s = backoff.first_look_s(self._follow.interval_s, _chance())
        while not self._stopping.wait(wait_s):
            wait_s = self.turn()

    # One turn

    def _look(self) -> float:
        repository = self._open()
        artifact = repository.resolve(self._reference)
        self._registry_answered()
        self._metrics.up_to_date = self._record.settled(artifact) and self._record.outcome == "installed"
        if self._record.settled(artifact):
            self._phase = self._record.outcome
            self._forget_work()  # power may have gone before it was deleted
            return self._next_look_s()
        if self._fetched is None or self._fetched.artifact != artifact:
            self._fetched = self._fetch(repository, artifact)
        if self._fetched is not None:
            closed_s = self._closed_s()
            if closed_s:
                self._phase = "waiting for a maintenance window"
                return min(closed_s, self._next_look_s(), _WINDOW_LOOK_S)
            self._install(self._fetched)
        return self._next_look_s()

    def _open(self) -> Repository:
        follow = self._follow
        self._transport = Transport(Security(follow.ca_file, follow.plain_http))
        if self._stopping.is_set():
            self._transport.close()
        return Repository(self._reference, self._transport, credentials(follow))

    def _fetch(self, repository: Repository, artifact: str) -> Optional[_Fetched]:
        """Bring the bundle here; None if it serves already."""
        head = fetch_head(repository, artifact)
        if head.manifest.name != self.name:
            raise BadInput(
                f"{self._reference} holds another model",
                f"it is {head.manifest.name!r}, and [follow.{self.name}] takes {self.name!r} only",
                "push the right bundle to this tag, or correct the table's name",
            )
        found = standing(self._lifecycle, head)
        if found.on_trial:
            self._phase = "on probation"
            return None
        if found.proven:
            self._settle(artifact, head.digest, "installed")
            return None
        if found.failure and self._record.tries_of(artifact):  # it failed after the agent had restarted
            self._settle(artifact, head.digest, "refused", found.failure)
            return None
        assembly = Assembly(self._work, head, files_here(self._lifecycle))
        missing_bytes = assembly.missing_bytes()
        self._lifecycle.preflight(head, missing_bytes)
        self._phase = "downloading"
        _log.info("%s: %s is now %s; fetching %d bytes", self.name, self._reference, artifact, missing_bytes)
        return _Fetched(artifact, head, assembly.complete(repository, self._count))

    def _install(self, fetched: _Fetched) -> None:
        artifact, bundle = fetched.artifact, fetched.head.digest
        tries = self._record.tries_of(artifact)
        if tries >= record.MAX_TRIES:
            why = f"the agent ended {tries} times while it was installed"
            return self._settle(artifact, bundle, "refused", why)
        self._phase = "installing"
        self._remember(artifact=artifact, bundle=bundle, outcome="", why="", tries=tries + 1)
        states: List[str] = []
        try:
            self._lifecycle.install(fetched.directory, on_state=states.append)
        except Exception as error:
            if self._stopping.is_set() and "switched" in states:
                raise  # the next start says what becomes of it
            if self._stopping.is_set() or _may_pass(error, states):
                self._remember(tries=tries)
                if isinstance(error, TrustError):
                    self._forget_work()  # what lies there is not what was checked before
                raise
            what = f"{error.what}: {error.why}" if isinstance(error, AgentError) else repr(error)
            _log.error("%s: %s is refused until the tag moves: %s", self.name, artifact, what)
            return self._settle(artifact, bundle, "refused", what)
        self._settle(artifact, bundle, "installed")

    def _settle(self, artifact: str, bundle: str, outcome: str, why: str = "") -> None:
        self._remember(artifact=artifact, bundle=bundle, outcome=outcome, why=why, tries=0)
        self._phase = outcome
        self._metrics.up_to_date = outcome == "installed"
        self._forget_work()

    def _forget_work(self) -> None:
        self._fetched = None
        durable.empty(self._work)

    def _closed_s(self) -> int:
        now = time.gmtime() if self._follow.windows_utc else time.localtime()
        return windows.wait_s(self._windows, now.tm_hour * 3600 + now.tm_min * 60 + min(now.tm_sec, 59))

    def _next_look_s(self) -> float:
        return backoff.next_look_s(self._follow.interval_s, _chance())

    # What is remembered

    def _count(self, received_bytes: int) -> None:
        self._metrics.downloaded_bytes += received_bytes
        self._failures = 0  # a line that brings something is worth an early next try

    def _registry_answered(self) -> None:
        self._last_success_s = self._metrics.last_success_s = time.time()
        if abs(self._last_success_s - self._record.last_success_s) > record.SUCCESS_KEPT_EVERY_S:
            self._remember(changed=False)

    def _remember(self, changed: bool = True, **changes: Any) -> None:
        now_s = time.time()
        updated = replace(self._record, last_success_s=self._last_success_s, **changes)
        if changed:
            updated = replace(updated, changed_s=now_s)
        record.write(self._state_dir, self.name, updated)
        self._record = updated

    def _failed(self, error: Exception) -> float:
        self._failures += 1
        self._metrics.failures += 1
        self._phase = "failing"
        self._last_error = _explain(error)
        if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th, ...: months must not fill a log
            _log.warning(
                "%s: following %s failed %d times in a row: %s: %s",
                self.name,
                self._reference,
                self._failures,
                self._last_error["what"],
                self._last_error["why"],
            )
        asked_s = error.retry_after_s if isinstance(error, RegistryError) else 0.0
        return backoff.after_failures_s(self._failures, _chance(), asked_s)


def work_directory(state_dir: Path, name: str) -> Path:
    """Where a follower's downloads lie until they are installed."""
    return state_dir / "incoming" / "follow" / name


def _may_pass(error: Exception, states: List[str]) -> bool:
    """Whether an installation failed for another reason than the bundle: trust, space, disk, a stop."""
    return isinstance(error, AgentError) and ("staged" not in states or isinstance(error.__cause__, OSError))


def _explain(error: Exception) -> Dict[str, Any]:
    now_s = time.time()
    if isinstance(error, AgentError):
        return {"what": error.what, "why": error.why, "fix": error.fix, "at_s": now_s}
    why = f"{type(error).__name__}: {error}"
    return {"what": "the follower failed", "why": why, "fix": "see the agent's log", "at_s": now_s}
