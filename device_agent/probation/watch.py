"""A version on probation: collects the evidence, and ends when it is proven, unhealthy or interrupted."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from device_agent.bounded import Timeout
from device_agent.errors import Refused
from device_agent.memory import resident_bytes
from device_agent.metrics import ModelMetrics
from device_agent.probation.canary import Canary, Outcome
from device_agent.probation.settings import ProbationSettings
from device_agent.probation.verdict import Evidence, Reference, against, needs_confirmation

if TYPE_CHECKING:
    from device_agent.loaded import LoadedModel

_LEAST_CANARIES = 4  # over a probation, however many clients ask: an engine that hangs answers nobody
_GOLDEN_ROWS_TAKE = 2  # timeouts at most: two rows without an answer end a probation
_LOOKS = 40  # over a probation
_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.25


class Interrupted(Refused):
    """The agent stops before a version has proven itself; that says nothing against it."""


class Watch:
    """The probation of one version.

    Attributes:
        seen_s: for how long it has been watched, earlier starts included.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        counters: ModelMetrics,
        old: Optional[LoadedModel],
        reference: Reference,
        settings: ProbationSettings,
        *,
        timeout_s: float,
        live: bool,
        stop: threading.Event,
        seen_s: float = 0.0,
    ) -> None:
        """Prepare to watch; blocks for as long as reading the golden files takes.

        Args:
            loaded: the version, which serves already.
            counters: its metrics.
            old: the version before, where it is still loaded.
            reference: what the version before was like.
            settings: when it is proven.
            timeout_s: a golden row without an answer by then has failed.
            live: whether requests can come; else golden rows are all there is, and nothing is waited for.
            stop: set when the agent stops.
            seen_s: for how long it was watched before the agent was started again.

        Raises:
            Refused: the golden files cannot be read.
        """
        self.seen_s = seen_s
        self._loaded = loaded
        self._counters = counters
        self._reference = reference
        self._settings = settings
        self._timeout_s = timeout_s
        self._canary = Canary(loaded, timeout_s)
        self._old_canary = None if old is None else Canary(old, timeout_s)
        self._live = live
        self._stop = stop
        self._outcomes: List[Outcome] = []
        self._old_run_s: List[float] = []
        self._memory_bytes: List[int] = []
        self._crash = ""
        self._before = (counters.failed - counters.invalid, counters.engine_restarts)
        self._counters.recent_s.clear()  # what it did when it last served is not this probation's

    async def run(self) -> None:
        """Watch until the version is proven, on the event loop that serves.

        Raises:
            Refused: it is unhealthy, and why.
            Timeout: it had no chance to prove itself: golden rows found no place in its queue.
            Interrupted: the agent stops.
        """
        duration_s = self._settings.duration_s
        limit_s = 2 * duration_s + _GOLDEN_ROWS_TAKE * self._timeout_s
        started_s = time.monotonic() - self.seen_s
        look_s = min(max(duration_s / _LOOKS, _SHORTEST_LOOK_S), _LONGEST_LOOK_S)
        while duration_s:
            self.seen_s = time.monotonic() - started_s
            over = self.seen_s >= duration_s or not self._live
            await self._ask_golden_rows(1.0 if over else self.seen_s / duration_s)
            self._look()
            await self._settle_doubts()
            reason = against(self.evidence(), self._reference, self._loaded.manifest.contract, self._settings)
            if reason is not None:
                raise self._refused(reason)
            if over and self._has_enough():
                return
            if self._stop.is_set():
                raise self._interrupted()
            if self.seen_s > limit_s:
                raise self._late(limit_s)
            await asyncio.sleep(look_s)

    def evidence(self) -> Evidence:
        """What was seen until now."""
        answered = [outcome for outcome in self._outcomes if not outcome.failure]
        failed = self._counters.failed - self._counters.invalid - self._before[0]
        return Evidence(
            total_s=[*self._counters.recent_s, *(outcome.total_s for outcome in answered)],
            failed=failed + len(self._outcomes) - len(answered),
            run_s=[outcome.run_s for outcome in answered],
            old_run_s=self._old_run_s,
            wrong=next((outcome.wrong for outcome in answered if outcome.wrong), ""),
            crash=self._crash,
            memory_bytes=self._memory_bytes,
        )

    def describe(self) -> Dict[str, Any]:
        """A form for JSON."""
        evidence = self.evidence()
        return {
            "digest": self._loaded.digest,
            "seen_s": round(self.seen_s, 1),
            "duration_s": self._settings.duration_s,
            "requests": evidence.requests,
            "golden_rows": len(self._outcomes),
            "failed": evidence.failed,
        }

    async def _ask_golden_rows(self, share: float) -> None:
        """Bring the evidence to its share of what there must be, of which some are always golden rows."""
        while (
            self.evidence().requests < share * self._settings.min_requests
            or len(self._outcomes) < share * _LEAST_CANARIES
        ):
            if not await self._ask() or self._is_hopeless():
                return

    async def _settle_doubts(self) -> None:
        contract = self._loaded.manifest.contract
        while needs_confirmation(self.evidence(), self._reference, contract, self._settings):
            if not await self._ask() or self._is_hopeless():
                return

    async def _ask(self) -> bool:
        outcome = await self._canary.ask()
        if outcome is None:
            return False
        self._outcomes.append(outcome)
        old = None if self._old_canary is None else await self._old_canary.ask()
        if old is not None and not old.failure:
            self._old_run_s.append(old.run_s)
        return True

    def _is_hopeless(self) -> bool:
        """Whether asking on would only take time: a hanging engine costs a timeout each."""
        return self._stop.is_set() or sum(bool(outcome.failure) for outcome in self._outcomes) >= 2

    def _has_enough(self) -> bool:
        rows = len(self._outcomes)
        return rows >= _LEAST_CANARIES and self.evidence().requests >= self._settings.min_requests

    def _look(self) -> None:
        process = self._loaded.engine.process
        if process:
            self._memory_bytes.append(resident_bytes(process))
        if process == 0 or self._counters.engine_restarts > self._before[1]:
            self._crash = (
                self._crash or str(getattr(self._loaded.engine, "last_failure", "")) or "no reason is known"
            )

    def _refused(self, reason: str) -> Refused:
        manifest = self._loaded.manifest
        return Refused(
            f"{manifest.name} version {manifest.version} did not hold in its probation and was rolled back",
            reason,
            "the previous version serves again; `edgekit-agent status` keeps this reason",
        )

    def _late(self, limit_s: float) -> Timeout:
        manifest = self._loaded.manifest
        return Timeout(
            f"{manifest.name} version {manifest.version} could not prove itself and was rolled back",
            f"its queue took no golden row within {limit_s:g} s (timeout)",
            "the previous version serves again; install it while less is asked of the model",
        )

    def _interrupted(self) -> Interrupted:
        manifest = self._loaded.manifest
        return Interrupted(
            f"the agent stops before {manifest.name} version {manifest.version} has proven itself",
            f"it was on probation for {self.seen_s:.1f} of {self._settings.duration_s:g} s",
            "its probation goes on at the next start; `edgekit-agent status` tells how it ends",
        )


def reference_of(loaded: LoadedModel, counters: ModelMetrics) -> Reference:
    """What a version that serves is like; ``counters`` are its own."""
    failed = counters.failed - counters.invalid
    asked = counters.total_seconds.count + failed
    return Reference(
        tuple(counters.recent_s), failed / asked if asked else 0.0, loaded.batcher.latency.predict(1)
    )
