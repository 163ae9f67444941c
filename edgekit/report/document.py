"""The report document: what ``compress --json`` prints and ``report.json`` holds.

Every number was measured on a file that is in the bundle, or on the original; what was not measured is
null, and ``why`` says so. Keys are a promise (docs/report.md); more may be added.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Frozen):
    """Where a value would lie with unlimited samples, at ``confidence`` (a fraction)."""

    low: float
    high: float
    method: str
    confidence: float


class Metric(_Frozen):
    """A metric on held-out data; ``interval`` is null where the metric does not say how sure it is."""

    name: str
    value: float
    samples: int
    interval: Interval | None


class LatencyFigures(_Frozen):
    """Quantiles in milliseconds, over ``runs`` runs that took turns with the original's."""

    p50: float
    p95: float
    p99: float
    runs: int
    batch: int
    where: str


class Figures(_Frozen):
    """The original's figures."""

    params: int
    macs: int
    size_bytes: int
    metric: Metric
    latency_ms: LatencyFigures


class CalibrationAttempt(_Frozen):
    """An observer or a method: signal to noise of the outputs with it, and the gain over the best before it.

    Both are in decibels; null where there is nothing to compare, and ``why`` says why there is no score.
    """

    name: str
    sqnr_db: float | None
    gain_db: float | None
    kept: bool
    why: str | None


class DropCheck(_Frozen):
    """The metric on calibration data, by which layers were kept in float; ``protected`` is with these."""

    metric: str
    original: float
    in_float: float
    in_int8: float
    protected: float
    at_least: float


class CalibrationResult(_Frozen):
    """How an INT8 graph was made, and how much of it computes in int8.

    ``drop`` is null where no largest loss was asked, or calibration data lacks the labels that it takes.
    """

    observer: str
    methods: list[str]
    samples: int
    weight_bits: int
    attempts: list[CalibrationAttempt]
    int8_operators: int
    float_operators: int
    int8_macs_fraction: float | None
    drop: DropCheck | None


class CandidateFigures(Figures):
    """A candidate's figures, and its ratios to the original; ``reason`` says why it lost (null: chosen)."""

    params_ratio: float
    size_ratio: float
    metric_drop: float
    metric_drop_interval: Interval | None
    speedup: float
    speedup_interval: Interval
    precision: Literal["fp32", "fp16", "int8"]
    trial: str
    pruning: dict[str, Any] | None
    calibrator: str | None
    calibration: CalibrationResult | None
    layers_kept_high_precision: dict[str, str]
    reason: str | None


class ContractResult(_Frozen):
    """What was asked, whether it is met, and which parts are not; ``why`` explains each of these.

    ``max_drop_certain`` says whether the whole interval of the drop is within the bound; null: no bound, or
    no interval. A drop that is met and not certain may be the luck of few samples.

    ``binding`` names the parts without which some candidate would have met the contract.
    """

    size: float | None
    max_drop: float | None
    latency: str | None
    met: bool
    unmet: list[str]
    max_drop_certain: bool | None
    binding: list[str]
    why: dict[str, str]


class EngineLayerResult(_Frozen):
    """A layer of an engine: the nodes that were fused into it, and the types that go in and out."""

    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[str]


class EngineResult(_Frozen):
    """An engine, or the reason that there is none.

    ``changes`` says what was rewritten in the graph for it; ``not_on_dla`` which nodes fall back from a DLA
    to the GPU, by the published table and not executed. ``layers`` is what the builder says of the engine
    that it built; null, with ``layers_why``, where only the device could look into it.
    """

    profile: str
    builder: str
    version: str | None
    target: str
    built: bool
    executed: bool
    why: str | None
    changes: list[str]
    not_on_dla: dict[str, str]
    layers: list[EngineLayerResult] | None
    layers_why: str | None


class BundleResult(_Frozen):
    """Where the bundle is: its directory, its single file, its identity."""

    path: str
    file: str
    digest: str


class StageResult(_Frozen):
    """What a stage cost."""

    name: str
    seconds: float
    cached: bool
    peak_rss_bytes: int | None


class GroupSensitivity(_Frozen):
    """What a group of channels is worth: (width, loss) when it alone is narrower, and its parameters."""

    width: int
    params: int
    points: list[tuple[int, float]]


class PredictedLatency(_Frozen):
    """A latency that nobody measured; ``low_ms`` and ``high_ms`` estimate where a measurement would lie."""

    value_ms: float
    low_ms: float
    high_ms: float
    how: str


class LayerResult(_Frozen):
    """A kernel of the chosen graph as ONNX Runtime runs it here, under its profiler."""

    name: str
    operator: str
    precision: Literal["int8", "fp16", "fp32", "other"]
    median_ms: float


class Report(_Frozen):
    """The whole document."""

    model: str
    profile: str
    profile_digest: str
    seed: int
    tool_versions: dict[str, str]
    evaluated_on: str
    baseline: Figures
    chosen: CandidateFigures
    candidates: list[CandidateFigures]
    contract: ContractResult
    engines: list[EngineResult]
    bundle: BundleResult
    stages: list[StageResult]
    layers: list[LayerResult]
    sensitivity: dict[str, GroupSensitivity]
    latency_predicted_ms: PredictedLatency | None
    why: dict[str, str]
