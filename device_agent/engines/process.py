"""An engine in a process of its own, which is started again when it crashes or hangs.

Worth its price, some tens of microseconds and two copies of the tensors a run, where a runtime may crash (a
driver, a plugin, custom operators) or where unloading must give all memory back.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import Any, Callable, Dict, FrozenSet, Optional, Tuple

import numpy as np

from device_agent.engines.base import Arrays, Engine, EngineError, EngineSettings, EngineUnavailable
from device_agent.engines.process_child import EngineProcess
from device_agent.engines.source import EngineSource
from device_agent.errors import AgentError, Refused

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0
_PROVEN_S = 60.0  # a process that served this long starts again without a longer pause

_log = logging.getLogger(__name__)


class ProcessEngine:
    """An :class:`~device_agent.engines.base.Engine` that outlives the process it runs in.

    Attributes:
        restarts: how often the process was started again.
        on_restart: called then, on the supervisor's thread.
        last_failure: why it ended the last time; empty: it never did.
        memory_policy: as :attr:`EngineProcess.memory_policy`.
    """

    def __init__(self, source: EngineSource, settings: EngineSettings) -> None:
        """Start the process and load the engine.

        Raises:
            Missing, Refused: as ``EngineProcess``.
        """
        self.restarts = 0
        self.on_restart: Callable[[], None] = _ignore
        self.last_failure = ""
        self._source = source
        self._settings = settings
        self._accept: Optional[Callable[[Engine], Any]] = None
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the next line
        self._starting: Optional[EngineProcess] = None
        self._serving: Optional[EngineProcess] = None
        first: Future[EngineProcess] = Future()
        self._supervisor = threading.Thread(
            target=self._supervise, args=(first,), name="engine-supervisor", daemon=True
        )
        self._supervisor.start()
        opened = first.result()
        self.runtime, self.memory_policy = opened.runtime, opened.memory_policy
        self.inputs, self.outputs = opened.inputs, opened.outputs

    @property
    def process(self) -> int:
        """The id of the process; 0 while there is none."""
        serving = self._serving
        return 0 if serving is None else serving.process

    @property
    def threads(self) -> FrozenSet[int]:
        """The threads of the process."""
        serving = self._serving
        return frozenset() if serving is None else serving.threads

    @property
    def why_down(self) -> str:
        """Why nothing runs at the moment; empty: a process serves."""
        return self._why_down() if self._serving is None else ""

    def _why_down(self) -> str:
        return f"its process is being started again after: {self.last_failure}"

    def keep_up(self, accept: Callable[[Engine], Any]) -> None:
        """Start the process again from now on whenever it ends.

        Args:
            accept: checks a process before it serves; raises what ``selftest.check`` does.
        """
        self._accept = accept

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""
        serving = self._serving
        if serving is None:
            raise EngineUnavailable(self._why_down())
        return serving.run(inputs)

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        self._closing.set()
        with self._lock:
            starting = self._starting
        if starting is not None:
            starting.kill()
        serving = self._serving
        if serving is not None:
            serving.close()
        self._supervisor.join()

    # The supervisor's thread. The kernel ends a process with the thread that started it, so it stays.

    def _supervise(self, first: Future[EngineProcess]) -> None:
        try:
            opened = self._start()
        except BaseException as error:  # whoever waits for the first process must hear of it
            first.set_exception(error)
            return
        first.set_result(opened)
        process: Optional[EngineProcess] = opened
        pause_s = 0.0
        while process is not None:
            started_s = time.monotonic()
            self.last_failure = process.wait()
            self._serving = None
            process.close()
            if self._closing.is_set() or self._accept is None:
                return
            _log.error("the engine process of %s ended: %s", self._source.path, self.last_failure)
            proven = time.monotonic() - started_s > _PROVEN_S
            process, pause_s = self._start_again(0.0 if proven else pause_s)

    def _start_again(self, pause_s: float) -> Tuple[Optional[EngineProcess], float]:
        """Try until a process serves, ever more rarely; None: the engine is closed."""
        while True:
            pause_s = min(max(2 * pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
            if self._closing.wait(pause_s):
                return None, pause_s
            try:
                process = self._start()
            except (AgentError, EngineError) as error:
                if not self._closing.is_set():
                    _log.error("the engine process of %s does not start: %s", self._source.path, error)
            else:
                self.restarts += 1
                self.on_restart()
                _log.warning("the engine process of %s serves again", self._source.path)
                return process, pause_s

    def _start(self) -> EngineProcess:
        """Start a process and let it serve once it is accepted."""
        process = EngineProcess()
        with self._lock:
            self._starting = process
        try:
            if self._closing.is_set():
                raise Refused("the engine process is not started", "the engine is closed", "load it again")
            process.open(self._source, self._settings)
            if self._accept is not None:
                self._accept(process)
        except BaseException:
            process.kill()
            process.close()
            raise
        finally:
            with self._lock:
                self._starting = None
        self._serving = process
        return process


def _ignore() -> None:
    """Nobody counts."""
