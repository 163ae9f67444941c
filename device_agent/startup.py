"""What an agent serves when it starts: the active version, or the fallback where that does not come up.

A version that ends the whole process while it loads (a crash in native code, too little memory) never
reports an error. Starts are therefore counted before they are tried. A version that was committed before is
passed over after ``MAX_STARTS`` in a row that did not come to an end: the fallback gets this start, and the
active version its next chance after it. A version that is still on probation is given up for good after
``journal.MAX_ATTEMPTS``: one power cut costs a good update nothing, and no reboot leaves a device on a
version that has not proven itself.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, Optional

from device_agent import journal
from device_agent.errors import AgentError, Refused
from device_agent.journal import MAX_ATTEMPTS, Operation
from device_agent.model_state import ModelState
from device_agent.store import Store

MAX_STARTS = 3

#: Checks a version (name, digest) and serves it.
Load = Callable[[str, str], None]
_log = logging.getLogger(__name__)


def restore(store: Store, load: Load) -> Dict[str, Operation]:
    """Serve every model of the store; one that cannot be served at all is logged and left out.

    Returns:
        The operations whose version serves and is on probation, by model.
    """
    on_probation: Dict[str, Operation] = {}
    for name in store.names():
        unfinished = journal.end_interrupted(store, name)
        state = store.state(name)
        if state.active is None:
            continue
        if state.active in state.committed:
            _restore(store, load, name, state.active, unfinished)
            continue
        operation = unfinished or Operation(store, "activate", name, state.active, state="switched")
        if _restore_unproven(store, load, state, operation):
            on_probation[name] = operation
    return on_probation


def _restore(store: Store, load: Load, name: str, active: str, unfinished: Optional[Operation]) -> None:
    state = store.state(name)
    failure = _try_active(store, load, name, active, can_skip=state.fallback is not None)
    if failure is None:
        if unfinished is not None:
            with recording(name):
                unfinished.enter(unfinished.goal)
                store.collect(name)
    elif state.fallback is not None and _try(load, name, state.fallback) is None:
        _log.warning("%s: the fallback %s serves", name, state.fallback[:12])
        if unfinished is not None:
            with recording(name):
                unfinished.fail(failure)
    else:
        _log.error("%s is not served", name)


def _restore_unproven(store: Store, load: Load, state: ModelState, operation: Operation) -> bool:
    """Serve a version that was switched to and not committed; return whether it serves, on probation."""
    name = operation.name
    failure = _try_unproven(load, operation)
    if failure is None:
        return True
    if state.fallback is None or _try(load, name, state.fallback) is None:
        _log.warning(
            "%s: %s is given up, %s serves", name, operation.digest[:12], state.fallback or "nothing"
        )
        with recording(name):
            store.set_state(name, state.given_up())
            operation.fail(failure)
    else:
        _log.error("%s is not served", name)
    return False


def _try_unproven(load: Load, operation: Operation) -> Optional[Exception]:
    if operation.attempts >= MAX_ATTEMPTS:
        return Refused(
            "it was rolled back after it did not come through its probation",
            f"the agent or the device ended {operation.attempts} times during it",
            "see the log of those starts; install it again once the cause is known",
        )
    with recording(operation.name):
        operation.begin_attempt()
    return _try(load, operation.name, operation.digest)


def _try_active(store: Store, load: Load, name: str, digest: str, can_skip: bool) -> Optional[Exception]:
    """Load the active version unless it keeps ending the process; return why it does not serve."""
    starts = store.starts(name, digest)
    if can_skip and starts >= MAX_STARTS:
        with recording(name):
            store.set_starts(name, digest, 0)
        _log.error("%s: %s ended the agent %d times in a row", name, digest[:12], starts)
        return Refused(
            "it does not come up", f"{starts} starts in a row did not come to an end", "see the log"
        )
    with recording(name):
        store.set_starts(name, digest, starts + 1)
    failure = _try(load, name, digest)
    with recording(name):
        store.set_starts(name, digest, 0)
    return failure


def _try(load: Load, name: str, digest: str) -> Optional[Exception]:
    try:
        load(name, digest)
    except AgentError as error:
        _log.error("%s: %s does not come up: %s: %s", name, digest[:12], error.what, error.why)
        return error
    except Exception as error:  # whatever an engine raised, another version may still serve
        _log.exception("%s: %s does not come up", name, digest[:12])
        return error
    return None


@contextmanager
def recording(name: str) -> Iterator[None]:
    """A disk that cannot be written keeps nobody from serving."""
    try:
        yield
    except Refused as error:
        _log.error("%s: %s: %s", name, error.what, error.why)
