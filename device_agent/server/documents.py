"""The protocol's documents about a model: metadata, configuration, statistics. Pure functions."""

from __future__ import annotations

import time
from typing import Any, Dict, Mapping, Optional, Sequence

from device_agent.manifest import TensorSpec
from device_agent.metrics import Histogram, ModelMetrics
from device_agent.server.interface import ModelInterface


def model_metadata(model: ModelInterface, versions: Sequence[str], runtime: str) -> Dict[str, Any]:
    """Answer to ``GET /v2/models/M``; shapes include the batch axis as -1, ``versions`` all that serve."""
    return {
        "name": model.name,
        "versions": list(versions),
        "platform": _platform(runtime),
        "inputs": [_tensor_metadata(spec) for spec in model.inputs.values()],
        "outputs": [_tensor_metadata(spec) for spec in model.outputs.values()],
    }


def model_config(
    model: ModelInterface, digest: str, runtime: str, batching: Optional[Mapping[str, Any]]
) -> Dict[str, Any]:
    """Answer to ``GET /v2/models/M/config``, as Triton writes it: dims leave the batch axis out.

    Args:
        model: what clients see of it.
        digest: of its bundle, so that clients can tell which one answers.
        runtime: of its engine.
        batching: its ``dynamic_batching``; None: it has no batch axis.
    """
    skip = 0 if batching is None else 1
    config: Dict[str, Any] = {
        "name": model.name,
        "platform": _platform(runtime),
        "backend": runtime,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0 if batching is None else model.max_batch_size,
        "input": [_tensor_config(spec, skip) for spec in model.inputs.values()],
        "output": [_tensor_config(spec, skip) for spec in model.outputs.values()],
        "instance_group": [{"name": f"{model.name}_0", "kind": "KIND_CPU", "count": 1}],
        "default_model_filename": "model.onnx",
        "parameters": {"digest": {"string_value": digest}},
    }
    if batching is not None:
        config["dynamic_batching"] = dict(batching)
    return config


def _platform(runtime: str) -> str:
    return {"onnxruntime": "onnxruntime_onnx"}.get(runtime, f"{runtime}_plan")


def _tensor_metadata(spec: TensorSpec) -> Dict[str, Any]:
    return {"name": spec.name, "datatype": spec.dtype, "shape": list(spec.shape)}


def _tensor_config(spec: TensorSpec, skip: int) -> Dict[str, Any]:
    kind = "STRING" if spec.dtype == "BYTES" else spec.dtype
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": list(spec.shape[skip:])}


def model_statistics(name: str, version: str, counters: ModelMetrics) -> Dict[str, Any]:
    """One entry of ``model_stats``.

    ``inference_count`` counts rows, ``execution_count`` runs of the engine, ``success.count`` requests. The
    engine reads request memory in place, so there are no separate input and output copies to time: their
    durations are zero.
    """
    count = counters.total_seconds.count
    return {
        "name": name,
        "version": version,
        "last_inference": _wall_clock_ms(counters.last_inference_s),
        "inference_count": counters.rows,
        "execution_count": counters.batch_rows.count,
        "inference_stats": {
            "success": _duration(count, counters.total_seconds.total),
            "fail": _duration(counters.failed, counters.failed_seconds),
            "queue": _of(counters.queue_seconds),
            "compute_input": _duration(count, 0.0),
            "compute_infer": _of(counters.compute_seconds),
            "compute_output": _duration(count, 0.0),
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": _duration(int(runs), 0.0),
                "compute_infer": _duration(int(runs), seconds),
                "compute_output": _duration(int(runs), 0.0),
            }
            for rows, (runs, seconds) in sorted(counters.by_batch.items())
        ],
    }


def _of(histogram: Histogram) -> Dict[str, int]:
    return _duration(histogram.count, histogram.total)


def _duration(count: int, seconds: float) -> Dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _wall_clock_ms(monotonic_s: float) -> int:
    """Milliseconds since 1970 of a point on the monotonic clock; 0: never."""
    if monotonic_s == 0.0:
        return 0
    return round((time.time() - (time.monotonic() - monotonic_s)) * 1e3)
