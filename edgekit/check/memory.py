"""How much memory a graph takes while it runs, from its shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
from onnx import ModelProto, ValueInfoProto

from calibration.graph import dims, model_inputs, outer_reads
from edgekit.models import EXAMPLE_LENGTH

#: The rest is the system's, and on boards with one memory the CPU's.
USABLE_FRACTION = 0.75


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at batch 1 in float32, free axes besides the batch at ``models.EXAMPLE_LENGTH``.

    Attributes:
        weights_bytes: of the constants.
        activations_bytes: of the tensors that are alive at the same time, at most; a lower bound where
            ``unknown`` tensors have no inferred shape.
        unknown: how many have none.
    """

    weights_bytes: int
    activations_bytes: int
    unknown: int

    @property
    def total_bytes(self) -> int:
        """What has to fit."""
        return self.weights_bytes + self.activations_bytes


def need(model: ModelProto) -> MemoryNeed:
    """Walk the graph in its order; a tensor lives from its maker to its last reader."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    sizes = {
        value.name: _size_bytes(value) for value in (*model_inputs(model), *graph.value_info, *graph.output)
    }
    last_reader = {
        name: number
        for number, node in enumerate(graph.node)
        for name in (*node.input, *outer_reads(node))
        if name
    }
    kept = {value.name for value in graph.output}
    alive = {value.name for value in model_inputs(model)}
    unknown = {name for node in graph.node for name in node.output if name and sizes.get(name) is None}
    peak = 0
    for number, node in enumerate(graph.node):
        alive.update(name for name in node.output if name)
        peak = max(peak, sum(sizes.get(name) or 0 for name in alive))
        alive = {name for name in alive if name in kept or last_reader.get(name, -1) > number}
    weights = sum(_bytes(tensor.data_type, list(tensor.dims)) for tensor in graph.initializer)
    return MemoryNeed(weights, peak, len(unknown))


def _size_bytes(value: ValueInfoProto) -> int | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    sizes = [
        size if isinstance(size, int) else 1 if axis == 0 else EXAMPLE_LENGTH
        for axis, size in enumerate(dims(value))
    ]
    return _bytes(tensor.elem_type, sizes)


def _bytes(kind: int, sizes: list[int]) -> int:
    try:
        item = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        item = 4
    return math.prod(sizes) * item
