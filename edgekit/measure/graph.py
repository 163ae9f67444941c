"""Facts about an ONNX graph: parameters, multiply-accumulates, operators, opset."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import ort
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class GraphFacts:
    """What can be read off a graph.

    Attributes:
        params: numbers in floating-point or 8-bit constants with more than one element.
        macs: multiply-accumulates of Conv, ConvTranspose, Gemm and MatMul for one sample.
        opset: of the default domain.
        operators: operator type -> count.
        size_bytes: of the file.
    """

    params: int
    macs: int
    opset: int
    operators: dict[str, int]
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The form that artifacts and reports keep."""
        return asdict(self)


def read(path: Path, example: Arrays) -> GraphFacts:
    """Read a graph's facts; ``example`` is an input of one sample, to fix the free axes."""
    import onnx

    model = onnx.load(str(path))
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    params = sum(math.prod(t.dims) for t in model.graph.initializer if _is_weight(t))
    return GraphFacts(params, _macs(model, example), opset(model), counts, path.stat().st_size)


def opset(model: onnx.ModelProto) -> int:
    """Opset of the default domain."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def strip(model: onnx.ModelProto) -> None:
    """Remove documentation and exporters' notes (source paths, stack traces), in place."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for entry in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]


def _is_weight(tensor: onnx.TensorProto) -> bool:
    from onnx import TensorProto

    kinds = {
        TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
        TensorProto.UINT8,
    }  # fmt: skip
    return tensor.data_type in kinds and math.prod(tensor.dims) > 1


def _macs(model: onnx.ModelProto, example: Arrays) -> int:
    """Run the graph once with the shapes of interest as further outputs, and count from those."""
    import onnx

    from calibration.macs import MacCounter

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for number, node in enumerate(probe.graph.node):
        node.name = node.name or f"node_{number}"
    counter = MacCounter(probe)
    declared = {value.name for value in (*probe.graph.input, *probe.graph.output)}
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in counter.tensors if name not in declared
    )
    session = ort.Session(probe.SerializeToString())
    found = {**example, **session.run(example)}
    counter.add({name: tuple(found[name].shape) for name in counter.tensors})
    return sum(counter.totals.values())
