"""Batches on the engine: put together, run, taken apart; on a thread of their own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from queue import SimpleQueue
from typing import Any, Callable, Dict, List, Optional, Protocol

import numpy as np

from device_agent.affinity import ANYWHERE, Placement, place_thread
from device_agent.batching.job import Arrays, Job
from device_agent.engines.base import Engine, EngineError, EngineUnavailable
from device_agent.errors import Refused

_log = logging.getLogger(__name__)


class Runner(Protocol):
    """What runs a batch: an engine."""

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""


class TimedRunner:
    """An engine whose run can be seen, from another thread, to take too long."""

    def __init__(self, engine: Runner) -> None:
        self._engine = engine
        self._started_s: Optional[float] = None

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""
        self._started_s = time.monotonic()
        try:
            return self._engine.run(inputs)
        finally:
            self._started_s = None

    @property
    def running_s(self) -> float:
        """How long the run that is under way has taken until now; 0: none is."""
        started_s = self._started_s
        return 0.0 if started_s is None else time.monotonic() - started_s


class EngineThread:
    """Runs batches in order and hands them back to the loop."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        on_finished: Callable[[List[Job]], None],
        placement: Placement = ANYWHERE,
    ) -> None:
        self._engine = TimedRunner(engine)
        self._loop = loop
        self._on_finished = on_finished
        self._placement = placement
        self._batches: SimpleQueue[Optional[List[Job]]] = SimpleQueue()
        # A daemon: an engine that hangs must not keep a stopping agent from ending.
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def run(self, batch: List[Job]) -> None:
        """Run a batch when those before it are done."""
        self._batches.put(batch)

    def stop(self) -> None:
        """End the thread after the batches that it was given."""
        self._batches.put(None)

    @property
    def native_id(self) -> int:
        """The thread's id in the system."""
        return self._thread.native_id or 0

    @property
    def running_s(self) -> float:
        """How long the engine's run that is under way has taken until now; 0: none is."""
        return self._engine.running_s

    def _serve(self) -> None:
        try:
            place_thread(self._placement)
        except Refused as error:  # it could when the model was loaded; slower beats not at all
            _log.error("the engine's thread runs anywhere: %s: %s", error.what, error.why)
        while True:
            batch = self._batches.get()
            if batch is None:
                return
            execute(self._engine, batch)
            try:
                self._loop.call_soon_threadsafe(self._on_finished, batch)
            except RuntimeError:
                return  # the loop has ended without waiting for this batch: nobody is left to tell
            del batch  # the next may be long in coming, and a client's shared memory is held by its requests


def execute(engine: Runner, batch: List[Job]) -> None:
    """Run a batch and set ``outputs`` or ``error`` of every job.

    A failing batch is halved until the request that fails stands alone, so the others are still answered;
    but not where the engine itself is gone.
    """
    started_s = time.monotonic()
    try:
        outputs = engine.run(batch[0].inputs if len(batch) == 1 else _merge(batch))
        _share(outputs, batch)
    except EngineError as error:
        _isolate(engine, batch, error, started_s)
    except Exception as error:
        # The thread must outlive whatever a runtime raises; the cause is logged and told to the client.
        _log.exception("the engine raised an error of an unexpected type")
        _isolate(engine, batch, EngineError(f"{type(error).__name__}: {error}"), started_s)
    else:
        _stamp(batch, started_s)


def _isolate(engine: Runner, batch: List[Job], error: EngineError, started_s: float) -> None:
    if len(batch) == 1 or isinstance(error, EngineUnavailable):
        error.__traceback__ = None  # its frames know the batch, which would hold on to itself
        for job in batch:
            job.error = error
        _stamp(batch, started_s)
        return
    half = len(batch) // 2
    execute(engine, batch[:half])
    execute(engine, batch[half:])


def _merge(batch: List[Job]) -> Arrays:
    return {name: np.concatenate([job.inputs[name] for job in batch]) for name in batch[0].inputs}


def _share(outputs: Arrays, batch: List[Job]) -> None:
    if len(batch) == 1:
        batch[0].outputs = outputs
        return
    total = sum(job.rows for job in batch)
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != total:
            raise EngineError(f"output '{name}' has no batch axis: {list(array.shape)} for {total} rows")
    start = 0
    for job in batch:
        stop = start + job.rows
        job.outputs = {name: array[start:stop] for name, array in outputs.items()}
        start = stop


def _stamp(batch: List[Job], started_s: float) -> None:
    finished_s = time.monotonic()
    rows = sum(job.rows for job in batch)
    for job in batch:
        job.started_s, job.finished_s, job.batch_rows = started_s, finished_s, rows
