"""The bundle's portable graph under ONNX Runtime, with no server around it: here, or on a device over SSH."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgekit import ort
from edgekit.bench.golden import Golden
from edgekit.bundle import OpenBundle
from edgekit.composition import Chained, ordered_steps
from edgekit.deploy.measure import SshDevice
from edgekit.measure import latency
from edgekit.measure.device import Timed
from edgekit.measure.latency import Latency
from edgekit.recipe import Measure
from edgekit.tensors import Arrays

#: Runs as ``compress`` takes them, so that the figures can be compared.
RUNS, WARMUP = Measure().runs, Measure().warmup


@dataclass(frozen=True)
class EngineLatency:
    """What one run takes.

    Attributes:
        step: of a composition, where its steps were timed one by one; None: the whole model.
        latency_ms: with the batch, and where it was measured.
    """

    step: str | None
    latency_ms: Latency


def here(opened: OpenBundle, golden: Golden) -> list[EngineLatency]:
    """Time the whole model in this process, the batch sizes in turns.

    Raises:
        BadInput: a graph does not load or run.
    """
    run = _runner(opened)
    batches = {str(rows): golden.batch(rows) for rows in _batch_sizes(golden)}
    timed = latency.interleaved(
        {name: lambda inputs=inputs: run(inputs) for name, inputs in batches.items()},  # type: ignore[misc]
        runs=RUNS,
        warmup=WARMUP,
        batch=1,
        where=f"{latency.this_machine()}, onnxruntime {ort.version()}",
    )
    return [EngineLatency(None, replace(one, batch=int(name))) for name, one in timed.items()]


def over_ssh(opened: OpenBundle, golden: Golden, address: str) -> list[EngineLatency]:
    """Time the graphs on a device; of a composition, each step with what the steps before it make.

    Raises:
        BadInput: a graph does not load or run here.
        Missing: there is no ssh here, the device cannot be reached, or has no agent.
        DeviceRefused: a graph does not run there.
    """
    work: dict[tuple[str | None, int], Timed] = {}
    for rows in _batch_sizes(golden):
        inputs = golden.batch(rows)
        if not opened.manifest.composition:
            work[None, rows] = Timed(opened.directory / opened.manifest.graph, inputs, rows)
            continue
        for step, taken in _chained(opened).trace(inputs):
            work[step.name, rows] = Timed(opened.directory / step.graph, taken, rows)
    resources = opened.manifest.resources
    named = {str(number): timed for number, timed in enumerate(work.values())}
    threads = (resources.threads or 0) if resources else 0
    found = SshDevice(address).time(named, runs=RUNS, warmup=WARMUP, threads=threads)
    return [EngineLatency(step, one) for (step, _), one in zip(work, found.values(), strict=True)]


def _batch_sizes(golden: Golden) -> list[int]:
    """One row and the largest batch that was tested."""
    return sorted({1, golden.most_rows}) if golden.batchable else [golden.most_rows]


def _runner(opened: OpenBundle) -> Callable[[Arrays], object]:
    if opened.manifest.composition:
        return _chained(opened).run
    return ort.Session(opened.directory / opened.manifest.graph, _threads(opened)).run


def _chained(opened: OpenBundle) -> Chained:
    manifest = opened.manifest
    inputs, outputs = ([spec.name for spec in specs] for specs in (manifest.inputs, manifest.outputs))
    steps = ordered_steps(manifest.composition, inputs, outputs)
    graphs = {step.name: opened.directory / step.graph for step in steps}
    return Chained(steps, graphs, _threads(opened))


def _threads(opened: OpenBundle) -> int | None:
    resources = opened.manifest.resources
    return (resources.threads or None) if resources else None
