"""What an agent serves when it starts: the active version, or the fallback where that does not come up.

A version that ends the whole process while it loads (a crash in native code, too little memory) never
reports an error. Starts are therefore counted before they are tried: after ``MAX_STARTS`` in a row that did
not come to an end, the fallback gets this start, and the active version its next chance after it.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Callable, Iterator, Optional

from device_agent import journal
from device_agent.errors import AgentError, Refused
from device_agent.journal import Operation
from device_agent.model_state import ModelState
from device_agent.store import Store

MAX_STARTS = 3

#: Checks a version (name, digest) and serves it.
Load = Callable[[str, str], None]
_log = logging.getLogger(__name__)


def restore(store: Store, load: Load) -> None:
    """Serve every model of the store; one that cannot be served at all is logged and left out."""
    for name in store.names():
        unfinished = journal.end_interrupted(store, name)
        active = store.active(name)
        if active is not None:
            _restore(store, load, name, active, unfinished)


def _restore(store: Store, load: Load, name: str, active: str, unfinished: Optional[Operation]) -> None:
    state = store.state(name)
    failure = _try_active(store, load, name, active, can_skip=state.fallback is not None)
    if failure is None:
        with _recording(name):
            _confirm(store, name, state, unfinished)
    elif state.fallback is not None and _try(load, name, state.fallback) is None:
        _log.warning("%s: the fallback %s serves", name, state.fallback[:12])
        with _recording(name):
            _give_up(store, name, state, unfinished, failure)
    else:
        _log.error("%s is not served", name)


def _try_active(store: Store, load: Load, name: str, digest: str, can_skip: bool) -> Optional[Exception]:
    """Load the active version unless it keeps ending the process; return why it does not serve."""
    starts = store.starts(name, digest)
    if can_skip and starts >= MAX_STARTS:
        with _recording(name):
            store.set_starts(name, digest, 0)
        _log.error("%s: %s ended the agent %d times in a row", name, digest[:12], starts)
        return Refused(
            "it does not come up", f"{starts} starts in a row did not come to an end", "see the log"
        )
    with _recording(name):
        store.set_starts(name, digest, starts + 1)
    failure = _try(load, name, digest)
    with _recording(name):
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


def _confirm(store: Store, name: str, state: ModelState, unfinished: Optional[Operation]) -> None:
    """Commit a version that came up and had not been committed before the agent stopped."""
    if state != state.with_commit():
        store.set_state(name, state.with_commit())
    if unfinished is not None:
        unfinished.enter(unfinished.goal)
        store.collect(name)


def _give_up(
    store: Store, name: str, state: ModelState, unfinished: Optional[Operation], failure: Exception
) -> None:
    """Return for good from a version that has never proven itself; a proven one gets its next chance."""
    if state.active not in state.committed:
        store.set_state(name, state.given_up())
    if unfinished is not None:
        unfinished.fail(failure)


@contextmanager
def _recording(name: str) -> Iterator[None]:
    """A disk that cannot be written keeps nobody from serving."""
    try:
        yield
    except Refused as error:
        _log.error("%s: %s: %s", name, error.what, error.why)
