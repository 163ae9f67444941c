"""The journal of the operations on a model: which state each reached, and why it went no further.

``journal.json`` holds the last operation on each model, and how those before it ended. It never decides what
a device serves (``state.json`` does); it tells a person what happened, and the next start what to clean up
and which version is on probation.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional

from device_agent.errors import AgentError, Refused
from device_agent.store import Store

STATES = ("received", "verified", "staged", "prepared", "selftested", "switched", "probation", "committed")

#: Starts that a version on probation may use up; each that did not end in an orderly way counts.
MAX_ATTEMPTS = 2

#: Operations whose end is kept, a few kilobytes.
HISTORY = 20
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
        attempts: probations that were begun and of which no end is known.
        seen_s: for how long it was on probation in starts that ended in an orderly way.
        shadow: how it did on copies of live requests before the switch; None: there were none.
    """

    store: Store
    kind: str
    name: str
    digest: str
    goal: str = "committed"
    on_state: Optional[Callable[[str], None]] = None
    state: str = ""
    fresh: bool = False
    attempts: int = 0
    seen_s: float = 0.0
    shadow: Optional[Dict[str, Any]] = None

    def begin_attempt(self) -> None:
        """Enter the probation; counted first, since the version may end the process."""
        self.attempts += 1
        self.enter("probation")

    def interrupt(self, seen_s: float) -> None:
        """Leave the probation to the next start, which goes on from ``seen_s``; nothing is counted."""
        self.attempts -= 1
        self.seen_s = seen_s
        self._write(None)

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
        ended = failure is not None or self.state == self.goal
        self.store.set_journal(
            self.name,
            {
                "operation": self.kind,
                "digest": self.digest,
                "goal": self.goal,
                "state": self.state,
                "fresh": self.fresh,
                "attempts": self.attempts,
                "seen_s": self.seen_s,
                "shadow": self.shadow,
                "failure": failure,
                "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) if ended else None,
                "history": self._history(),
            },
        )

    def _history(self) -> List[Mapping[str, Any]]:
        """The operations that ended before this one, oldest first."""
        before = self.store.journal(self.name)
        if before is None:
            return []
        known = past(before)
        return [*known, last(before)][-HISTORY:] if has_ended(before) else known


def has_ended(entry: Mapping[str, Any]) -> bool:
    """Whether the operation of a journal came to its end, whichever that was."""
    return entry.get("failure") is not None or entry.get("state") == entry.get("goal")


def last(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """The last operation of a journal, without those before it."""
    return {key: value for key, value in entry.items() if key != "history"}


def past(entry: Mapping[str, Any]) -> List[Mapping[str, Any]]:
    """The operations of a journal that ended before the last one, oldest first."""
    known = entry.get("history")
    return [item for item in known if isinstance(item, dict)] if isinstance(known, list) else []


def interrupted(store: Store, name: str) -> Optional[Operation]:
    """The operation on a model that a crash interrupted; None if the last one came to its end."""
    entry = store.journal(name)
    if entry is None or has_ended(entry):
        return None
    shadow = entry.get("shadow")
    return Operation(
        store,
        str(entry.get("operation")),
        name,
        str(entry.get("digest")),
        str(entry.get("goal")),
        state=str(entry.get("state")),
        fresh=entry.get("fresh") is True,
        attempts=_number(entry, "attempts", int),
        seen_s=_number(entry, "seen_s", float),
        shadow=shadow if isinstance(shadow, dict) else None,
    )


def _number(entry: Mapping[str, Any], key: str, kind: Callable[[Any], Any]) -> Any:
    value = entry.get(key)
    return kind(value) if isinstance(value, (int, float)) else kind(0)


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
