"""The journal of one operation on a model: which state it reached, and why it went no further.

``journal.json`` holds the last operation on each model. It never decides what a device serves
(``state.json`` does); it tells a person what happened, and the next start what to clean up.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Callable, Dict, Optional

from device_agent.errors import AgentError, Refused
from device_agent.store import Store

STATES = ("received", "verified", "staged", "prepared", "selftested", "switched", "committed")

_INTERRUPTED = Refused("the operation was interrupted", "the agent or its disk stopped", "run it again")
_log = logging.getLogger(__name__)


@dataclass
class Operation:
    """An operation while it runs.

    Attributes:
        store: where the journal lies.
        kind: ``install``, ``activate`` or ``rollback``.
        name: the model.
        digest: the version that it is about.
        goal: the state that it ends in.
        on_state: told of each state after it is on disk.
        state: the state that was reached; empty at the beginning.
        fresh: whether the version was not installed before; it is removed if the operation fails.
    """

    store: Store
    kind: str
    name: str
    digest: str
    goal: str = "committed"
    on_state: Optional[Callable[[str], None]] = None
    state: str = ""
    fresh: bool = False

    def enter(self, state: str) -> None:
        """Reach a state: first on disk, then in the eyes of the caller.

        Nothing is written before ``verified``: a bundle that nobody vouches for leaves no trace.
        """
        self.state = state
        if state != "received":
            self._write(None)
        if self.on_state is not None:
            self.on_state(state)

    def fail(self, error: BaseException) -> None:
        """Keep the reason, and take back the version if this operation brought it.

        The error that is being handled matters more than one that happens here, which is only logged.
        """
        if self.state in ("", "received"):
            return
        try:
            # In this order, since the journal is what reminds the next start to clean up.
            self.forget()
            self._write(_describe(error))
        except AgentError as second:
            _log.error("%s of %s could not be cleaned up: %s", self.kind, self.digest[:12], second.why)

    def forget(self) -> None:
        """Remove the version if this operation brought it and nothing came to depend on it."""
        state = self.store.state(self.name)
        needed = self.digest in (state.active, state.fallback)
        if self.fresh and not needed and self.store.has(self.name, self.digest):
            self.store.remove(self.name, self.digest)

    def _write(self, failure: Optional[Dict[str, str]]) -> None:
        self.store.set_journal(
            self.name,
            {
                "operation": self.kind,
                "digest": self.digest,
                "goal": self.goal,
                "state": self.state,
                "fresh": self.fresh,
                "failure": failure,
            },
        )


def interrupted(store: Store, name: str) -> Optional[Operation]:
    """The operation on a model that a crash interrupted; None if the last one came to its end."""
    entry = store.journal(name)
    if entry is None or entry.get("failure") is not None or entry.get("state") == entry.get("goal"):
        return None
    return Operation(
        store,
        str(entry.get("operation")),
        name,
        str(entry.get("digest")),
        str(entry.get("goal")),
        state=str(entry.get("state")),
        fresh=entry.get("fresh") is True,
    )


def end_interrupted(store: Store, name: str) -> Optional[Operation]:
    """End an operation that was interrupted before its switch, and take back what it added.

    Returns:
        The operation, if it was interrupted after the switch: whether it holds is for a start to find out.
    """
    operation = interrupted(store, name)
    if operation is None or operation.digest == store.active(name):
        return operation
    operation.fail(_INTERRUPTED)
    return None


def abandon_interrupted(store: Store, name: str) -> None:
    """End an operation that was interrupted, also after its switch, before another one begins.

    While an agent runs, such an operation is one whose traces a failing disk did not let it take back.
    """
    operation = end_interrupted(store, name)
    if operation is None:
        return
    state = store.state(name)
    if state.active not in state.committed:
        store.set_state(name, state.given_up())
    operation.fail(_INTERRUPTED)


def _describe(error: BaseException) -> Dict[str, str]:
    if isinstance(error, AgentError):
        return {"what": error.what, "why": error.why, "fix": error.fix}
    return {
        "what": "the operation ended unexpectedly",
        "why": f"{type(error).__name__}: {error}",
        "fix": "see the log",
    }
