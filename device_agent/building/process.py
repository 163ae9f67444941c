"""One build process, seen from the agent: started, watched, ended."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, Mapping, Optional

from device_agent.errors import Refused
from device_agent.memory import resident_bytes

_POLL_S = 0.2
_MAX_LINE_BYTES = 1024 * 1024

_log = logging.getLogger(__name__)


class BuildFailed(Refused):
    """No engine came of a build.

    Attributes:
        final: whether the same build would fail again.
    """

    def __init__(self, why: str, *, final: bool) -> None:
        super().__init__("no engine was built", why, "see the agent's log; ONNX Runtime serves the model")
        self.final = final


class BuildStopped(Refused):
    """The agent stops, and ended the build."""


@dataclass(frozen=True)
class Limits:
    """What a build may take.

    Attributes:
        seconds: how long.
        free_bytes: what new allocations can have, asked again and again; None: the system does not say. A
            build is ended when nothing is left.
        memory_bytes: the most that its process may hold; None: there is no limit.
    """

    seconds: float
    free_bytes: Callable[[], Optional[int]]
    memory_bytes: Optional[int] = None


def run(
    job: Mapping[str, Any],
    limits: Limits,
    on_progress: Callable[[Mapping[str, Any]], None],
    stop: threading.Event,
) -> Dict[str, Any]:
    """Build in a process of its own, of low priority, and wait for it.

    The kernel ends the process with the thread that calls this.

    Args:
        job: see :mod:`device_agent.building.child`.
        limits: what it may take.
        on_progress: called with each phase.
        stop: set when the agent stops.

    Returns:
        What came of it: ``layers``, ``not_on_dla``, ``constrained``, ``warnings``.

    Raises:
        BuildFailed: TensorRT builds no engine of this, or the process ended, or it took too much.
        BuildStopped: the agent stops.
    """
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "device_agent.building.child", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except OSError as error:
        raise BuildFailed(f"a process cannot be started: {error.strerror}", final=False) from error
    answers: queue.SimpleQueue[Optional[Dict[str, Any]]] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, answers), name="build-reader", daemon=True)
    reader.start()
    try:
        _send(process, job)
        return _wait(process, limits, answers, on_progress, stop)
    finally:
        process.kill()
        process.wait()
        reader.join()


def _send(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> None:
    stream = process.stdin
    if stream is None:
        return
    try:
        stream.write(json.dumps(job).encode())
        stream.close()
    except BrokenPipeError:
        _log.info("the build process ended before it had its job")


def _read(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[Optional[Dict[str, Any]]]) -> None:
    """Pass on the process's lines; None at their end."""
    stream = process.stdout
    if stream is not None:
        with stream:
            for line in iter(lambda: stream.readline(_MAX_LINE_BYTES), b""):
                try:
                    answers.put(dict(json.loads(line)))
                except ValueError:
                    _log.error("the build process wrote a line that is no message")
    answers.put(None)


def _wait(
    process: subprocess.Popen[bytes],
    limits: Limits,
    answers: queue.SimpleQueue[Optional[Dict[str, Any]]],
    on_progress: Callable[[Mapping[str, Any]], None],
    stop: threading.Event,
) -> Dict[str, Any]:
    deadline_s = time.monotonic() + limits.seconds
    while True:
        try:
            answer = answers.get(timeout=_POLL_S)
        except queue.Empty:
            if stop.is_set():
                raise BuildStopped(
                    "the build of an engine was ended", "the agent stops", "it is built at the next start"
                ) from None
            _check(process.pid, limits, deadline_s)
            continue
        if answer is None:
            raise BuildFailed(f"the build process ended: {_how(process)}", final=False)
        if "failed" in answer:
            raise BuildFailed(str(answer["failed"]).splitlines()[0], final=True)
        if "built" in answer:
            return dict(answer["built"])
        on_progress(answer)


def _check(process: int, limits: Limits, deadline_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise BuildFailed(f"it took more than {limits.seconds:g} s (timeouts.build_s)", final=True)
    if limits.free_bytes() == 0:
        raise BuildFailed("it left less memory than limits.memory_reserve_bytes", final=False)
    held_bytes = resident_bytes(process)
    if limits.memory_bytes is not None and held_bytes > limits.memory_bytes:
        raise BuildFailed(
            f"it held {held_bytes / 1e6:.0f} MB, and {limits.memory_bytes / 1e6:.0f} MB were free before it",
            final=False,
        )


def _how(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    if status >= 0:
        return f"exit status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"signal {-status} ({names.get(-status, 'real-time')})"
