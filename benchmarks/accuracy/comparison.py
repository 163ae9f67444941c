"""Run every tool on every model, and judge what comes out on held-out rows."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accuracy import cache
from accuracy.case import Array, Case, Data, Feed, Outputs
from accuracy.judging import paired_error
from accuracy.tools import TOOLS, Result, ToolFailed, applies
from calibration.session import exact_session

_THREADS = 1


@dataclass(frozen=True)
class Entry:
    """One tool on one model.

    Attributes:
        quality: the task's metric on the test rows; None where the tool failed.
        distance: to the float model on the test rows.
        error: standard error of the difference in quality to ours, on the same rows; None for ours.
        result: what the tool chose.
        why: why it failed.
        seconds: how long it took to quantize.
    """

    quality: float | None
    distance: float | None
    error: float | None
    result: Result
    why: str | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All tools on one model: the float model's quality, and an entry a tool."""

    case: Case
    rows: int
    float_quality: float
    entries: Mapping[str, Entry]


def compare(case: Case, tools: Sequence[str], max_rows: int | None = None) -> Comparison:
    """Quantize with each of ``tools``, ours first, and run each graph on the test rows.

    Args:
        case: the model.
        tools: names from ``TOOLS``; those that do not apply to the case are left out.
        max_rows: calibration rows at most.
    """
    model = cache.prepared(case)
    data = case.data()
    reference = run(model, data.test)
    truth = reference[0] if data.truth is None else data.truth
    entries: dict[str, Entry] = {}
    ours: Outputs | None = None
    for name in (tool for tool in tools if applies(tool, case)):
        entries[name], outputs = _entry(name, case, model, data, max_rows, reference, truth, ours)
        ours = outputs if name == "ours" else ours
    return Comparison(case, len(truth), case.quality(reference, truth), entries)


def _entry(
    name: str,
    case: Case,
    model: Path,
    data: Data,
    max_rows: int | None,
    reference: Outputs,
    truth: Array,
    ours: Outputs | None,
) -> tuple[Entry, Outputs | None]:
    print(f"{case.name}: {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        graph = Path(temporary) / "int8.onnx"
        begin = time.perf_counter()
        try:
            result = TOOLS[name](case, model, data.calibration[:max_rows], graph)
        except ToolFailed as error:
            return Entry(None, None, None, Result(), str(error), time.perf_counter() - begin), None
        seconds = time.perf_counter() - begin
        outputs = run(graph, data.test)
    error_of_difference = None if ours is None else paired_error(case.quality, ours, outputs, truth)
    quality, distance = case.quality(outputs, truth), case.distance(reference, outputs)
    return Entry(quality, distance, error_of_difference, result, None, seconds), outputs


def run(graph: Path, feeds: Sequence[Feed]) -> list[Array]:
    """All rows through a graph on ONNX Runtime's CPU provider; one array an output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.log_severity_level = 3
    session = exact_session(str(graph), options)
    parts = [session.run(None, dict(feed)) for feed in feeds]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]
