from __future__ import annotations

from typing import Dict, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from device_agent.batching.batcher import Job
from device_agent.metrics import SECONDS_BOUNDS, Histogram, Metrics
from device_agent.metrics_page import render
from device_agent.server.documents import model_statistics


def finished(rows: int, queue_s: float, compute_s: float, batch_rows: int) -> Job:
    """A job that came back from the engine."""
    job = Job({}, rows, "k", lambda job: None)
    job.started_s = 100.0
    job.arrived_s = job.started_s - queue_s
    job.finished_s = job.started_s + compute_s
    job.batch_rows = batch_rows
    job.outputs = {}
    return job


@given(st.lists(st.floats(0, 20), max_size=50))
def test_histograms_count_every_value_once(values: List[float]) -> None:
    """Buckets are cumulative, bounds are inclusive, and the last bucket holds everything."""
    histogram = Histogram(SECONDS_BOUNDS)
    for value in values:
        histogram.observe(value)
    buckets = dict(histogram.cumulative())
    for bound in SECONDS_BOUNDS:
        assert buckets[str(bound)] == sum(value <= bound for value in values)
    assert buckets["+Inf"] == len(values) == histogram.count
    assert histogram.total == pytest.approx(sum(values))


def test_the_page_is_what_prometheus_parses() -> None:
    """Every family has samples by model and digest, with the values that were counted."""
    metrics = Metrics()
    counters = metrics.of_model("m", "d" * 64)
    metrics.activated("m", {"d" * 64: "1"})
    counters.record_batch([finished(1, 0.0009, 0.02, 3), finished(2, 0.0021, 0.02, 3)])
    counters.refused = 4
    metrics.count_http_error(503)
    content_type, body = render(metrics)
    assert content_type.startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("le")): sample
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    compute = samples["edgekit_inference_compute_seconds_count", None]
    assert compute.labels == {"model": "m", "digest": "d" * 64}
    assert compute.value == 2
    assert samples["edgekit_inference_compute_seconds_sum", None].value == pytest.approx(0.04)
    assert samples["edgekit_inference_queue_seconds_bucket", "0.001"].value == 1
    assert samples["edgekit_inference_rows_total", None].value == 3
    assert samples["edgekit_inference_refused_total", None].value == 4
    assert samples["edgekit_http_errors_total", None].labels == {"status": "503"}


def test_failures_are_counted_apart() -> None:
    """A request that failed is in none of the histograms of answered ones."""
    counters = Metrics().of_model("m", "d")
    failed = finished(1, 0.001, 0.02, 1)
    failed.error = ValueError("no")
    counters.record_batch([failed])
    assert (counters.failed, counters.rows, counters.total_seconds.count) == (1, 0, 0)


def test_versions_long_replaced_are_forgotten() -> None:
    """A device that is updated for years does not export every version that it ever had."""
    metrics = Metrics()
    for number in range(100):
        metrics.activated("m", {f"digest{number}": str(number)})
    digests = [digest for _, digest, _ in metrics.models()]
    assert len(digests) < 20
    assert digests[-1] == "digest99"


def test_a_version_that_returns_keeps_its_counters() -> None:
    """After a rollback, counting goes on where it stopped."""
    metrics = Metrics()
    metrics.activated("m", {"one": "1"})
    metrics.of_model("m", "one").refused = 3
    metrics.activated("m", {"two": "1"})
    metrics.activated("m", {"one": "1"})
    assert metrics.of_model("m", "one").refused == 3


def test_statistics_have_tritons_form() -> None:
    """Durations are counts and nanoseconds, and batch_stats says how large the runs were."""
    counters = Metrics().of_model("m", "d")
    counters.record_batch([finished(1, 0.0009, 0.02, 3), finished(2, 0.0021, 0.02, 3)])
    stats = model_statistics("m", "1", counters)
    assert (stats["inference_count"], stats["execution_count"]) == (3, 1)
    assert stats["inference_stats"]["compute_infer"]["count"] == 2
    assert stats["inference_stats"]["compute_infer"]["ns"] == pytest.approx(40_000_000)
    assert stats["inference_stats"]["queue"]["ns"] == pytest.approx(3_000_000)
    assert stats["inference_stats"]["cache_hit"] == {"count": 0, "ns": 0}
    assert stats["batch_stats"][0]["batch_size"] == 3
    assert model_statistics("m", "1", Metrics().of_model("m", "x"))["last_inference"] == 0


def samples_of(metrics: Metrics) -> Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float]:
    """Every sample of the page by family and labels; Prometheus' own parser reads it."""
    families = text_string_to_metric_families(render(metrics)[1].decode())
    return {(f.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_tritons_names_are_exported_with_its_meaning() -> None:
    """Requests, rows, runs and microseconds by model and version, so that its dashboards work."""
    metrics = Metrics()
    counters = metrics.of_model('a "b"\n', "d")
    metrics.activated('a "b"\n', {"d": "2"})
    counters.record_batch([finished(1, 0.0009, 0.02, 3), finished(2, 0.0021, 0.02, 3)])
    counters.refused, counters.deadline_missed, counters.cancelled, counters.failed = 4, 1, 2, 3
    counters.queue_depth = 7
    samples = samples_of(metrics)
    labels = (("model", 'a "b"\n'), ("version", "2"))
    expected = {
        "request_success": 2,
        "count": 3,
        "exec_count": 1,
        "request_duration_us": 43_000,
        "queue_duration_us": 3_000,
        "compute_input_duration_us": 0,
        "compute_infer_duration_us": 40_000,
        "compute_output_duration_us": 0,
        "pending_request_count": 7,
    }
    assert {name: samples[f"nv_inference_{name}", labels] for name in expected} == expected
    assert (
        'nv_inference_count{model="a \\"b\\"\\n",version="2"} 3' in render(metrics)[1].decode().splitlines()
    )
    reasons = {"REJECTED": 5, "CANCELED": 2, "BACKEND": 3}
    failure = "nv_inference_request_failure"
    assert {r: samples[failure, (labels[0], ("reason", r), labels[1])] for r in reasons} == reasons


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30)), max_size=60))
def test_sums_of_a_version_never_fall(history: List[Tuple[int, int]]) -> None:
    """However often other files take over as the same version, a counter that Prometheus reads only grows."""
    metrics, before = Metrics(), 0.0
    for step, (requests, file) in enumerate(history):
        digest = f"file{file}"
        metrics.activated("m", {digest: "1"})
        metrics.of_model("m", digest).record_batch([finished(1, 0.0, 0.001, 1) for _ in range(requests)])
        now = metrics.by_version()["m", "1"].success
        assert now == before + requests, step
        before = now
