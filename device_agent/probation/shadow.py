"""Before the switch: a new version computes copies of live requests, and nobody waits for its answers.

A share of the requests that the old version answered is computed by the new one too, one at a time and only
in moments in which no model has anything to do; what finds no such moment is dropped. Failures and engine
times decide whether the version may go on to the switch; how far its outputs are from the old version's is
reported. Where clients ask too little, golden rows fill up, as in a probation.
"""

from __future__ import annotations

import asyncio
import threading
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

from device_agent.batching.job import TurnedAway
from device_agent.bounded import Timeout
from device_agent.errors import Refused
from device_agent.manifest import Manifest
from device_agent.metrics import ModelMetrics
from device_agent.probation.agreement import Agreement
from device_agent.probation.canary import Canary, Outcome, compute
from device_agent.probation.mirror import Mirror
from device_agent.probation.settings import ProbationSettings
from device_agent.probation.verdict import CONFIRMING_RUNS, Mirrored, against_mirrored

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel

_LOOK_S = 0.005  # how often a moment is looked for in which no model has anything to do
_GOLDEN_ROWS_TAKE = 2  # timeouts at most: two rows without an answer are enough to tell
_THE_OLD_SERVES = "the previous version serves on; `edgekit-agent status` keeps this reason"


class Shadow:
    """The work of one version on copies of live requests.

    Attributes:
        skipped: why there is none; empty: there is.
        seen_s: for how long it has worked.
        verdict: why the version may not serve; empty: nothing speaks against it.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        counters: ModelMetrics,
        old: Optional[LoadedModel],
        settings: ProbationSettings,
        *,
        timeout_s: float,
        is_idle: Callable[[], bool],
        stop: threading.Event,
        skipped: str = "",
    ) -> None:
        """Prepare; blocks for as long as reading the golden files takes.

        Args:
            loaded: the version, which does not serve yet.
            counters: its metrics.
            old: the version that serves; None only where ``skipped`` says why.
            settings: how many requests, for how long, and what is allowed.
            timeout_s: what has no answer by then has failed.
            is_idle: whether no model has anything to do.
            stop: set when the agent stops.
            skipped: why there is nothing to do here; empty: there is.

        Raises:
            Refused: the golden files cannot be read.
        """
        self.skipped = skipped
        self.seen_s = 0.0
        self.verdict = ""
        self._loaded = loaded
        self._counters = counters
        self._old = old
        self._settings = settings
        self._timeout_s = timeout_s
        self._is_idle = is_idle
        self._stop = stop
        self._mirror = Mirror(settings.shadow_fraction)
        self._canaries = [] if old is None else [Canary(old, timeout_s), Canary(loaded, timeout_s)]
        self._agreement = Agreement(loaded.manifest.outputs, old.manifest.outputs if old is not None else ())
        self._live = self._golden_rows = self._failed = 0
        self._failure = self._wrong = ""
        self._run_s: List[float] = []
        self._pairs_s: List[Tuple[float, float]] = []
        self._restarts_before = counters.engine_restarts

    def __str__(self) -> str:
        if self.skipped:
            return f"no shadow traffic: {self.skipped}"
        settings = self._settings
        return f"shadow traffic: {settings.shadow_fraction:g} of the requests for {settings.duration_s:g} s"

    async def run(self) -> None:
        """Compute requests until the time is over, on the event loop that serves.

        Raises:
            Refused: something speaks against the version, or the agent stops.
            Timeout: golden rows found no place in the version's queue.
        """
        if self._old is None:
            return
        self._old.batcher.show_answers(self._mirror.offer)
        try:
            await self._run()
        finally:
            self._old.batcher.show_answers(None)
            self._mirror.clear()

    async def _run(self) -> None:
        duration_s, started_s = self._settings.duration_s, time.monotonic()
        limit_s = 2 * duration_s + _GOLDEN_ROWS_TAKE * self._timeout_s
        while True:
            self.seen_s = time.monotonic() - started_s
            over = self.seen_s >= duration_s
            worked = await (self._ask_golden_rows() if over else self._compute_next())
            self.verdict = self._judge() or ""
            if self.verdict:
                raise self._refused()
            if over and self._mirrored().requests >= self._settings.min_requests:
                return
            if self._stop.is_set():
                raise self._stopped()
            if self.seen_s > limit_s:
                raise self._late(limit_s)
            if not worked:
                await asyncio.sleep(_LOOK_S)

    def describe(self) -> Dict[str, Any]:
        """A form for JSON."""
        old_run_s = [old_s for old_s, _ in self._pairs_s]
        new_run_s = [new_s for _, new_s in self._pairs_s]
        return {
            "digest": self._loaded.digest,
            "skipped": self.skipped or None,
            "seen_s": round(self.seen_s, 1),
            "duration_s": self._settings.duration_s,
            "requests": self._live,
            "golden_rows": self._golden_rows,
            "dropped": self._mirror.dropped,
            "failed": self._failed,
            "run_ms": _median_ms(new_run_s),
            "old_run_ms": _median_ms(old_run_s),
            "outputs": self._agreement.describe(),
            "verdict": self.verdict or None,
        }

    # Evidence

    async def _compute_next(self) -> bool:
        """Compute a request if one waits and nobody is waiting for anything; whether it did."""
        sample = self._mirror.next() if self._is_idle() else None
        if sample is None:
            return False
        try:
            job = await compute(self._loaded.batcher, sample.inputs, sample.rows, self._timeout_s)
        except TurnedAway:
            self._mirror.dropped += 1
            return False
        except asyncio.TimeoutError:
            self._count_failure(f"no answer within {self._timeout_s:g} s")
        else:
            if isinstance(job.error, TurnedAway):
                self._mirror.dropped += 1
                return False
            if job.error is not None or job.outputs is None:
                self._count_failure(str(job.error))
            else:
                self._count(job.finished_s - job.started_s, sample.run_s)
                loop = asyncio.get_running_loop()  # outputs may be large: they are compared on another thread
                await loop.run_in_executor(None, self._agreement.add, job.outputs, sample.outputs)
        self._live += 1
        return True

    async def _ask_golden_rows(self) -> bool:
        """Ask both versions for golden rows in turn until there is evidence enough; whether there is."""
        least = self._settings.min_requests
        while self._mirrored().requests < least or len(self._pairs_s) < min(CONFIRMING_RUNS, least):
            old, new = [await canary.ask() for canary in self._canaries]
            if new is None or self._stop.is_set():
                return False
            self._count_golden_row(new, old)
            if self._failed >= 2 or new.wrong or old is None or old.failure:
                return False
        return True

    def _count_golden_row(self, new: Outcome, old: Optional[Outcome]) -> None:
        self._golden_rows += 1
        self._wrong = self._wrong or new.wrong
        if new.failure:
            self._count_failure(new.failure)
        else:
            self._count(new.run_s, None if old is None or old.failure else old.run_s)

    def _count(self, run_s: float, old_run_s: Optional[float]) -> None:
        self._run_s.append(run_s)
        if old_run_s is not None:
            self._pairs_s.append((old_run_s, run_s))

    def _count_failure(self, failure: str) -> None:
        self._failed += 1
        self._failure = self._failure or failure

    def _mirrored(self) -> Mirrored:
        return Mirrored(self._failed, self._failure, self._run_s, self._pairs_s, self._wrong, self._crash())

    def _crash(self) -> str:
        engine = self._loaded.engine
        if engine.process and self._counters.engine_restarts == self._restarts_before:
            return ""
        return str(getattr(engine, "last_failure", "")) or "no reason is known"

    def _judge(self) -> Optional[str]:
        return against_mirrored(self._mirrored(), self._loaded.manifest.contract, self._settings)

    # Ends

    def _refused(self) -> Refused:
        return Refused(
            f"{_named(self._loaded.manifest)} failed on copies of live requests and was not switched to",
            self.verdict,
            _THE_OLD_SERVES,
        )

    def _late(self, limit_s: float) -> Timeout:
        return Timeout(
            f"{_named(self._loaded.manifest)} could not show itself on copies of live requests",
            f"its queue took no golden row within {limit_s:g} s (timeout)",
            "the previous version serves on; install it while less is asked of the device",
        )

    def _stopped(self) -> Refused:
        return Refused(
            f"the agent stops before {_named(self._loaded.manifest)} was switched to",
            f"it computed copies of live requests for {self.seen_s:.1f} of {self._settings.duration_s:g} s",
            "install it again once the agent is up",
        )


def why_skipped(loaded: LoadedModel, old: Optional[LoadedModel], *, paused: bool, live: bool) -> str:
    """Why a version cannot compute the requests of the old one; empty: it can.

    Args:
        loaded: the version.
        old: the one that serves; None: there is none.
        paused: whether it was stopped to make room.
        live: whether requests can come.
    """
    if not live:
        return "no requests can come"
    if old is None:
        return "no version serves yet"
    if paused:
        return "memory does not hold both versions"
    new = loaded.manifest
    if sorted(_shapes(new)) != sorted(_shapes(old.manifest)) or loaded.batchable != old.batchable:
        return f"it has other inputs than version {old.version}"
    if new.max_batch_size < old.manifest.max_batch_size:
        return f"it takes smaller batches than version {old.version}"
    return ""


def _shapes(manifest: Manifest) -> List[Tuple[str, str, Tuple[int, ...]]]:
    return [(spec.name, spec.dtype, tuple(spec.shape)) for spec in manifest.inputs]


def _named(manifest: Manifest) -> str:
    return f"{manifest.name} version {manifest.version}"


def _median_ms(seconds: Sequence[float]) -> Optional[float]:
    return round(median(seconds) * 1e3, 4) if seconds else None
