"""One engine process, seen from the agent: started, asked, ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import asdict
from typing import Any, Dict, FrozenSet, Mapping, Sequence, Tuple

import numpy as np

from device_agent.affinity import threads_of
from device_agent.engines import process_messages as messages
from device_agent.engines.base import Arrays, EngineError, EngineSettings, EngineUnavailable, InputError
from device_agent.engines.process_memory import SharedMemory, read_tensors, write_tensors
from device_agent.engines.source import EngineSource
from device_agent.errors import AgentError, Missing, Refused
from device_agent.manifest import TensorSpec

_OPEN_TIMEOUT_S = 300.0  # a graph of gigabytes on a slow card
_CLOSE_TIMEOUT_S = 2.0
_EXIT_TIMEOUT_S = 5.0  # from a closed channel to an exit status


class EngineProcess:
    """A process that runs one engine; itself an :class:`~device_agent.engines.base.Engine` once open.

    The kernel ends it when the thread that made this object ends (PR_SET_PDEATHSIG): that thread must stay.

    Attributes:
        process: its process id.
        runtime, inputs, outputs: as an engine's; set by :meth:`open`.
        memory_policy: what the kernel says of its memory, such as ``bind 0``; empty where none was asked for.
    """

    runtime = ""
    inputs: Tuple[TensorSpec, ...] = ()
    outputs: Tuple[TensorSpec, ...] = ()
    memory_policy = ""

    def __init__(self) -> None:
        """Start the process.

        Raises:
            Refused: the system gives no process, descriptors or memory.
        """
        self._running = threading.Lock()
        self._closed = False
        try:
            with ExitStack() as undo:
                self._popen = self._start(undo)
                undo.pop_all()
        except OSError as error:
            raise Refused(
                "an engine process cannot be started",
                error.strerror or str(error),
                "free memory or raise the service's limits, or set isolate = false for this model",
            ) from error
        self.process = self._popen.pid

    def _start(self, undo: ExitStack) -> subprocess.Popen[bytes]:
        self._request = SharedMemory.create("edgekit-request")
        undo.callback(self._request.close)
        self._answer = SharedMemory.create("edgekit-answer")
        undo.callback(self._answer.close)
        self._channel, theirs = socket.socketpair()
        undo.callback(self._channel.close)
        inherited = (theirs.fileno(), self._request.descriptor, self._answer.descriptor)
        numbers = map(str, (*inherited, os.getpid()))
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "device_agent.engines.worker", *numbers],
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                # The agent may be where Python does not search by itself.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def open(self, source: EngineSource, settings: EngineSettings) -> None:
        """Load the engine in the process.

        Raises:
            Missing, Refused: as the runtime's ``open_graph``; or the process ended meanwhile.
        """
        document = {"source": source.to_json(), "settings": asdict(settings)}
        self._channel.settimeout(_OPEN_TIMEOUT_S)
        try:
            messages.send_json(self._channel, messages.OPEN, document)
            kind, body = messages.receive(self._channel)
        except (messages.ConnectionLost, OSError) as error:
            self.kill()
            late = isinstance(error, socket.timeout)
            raise Refused(
                f"the engine process does not load {os.path.basename(source.path)}",
                f"it took more than {_OPEN_TIMEOUT_S:g} s" if late else f"it ended: {self._how_it_ended()}",
                "see the agent's log; a model that crashes its runtime must be built again",
            ) from error
        answer = json.loads(body)
        if kind != messages.READY:
            raise _refusal(answer)
        self.runtime, self.memory_policy = answer["runtime"], answer["memory_policy"]
        self.inputs, self.outputs = _specs(answer["inputs"]), _specs(answer["outputs"])
        self._channel.settimeout(settings.run_timeout_s)

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`.

        Raises:
            EngineUnavailable: the process ended, or took too long and was ended.
        """
        with self._running:
            if self._closed:
                raise EngineUnavailable(f"the engine process ended: {self._how_it_ended()}")
            kind, body = self._exchange(write_tensors(self._request, self.inputs, inputs))
            if kind == messages.DONE:
                # The next run overwrites them, and may come before these are on their way.
                outputs = read_tensors(self._answer, self.outputs, body)
                return {name: array.copy() for name, array in outputs.items()}
        text = body.decode(errors="replace")
        raise InputError(text) if kind == messages.BAD_INPUT else EngineError(text)

    def _exchange(self, header: bytes) -> Tuple[int, bytes]:
        try:
            messages.send(self._channel, messages.RUN, header)
            return messages.receive(self._channel)
        except socket.timeout as error:
            self.kill()
            limit_s = self._channel.gettimeout()
            raise EngineUnavailable(
                f"the engine process did not answer within {limit_s:g} s and was ended"
            ) from error
        except (messages.ConnectionLost, OSError) as error:
            self.kill()
            raise EngineUnavailable(f"the engine process ended: {self._how_it_ended()}") from error

    def wait(self) -> str:
        """Wait until the process has ended, and say how."""
        self._popen.wait()
        return self._how_it_ended()

    @property
    def threads(self) -> FrozenSet[int]:
        """The threads of the process; none once it has ended."""
        return frozenset(threads_of(self.process))

    def kill(self) -> None:
        """End the process now."""
        with suppress(ProcessLookupError):  # another thread has just waited for it; Python 3.8 does not look
            self._popen.kill()

    def close(self) -> None:
        """Let the process end by itself, or end it, and free what is shared with it. No run may follow."""
        with suppress(OSError):  # it is gone already
            self._channel.shutdown(socket.SHUT_RDWR)
        try:
            self._popen.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._popen.wait()
        with self._running:
            if not self._closed:
                self._closed = True
                self._channel.close()
                self._request.close()
                self._answer.close()

    def _how_it_ended(self) -> str:
        try:
            status = self._popen.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its channel"
        if status >= 0:
            return f"exit status {status}"
        names = {number.value: number.name for number in signal.Signals}
        return f"signal {-status} ({names.get(-status, 'real-time')})"


def _specs(documents: Sequence[Mapping[str, Any]]) -> Tuple[TensorSpec, ...]:
    return tuple(TensorSpec(d["name"], d["dtype"], tuple(d["shape"])) for d in documents)


def _refusal(answer: Mapping[str, Any]) -> AgentError:
    kind = Missing if answer["missing"] else Refused
    return kind(answer["what"], answer["why"], answer["fix"])
