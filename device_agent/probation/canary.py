"""Golden rows through the same queue and engine as live requests: the least evidence that there is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional, Tuple

from device_agent.batching.job import Arrays, Job, TurnedAway
from device_agent.errors import Refused
from device_agent.selftest import compare, load_arrays

if TYPE_CHECKING:
    from device_agent.batching.batcher import Batcher
    from device_agent.loaded import LoadedModel

_BATCH_KEY = "the agent's own"  # no request has it, so these run alone and their time is their own


@dataclass(frozen=True)
class Outcome:
    """How a golden row went.

    Attributes:
        total_s: from its arrival in the queue to its answer.
        run_s: of that, in the engine.
        failure: why there is no answer; empty: there is one.
        wrong: how the answer differs from the golden one; empty: it does not.
    """

    total_s: float = 0.0
    run_s: float = 0.0
    failure: str = ""
    wrong: str = ""


async def compute(batcher: Batcher, inputs: Arrays, rows: int, timeout_s: float) -> Job:
    """Have a version compute inputs on the running loop: alone, after all that clients ask, counted nowhere.

    Returns:
        The job, done; its ``error`` may be set.

    Raises:
        TurnedAway: live requests fill the queue.
        asyncio.TimeoutError: there was no answer in time.
    """
    answered: asyncio.Future[Job] = asyncio.get_running_loop().create_future()

    def on_done(done: Job) -> None:
        if not answered.done():  # it may have been given up
            answered.set_result(done)

    lowest = batcher.settings.batching.priority_levels
    job = Job(inputs, rows, _BATCH_KEY, on_done, priority=lowest, probe=True)
    batcher.submit(job)
    try:
        return await asyncio.wait_for(answered, timeout_s)
    except asyncio.TimeoutError:
        batcher.cancel(job)
        raise


class Canary:
    """Asks a loaded version for its golden rows, one after the other; they count in nobody's metrics."""

    def __init__(self, loaded: LoadedModel, timeout_s: float) -> None:
        """Read the golden files; blocks.

        Args:
            loaded: what is asked.
            timeout_s: a row without an answer by then has failed.

        Raises:
            Refused: they cannot be read.
        """
        manifest = loaded.manifest
        self._loaded = loaded
        self._timeout_s = timeout_s
        self._inputs = load_arrays(loaded.directory / manifest.golden.inputs, manifest.inputs)
        self._outputs = load_arrays(loaded.directory / manifest.golden.outputs, manifest.outputs)
        self._row = 0

    async def ask(self) -> Optional[Outcome]:
        """Ask for the next row on the running loop; None: live requests fill the queue."""
        inputs, golden = self._next()
        try:
            job = await compute(self._loaded.batcher, inputs, 1, self._timeout_s)
        except TurnedAway:
            return None
        except asyncio.TimeoutError:
            return Outcome(failure=f"a golden row had no answer within {self._timeout_s:g} s")
        return await asyncio.get_running_loop().run_in_executor(None, self._judge, job, golden)

    def _next(self) -> Tuple[Arrays, Arrays]:
        if not self._loaded.batchable:
            return self._inputs, self._outputs
        rows = min(len(array) for array in self._inputs.values())
        row, self._row = self._row, (self._row + 1) % rows
        return (
            {name: array[row : row + 1] for name, array in self._inputs.items()},
            {name: array[row : row + 1] for name, array in self._outputs.items()},
        )

    def _judge(self, job: Job, golden: Arrays) -> Outcome:
        """Compare an answer; on another thread, since outputs may be large."""
        if isinstance(job.error, TurnedAway):
            return Outcome(failure="a golden row was not answered in time")
        if job.error is not None or job.outputs is None:
            return Outcome(failure=str(job.error))
        total_s, run_s = job.finished_s - job.arrived_s, job.finished_s - job.started_s
        try:
            compare(job.outputs, golden, self._loaded.manifest)
        except Refused as error:
            return Outcome(total_s, run_s, wrong=error.why)
        return Outcome(total_s, run_s)
