"""Time of each operator of a graph, as ONNX Runtime's own profiler sees it.

The runtime fuses and splits operators when it loads a graph, so these are the kernels that really run. The
profiler costs time itself: the figures say where time goes, not how long a run takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgekit import ort
from edgekit.tensors import Arrays

_SUFFIX = "_kernel_time"
_PRECISIONS = {"int8": "int8", "uint8": "int8", "float16": "fp16", "float": "fp32"}


@dataclass(frozen=True)
class LayerTime:
    """One kernel of the graph as it runs.

    Attributes:
        name: of the node, as the runtime calls it.
        operator: its type.
        precision: ``int8``, ``fp16``, ``fp32``, or ``other``: what it computes with, by its first input.
        median_ms: over the runs.
    """

    name: str
    operator: str
    precision: str
    median_ms: float

    def as_json(self) -> dict[str, Any]:
        """The form that artifacts and reports keep."""
        return asdict(self)


def profile(graph: Path, inputs: Arrays, runs: int, threads: int) -> list[LayerTime]:
    """Run a graph under the profiler; kernels in the order in which they run.

    Raises:
        BadInput: ONNX Runtime does not accept the graph.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        session = ort.Session(graph, threads, profile_prefix=Path(temporary, "profile"))
        for _ in range(runs + 1):
            session.run(inputs)
        events = json.loads(session.end_profile().read_text(encoding="utf-8"))
    times: dict[str, list[float]] = {}
    found: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            times.setdefault(event["name"], []).append(event["dur"] / 1e3)
            found[event["name"]] = event["args"]
    return [
        # The first run of each allocates its buffers.
        LayerTime(name.removesuffix(_SUFFIX), args["op_name"], _precision(args), median(times[name][1:]))
        for name, args in found.items()
    ]


def _precision(args: Mapping[str, Any]) -> str:
    """A conversion counts as what it converts to or from in int8, since only INT8 needs it."""
    if args["op_name"] in ("QuantizeLinear", "DequantizeLinear"):
        return "int8"
    first = next((next(iter(shape)) for shape in args.get("input_type_shape", ())), "")
    return _PRECISIONS.get(first, "other")
