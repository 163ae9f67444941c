"""Work that may hang, with an end: a runtime that never opens an engine must not block all updates."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Callable, Optional, TypeVar

from device_agent.errors import Refused

_T = TypeVar("_T")


@dataclass(frozen=True)
class Timeouts:
    """How long the steps of an update may take, in the table ``[timeouts]``.

    Attributes:
        stage_s: copying and checking a bundle.
        build_s: building an engine for this device, while something else serves.
        prepare_s: opening an engine, and its self-test.
        drain_s: a version that was replaced answering what it accepted.
    """

    stage_s: float = 600.0
    build_s: float = 3600.0
    prepare_s: float = 900.0
    drain_s: float = 60.0


class Timeout(Refused):
    """A step of an operation did not come to an end in its time."""


def bounded(
    work: Callable[[], _T], timeout_s: float, what: str, give_back: Optional[Callable[[_T], None]] = None
) -> _T:
    """Do ``work`` on a thread of its own and wait for at most ``timeout_s``.

    Nothing can end a thread from outside. One that is given up goes on until the code that hangs returns, or
    the process ends; it is a daemon and keeps no stopping agent. An isolated engine's process is ended by its
    own timeouts before.

    Args:
        work: what may hang.
        timeout_s: how long to wait for it.
        what: the work, for the error: "the engine did not open".
        give_back: called on that thread with a result that came too late; None: it needs no care.

    Raises:
        Timeout: it took longer.
        BaseException: whatever ``work`` raises.
    """
    result: Future[_T] = Future()
    settled = threading.Lock()
    given_up = False

    def run() -> None:
        try:
            value = work()
        except BaseException as error:  # it belongs to whoever waits
            result.set_exception(error)
            return
        with settled:
            result.set_result(value)
            late = given_up
        if late and give_back is not None:
            give_back(value)

    threading.Thread(target=run, name="bounded", daemon=True).start()
    try:
        return result.result(timeout_s)
    except FutureTimeoutError:
        with settled:
            if result.done():
                return result.result()
            given_up = True
    raise Timeout(
        what,
        f"it took more than {timeout_s:g} s (timeout)",
        "see the log; give it more time under [timeouts]",
    )
