"""What the agent counts. Plain integer arithmetic, since it is on the path of every request.

Its Prometheus form is in :mod:`device_agent.metrics_page`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Deque, Dict, Iterator, List, Mapping, Sequence, Tuple

from device_agent.engines.base import InputError

if TYPE_CHECKING:
    from device_agent.batching.job import Job

SECONDS_BOUNDS = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)

_RETIRED_KEPT = 8  # digests that were replaced and are still exported, so that a scraper sees their end
_RECENT = 1024  # enough to tell a quantile of 0.99, and too few to be felt in memory


class Histogram:
    """Counts by bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def cumulative(self) -> List[Tuple[str, float]]:
        """Buckets as Prometheus wants them: at most each bound, and then all."""
        buckets: List[Tuple[str, float]] = []
        running = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts):
            running += count
            buckets.append((bound, running))
        return buckets


@dataclass(frozen=True)
class Totals:
    """Sums since the start, as Triton counts them.

    Attributes:
        success: answered requests.
        rejected: requests turned away, or whose timeout passed while they waited.
        cancelled: requests whose client went away.
        failed: requests that the engine could not run.
        rows: rows of answered requests.
        executions: runs of the engine.
        request_s, queue_s, compute_s: time of answered requests.
    """

    success: int = 0
    rejected: int = 0
    cancelled: int = 0
    failed: int = 0
    rows: int = 0
    executions: int = 0
    request_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + its for mine, its in zip(astuple(self), astuple(other))))


class ModelMetrics:
    """Counters of one model version.

    Attributes:
        version: the version as the protocol writes it; empty before it serves.
        earlier: of other files that served as the same version and are no longer counted apart.
        queue_seconds, compute_seconds, total_seconds: of answered requests.
        batch_rows: size of each executed batch.
        queue_depth: requests waiting now.
        refused: requests turned away when they came: the queue was full, or they would have been late.
        failed: requests that the engine could not run.
        invalid: of those, the ones whose values no runtime could have carried.
        recent_s: total times of the latest answered requests; infinite for one that was turned away.
        deadline_missed: requests whose own timeout passed while they waited.
        cancelled: requests whose client went away.
        rows: rows of answered requests.
        engine_restarts: times that an isolated engine was started again.
        last_inference_s: when the last batch finished, on the monotonic clock; 0: never.
    """

    def __init__(self) -> None:
        self.version = ""
        self.earlier = Totals()
        self.queue_seconds = Histogram(SECONDS_BOUNDS)
        self.compute_seconds = Histogram(SECONDS_BOUNDS)
        self.total_seconds = Histogram(SECONDS_BOUNDS)
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.queue_depth = 0
        self.refused = 0
        self.failed = 0
        self.invalid = 0
        self.recent_s: Deque[float] = deque(maxlen=_RECENT)
        self.deadline_missed = 0
        self.cancelled = 0
        self.rows = 0
        self.engine_restarts = 0
        self.failed_seconds = 0.0
        self.last_inference_s = 0.0
        self.by_batch: Dict[int, List[float]] = {}

    def totals(self) -> Totals:
        """Everything that was counted for the version."""
        return self.earlier + Totals(
            success=self.total_seconds.count,
            rejected=self.refused + self.deadline_missed,
            cancelled=self.cancelled,
            failed=self.failed,
            rows=self.rows,
            executions=self.batch_rows.count,
            request_s=self.total_seconds.total,
            queue_s=self.queue_seconds.total,
            compute_s=self.compute_seconds.total,
        )

    def count_engine_restart(self) -> None:
        """An isolated engine's process was started again."""
        self.engine_restarts += 1

    def count_refused(self) -> None:
        """A request was turned away when it came."""
        self.refused += 1
        self.recent_s.append(math.inf)

    def count_late(self) -> None:
        """A request's timeout passed while it waited."""
        self.deadline_missed += 1
        self.recent_s.append(math.inf)

    def record_batch(self, batch: Sequence[Job]) -> None:
        """Count jobs that came back from the engine together."""
        executed = set()
        for job in batch:
            if job.started_s not in executed:  # an isolated failure splits a batch into several runs
                executed.add(job.started_s)
                self._record_run(job)
            total_s = job.finished_s - job.arrived_s
            if job.probe:
                continue
            if job.cancelled:
                self.cancelled += 1
            elif job.error is not None:
                self.failed += 1
                self.invalid += isinstance(job.error, InputError)
                self.failed_seconds += total_s
            else:
                self.rows += job.rows
                self.queue_seconds.observe(job.started_s - job.arrived_s)
                self.compute_seconds.observe(job.finished_s - job.started_s)
                self.total_seconds.observe(total_s)
                self.recent_s.append(total_s)

    def _record_run(self, job: Job) -> None:
        self.last_inference_s = job.finished_s
        self.batch_rows.observe(job.batch_rows)
        entry = self.by_batch.setdefault(job.batch_rows, [0, 0.0])
        entry[0] += 1
        entry[1] += job.finished_s - job.started_s


@dataclass
class FollowMetrics:
    """Counters of a model that follows a tag; its own thread counts.

    Attributes:
        last_success_s: when the registry last answered, as seconds since 1970; 0: never.
        failures: looks that failed.
        downloaded_bytes: of blobs, over the network.
        up_to_date: whether what the tag pointed at, when last seen, is installed.
    """

    last_success_s: float = 0.0
    failures: int = 0
    downloaded_bytes: int = 0
    up_to_date: bool = False


class BuildMetrics:
    """What came of building engines for one model.

    Attributes:
        built: engines that were built.
        failures: builds that came to nothing, and engines that did not reproduce the golden outputs.
        seconds: how long the last one took.
        fallback: whether ONNX Runtime serves because there is no engine.
    """

    def __init__(self) -> None:
        self.built = 0
        self.failures = 0
        self.seconds = 0.0
        self.fallback = False

    def succeeded(self, seconds: float) -> None:
        """An engine was built."""
        self.built += 1
        self.seconds = seconds

    def failed(self) -> None:
        """A build came to nothing."""
        self.failures += 1


class Metrics:
    """Counters of the whole agent, by model and bundle digest."""

    def __init__(self) -> None:
        self._models: Dict[Tuple[str, str], ModelMetrics] = {}
        self._active: Dict[str, Mapping[str, str]] = {}
        self.http_errors: Dict[int, int] = {}
        self.grpc_errors: Dict[str, int] = {}
        self.followers: Dict[str, FollowMetrics] = {}
        self.builds: Dict[str, BuildMetrics] = {}

    def of_model(self, name: str, digest: str) -> ModelMetrics:
        """Counters of a model version; the same ones if that version was here before."""
        return self._models.setdefault((name, digest), ModelMetrics())

    def of_follower(self, name: str) -> FollowMetrics:
        """Counters of the model that follows a tag."""
        return self.followers.setdefault(name, FollowMetrics())

    def of_builds(self, name: str) -> BuildMetrics:
        """What came of building engines for a model."""
        return self.builds.setdefault(name, BuildMetrics())

    def activated(self, name: str, versions: Mapping[str, str]) -> None:
        """Note what serves, as versions by digest; the counters of versions long replaced are dropped."""
        self._active[name] = versions
        for digest, version in versions.items():
            counters = self.of_model(name, digest)
            counters.version = version
            del self._models[name, digest]
            self._models[name, digest] = counters  # newest last
        retired = [key for key in self._models if key[1] not in self._active.get(key[0], {})]
        for old in retired[:-_RETIRED_KEPT]:
            self._forget(*old)

    def _forget(self, name: str, digest: str) -> None:
        """Drop counters; sums by version never fall, so another file of that version takes them over."""
        old = self._models.pop((name, digest))
        heirs = [m for (other, _), m in self._models.items() if other == name and m.version == old.version]
        if heirs:
            heirs[-1].earlier += old.totals()

    def by_version(self) -> Dict[Tuple[str, str], Totals]:
        """Sums by name and version, over all files that served as that version."""
        sums: Dict[Tuple[str, str], Totals] = {}
        for (name, _), counters in list(self._models.items()):
            key = (name, counters.version)
            sums[key] = sums.get(key, Totals()) + counters.totals()
        return sums

    def pending(self) -> Dict[Tuple[str, str], int]:
        """Waiting requests by name and version."""
        depths: Dict[Tuple[str, str], int] = {}
        for (name, _), counters in list(self._models.items()):
            key = (name, counters.version)
            depths[key] = depths.get(key, 0) + counters.queue_depth
        return depths

    def count_http_error(self, status: int) -> None:
        """Count an answer with a status of 400 or more."""
        self.http_errors[status] = self.http_errors.get(status, 0) + 1

    def count_grpc_error(self, code: str) -> None:
        """Count an answer with another status code than ``OK``."""
        self.grpc_errors[code] = self.grpc_errors.get(code, 0) + 1

    def models(self) -> Iterator[Tuple[str, str, ModelMetrics]]:
        """Name, digest and counters of every version known."""
        for (name, digest), counters in list(self._models.items()):
            yield name, digest, counters
