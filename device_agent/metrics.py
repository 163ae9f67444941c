"""What the agent counts, and its Prometheus form.

Counting is on the path of every request, so it is plain integer arithmetic here; ``prometheus_client`` is
imported when somebody scrapes, and only formats.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Sequence, Tuple

if TYPE_CHECKING:
    from device_agent.batching.job import Job

SECONDS_BOUNDS = (
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3,
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)

_RETIRED_KEPT = 8  # digests that were replaced and are still exported, so that a scraper sees their end


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


class ModelMetrics:
    """Counters of one model version.

    Attributes:
        version: the version as the protocol writes it; empty before it serves.
        queue_seconds, compute_seconds, total_seconds: of answered requests.
        batch_rows: size of each executed batch.
        queue_depth: requests waiting now.
        refused: requests turned away because the queue was full.
        failed: requests that the engine could not run.
        deadline_missed: requests whose own timeout passed while they waited.
        cancelled: requests whose client went away.
        rows: rows of answered requests.
        last_inference_s: when the last batch finished, on the monotonic clock; 0: never.
    """

    def __init__(self) -> None:
        self.version = ""
        self.queue_seconds = Histogram(SECONDS_BOUNDS)
        self.compute_seconds = Histogram(SECONDS_BOUNDS)
        self.total_seconds = Histogram(SECONDS_BOUNDS)
        self.batch_rows = Histogram(ROWS_BOUNDS)
        self.queue_depth = 0
        self.refused = 0
        self.failed = 0
        self.deadline_missed = 0
        self.cancelled = 0
        self.rows = 0
        self.failed_seconds = 0.0
        self.last_inference_s = 0.0
        self.by_batch: Dict[int, List[float]] = {}

    def record_batch(self, batch: Sequence[Job]) -> None:
        """Count jobs that came back from the engine together."""
        executed = set()
        for job in batch:
            if job.started_s not in executed:  # an isolated failure splits a batch into several runs
                executed.add(job.started_s)
                self._record_run(job)
            total_s = job.finished_s - job.arrived_s
            if job.cancelled:
                self.cancelled += 1
            elif job.error is not None:
                self.failed += 1
                self.failed_seconds += total_s
            else:
                self.rows += job.rows
                self.queue_seconds.observe(job.started_s - job.arrived_s)
                self.compute_seconds.observe(job.finished_s - job.started_s)
                self.total_seconds.observe(total_s)

    def _record_run(self, job: Job) -> None:
        self.last_inference_s = job.finished_s
        self.batch_rows.observe(job.batch_rows)
        entry = self.by_batch.setdefault(job.batch_rows, [0, 0.0])
        entry[0] += 1
        entry[1] += job.finished_s - job.started_s


class Metrics:
    """Counters of the whole agent, by model and bundle digest."""

    def __init__(self) -> None:
        self._models: Dict[Tuple[str, str], ModelMetrics] = {}
        self._active: Dict[str, Mapping[str, str]] = {}
        self.http_errors: Dict[int, int] = {}

    def of_model(self, name: str, digest: str) -> ModelMetrics:
        """Counters of a model version; the same ones if that version was here before."""
        return self._models.setdefault((name, digest), ModelMetrics())

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
            del self._models[old]

    def count_http_error(self, status: int) -> None:
        """Count an answer with a status of 400 or more."""
        self.http_errors[status] = self.http_errors.get(status, 0) + 1

    def models(self) -> Iterator[Tuple[str, str, ModelMetrics]]:
        """Name, digest and counters of every version known."""
        for (name, digest), counters in list(self._models.items()):
            yield name, digest, counters

    def render(self) -> Tuple[str, bytes]:
        """The page of ``/metrics``: content type and body."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self))
        return CONTENT_TYPE_LATEST, generate_latest(registry)


_LABELS = ("model", "digest")
_HISTOGRAMS = (
    ("queue_seconds", "Time that answered requests waited for the engine"),
    ("compute_seconds", "Time that answered requests spent in the engine"),
    ("total_seconds", "Time from arrival to result of answered requests"),
    ("batch_rows", "Rows of each executed batch"),
)
_COUNTERS = (
    ("refused", "Requests turned away because the queue was full"),
    ("failed", "Requests that the engine could not run"),
    ("deadline_missed", "Requests whose timeout passed while they waited"),
    ("cancelled", "Requests whose client went away"),
    ("rows", "Rows of answered requests"),
)


class _Collector:
    """Turns the counters into Prometheus families at scrape time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        versions = list(self._metrics.models())
        for field, text in _HISTOGRAMS:
            histogram = HistogramMetricFamily(f"edgekit_inference_{field}", text, labels=_LABELS)
            for name, digest, counters in versions:
                values: Histogram = getattr(counters, field)
                histogram.add_metric([name, digest], values.cumulative(), values.total)
            yield histogram
        for field, text in _COUNTERS:
            counter = CounterMetricFamily(f"edgekit_inference_{field}", text, labels=_LABELS)
            for name, digest, counters in versions:
                counter.add_metric([name, digest], getattr(counters, field))
            yield counter
        depth = GaugeMetricFamily("edgekit_queue_depth", "Requests waiting now", labels=_LABELS)
        for name, digest, counters in versions:
            depth.add_metric([name, digest], counters.queue_depth)
        yield depth
        errors = CounterMetricFamily(
            "edgekit_http_errors", "Answers with an error status", labels=("status",)
        )
        for status, count in sorted(self._metrics.http_errors.items()):
            errors.add_metric([str(status)], count)
        yield errors
