"""``/metrics`` in Prometheus' text format: the agent's own names, and Triton's.

``prometheus_client`` is imported when somebody scrapes, and only formats. It ends every counter's name in
``_total``, which Triton's do not have, so those few lines are written here.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator, Tuple

from device_agent.metrics import Histogram, Metrics, Totals

_LABELS = ("model", "digest")
_HISTOGRAMS = (
    ("queue_seconds", "Time that answered requests waited for the engine"),
    ("compute_seconds", "Time that answered requests spent in the engine"),
    ("total_seconds", "Time from arrival to result of answered requests"),
    ("batch_rows", "Rows of each executed batch"),
)
_COUNTERS = (
    ("refused", "Requests turned away when they came: queue full, or too late"),
    ("failed", "Requests that the engine could not run"),
    ("deadline_missed", "Requests whose timeout passed while they waited"),
    ("cancelled", "Requests whose client went away"),
    ("rows", "Rows of answered requests"),
    ("engine_restarts", "Times that an isolated engine was started again"),
)


# Name, help, and how it is read from the sums of a version. Durations are in microseconds.
_TRITON: Tuple[Tuple[str, str, Callable[[Totals], float]], ...] = (
    ("nv_inference_request_success", "Answered requests", lambda t: t.success),
    ("nv_inference_count", "Rows of answered requests", lambda t: t.rows),
    ("nv_inference_exec_count", "Runs of the engine", lambda t: t.executions),
    ("nv_inference_request_duration_us", "Time of answered requests", lambda t: _us(t.request_s)),
    ("nv_inference_queue_duration_us", "Time in the queue", lambda t: _us(t.queue_s)),
    ("nv_inference_compute_input_duration_us", "Time for inputs: they are read in place", lambda t: 0),
    ("nv_inference_compute_infer_duration_us", "Time in the engine", lambda t: _us(t.compute_s)),
    ("nv_inference_compute_output_duration_us", "Time for outputs: they are sent in place", lambda t: 0),
)
_REASONS: Tuple[Tuple[str, Callable[[Totals], int]], ...] = (
    ("REJECTED", lambda t: t.rejected),
    ("CANCELED", lambda t: t.cancelled),
    ("BACKEND", lambda t: t.failed),
)


def render(metrics: Metrics) -> Tuple[str, bytes]:
    """The page of ``/metrics``: content type and body."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics))
    return CONTENT_TYPE_LATEST, generate_latest(registry) + "".join(_triton_lines(metrics)).encode()


def _triton_lines(metrics: Metrics) -> Iterator[str]:
    sums = {_version_labels(*key): totals for key, totals in metrics.by_version().items()}
    for name, text, read in _TRITON:
        yield _head(name, text, "counter")
        for labels, totals in sums.items():
            yield f"{name}{{{labels}}} {read(totals)}\n"
    failure = "nv_inference_request_failure"
    yield _head(failure, "Requests without an answer", "counter")
    for labels, totals in sums.items():
        for reason, count in _REASONS:
            yield f'{failure}{{{labels},reason="{reason}"}} {count(totals)}\n'
    pending = "nv_inference_pending_request_count"
    yield _head(pending, "Requests waiting now", "gauge")
    for key, depth in metrics.pending().items():
        yield f"{pending}{{{_version_labels(*key)}}} {depth}\n"


def _head(name: str, text: str, kind: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _version_labels(name: str, version: str) -> str:
    return f'model="{_escaped(name)}",version="{_escaped(version)}"'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


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
        yield from _followers(self._metrics)
        yield from _builds(self._metrics)
        errors = CounterMetricFamily(
            "edgekit_http_errors", "Answers with an error status", labels=("status",)
        )
        for status, count in sorted(self._metrics.http_errors.items()):
            errors.add_metric([str(status)], count)
        yield errors
        failures = CounterMetricFamily("edgekit_grpc_errors", "Requests that gRPC failed", labels=("code",))
        for code, count in sorted(self._metrics.grpc_errors.items()):
            failures.add_metric([code], count)
        yield failures


def _followers(metrics: Metrics) -> Iterator[Any]:
    """What the models that follow tags have to say."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("model",)
    success = GaugeMetricFamily(
        "edgekit_follow_last_success_timestamp_seconds", "When the registry last answered", labels=labels
    )
    current = GaugeMetricFamily(
        "edgekit_follow_up_to_date", "1 if what the tag points at is installed", labels=labels
    )
    failures = CounterMetricFamily(
        "edgekit_follow_failures", "Looks at the registry that failed", labels=labels
    )
    received = CounterMetricFamily("edgekit_follow_downloaded_bytes", "Bytes of blobs fetched", labels=labels)
    for name, counters in sorted(metrics.followers.items()):
        success.add_metric([name], counters.last_success_s)
        current.add_metric([name], counters.up_to_date)
        failures.add_metric([name], counters.failures)
        received.add_metric([name], counters.downloaded_bytes)
    yield from (success, current, failures, received)


def _builds(metrics: Metrics) -> Iterator[Any]:
    """What came of the engines that the device builds."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ("model",)
    built = CounterMetricFamily("edgekit_engine_builds", "Engines that were built here", labels=labels)
    failures = CounterMetricFamily(
        "edgekit_engine_build_failures", "Engines that could not be built or did not serve", labels=labels
    )
    seconds = GaugeMetricFamily("edgekit_engine_build_seconds", "What the last build took", labels=labels)
    fallback = GaugeMetricFamily(
        "edgekit_engine_fallback", "1 if ONNX Runtime serves for want of an engine", labels=labels
    )
    for name, counters in sorted(metrics.builds.items()):
        built.add_metric([name], counters.built)
        failures.add_metric([name], counters.failures)
        seconds.add_metric([name], counters.seconds)
        fallback.add_metric([name], int(counters.fallback))
    yield from (built, failures, seconds, fallback)
