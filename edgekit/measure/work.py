"""What a graph has to do: the arithmetic and the traffic of each operator, for one input.

Shapes come from one run with every intermediate tensor as an output, so free axes, loops over shapes and
exporters' habits need no inference of ours. Operators that a runtime computes together are counted together:
an activation that is the only reader of a linear operator moves no bytes of its own, and the
Quantize/Dequantize pairs of an INT8 graph only say in which type their neighbours read and write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import ort
from edgekit.profile import Precision
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    import onnx

    from calibration.graph import Index

#: They change how a tensor is seen, or are gone before the first run.
_FREE = frozenset(
    {"Cast", "Constant", "DequantizeLinear", "Dropout", "Flatten", "Identity", "QuantizeLinear", "Reshape",
     "Shape", "Squeeze", "Unsqueeze"}
)  # fmt: skip
#: Runtimes compute these in the operator whose result they read.
_JOINED = frozenset(
    {"Add", "BatchNormalization", "Clip", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu",
     "Sigmoid", "Tanh"}
)  # fmt: skip


@dataclass(frozen=True)
class Operator:
    """One operator's work for one input.

    Attributes:
        name: of the node.
        kind: operator type.
        macs: multiply-accumulates; 0 for one that is not linear.
        moved_bytes: read and written, weights included.
        precision: in which it computes.
        per_output: multiply-accumulates behind one output value: few in a depthwise convolution.
    """

    name: str
    kind: str
    macs: int
    moved_bytes: int
    precision: Precision
    per_output: int


def operators(model: onnx.ModelProto, example: Arrays) -> list[Operator]:
    """The operators that cost time, in the graph's order.

    Args:
        model: a float, FP16 or INT8 (Q/DQ) graph; one that has no names for its nodes is given some.
        example: an input; its batch size is the one that is counted for.
    """
    import onnx

    from calibration.graph import LINEAR, Index
    from calibration.macs import MacCounter

    named = onnx.ModelProto()
    named.CopyFrom(model)
    for number, node in enumerate(named.graph.node):
        node.name = node.name or f"node_{number}"
    found = _tensors(named, example)
    index = Index(named)
    macs = MacCounter(_without_qdq_of_constants(named))
    macs.add({name: found[name][0] for name in macs.tensors})
    left_out = _joined(named, index, LINEAR) | _constant(named)
    return [
        _operator(node, found, index, macs.totals)
        for node in named.graph.node
        if node.op_type not in _FREE and node.name not in left_out
    ]


Found = Mapping[str, tuple[tuple[int, ...], int]]


def _tensors(model: onnx.ModelProto, example: Arrays) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes an element of every tensor, constants included."""
    import numpy as np
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    declared = {value.name for value in (*probe.graph.input, *probe.graph.output)}
    made = [name for node in probe.graph.node for name in node.output if name and name not in declared]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    ran = ort.Session(probe.SerializeToString()).run(example)
    arrays = {**example, **ran}
    found = {name: (tuple(array.shape), int(array.itemsize)) for name, array in arrays.items()}
    for tensor in model.graph.initializer:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        found[tensor.name] = (tuple(tensor.dims), dtype.itemsize)
    return found


def _without_qdq_of_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose linear operators read their weights' shapes from the quantized constants."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = {tensor.name for tensor in copy.graph.initializer}
    source = {
        node.output[0]: node.input[0]
        for node in copy.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    for node in copy.graph.node:
        for position, name in enumerate(node.input):
            if name in source and node.op_type != "DequantizeLinear":
                node.input[position] = source[name]
    return copy


def _joined(model: onnx.ModelProto, index: Index, linear: frozenset[str]) -> set[str]:
    """Names of the operators that are computed in the linear operator before them."""
    ends = {node.output[0] for node in model.graph.node if node.op_type in linear}
    joined = set()
    for node in model.graph.node:
        if node.op_type not in _JOINED:
            continue
        before = [name for name in node.input if name in ends and index.sole_reader(name) is node]
        if before:
            joined.add(node.name)
            ends.add(node.output[0])
    return joined


def _constant(model: onnx.ModelProto) -> set[str]:
    """Names of the operators that depend on no input: a runtime computes them once, when it loads the
    graph.
    """
    known = {tensor.name for tensor in model.graph.initializer} | {""}
    names = set()
    for node in model.graph.node:
        if known.issuperset(node.input):
            names.add(node.name)
            known.update(node.output)
    return names


def _operator(node: onnx.NodeProto, found: Found, index: Index, macs: Mapping[str, int]) -> Operator:
    moved = 0
    for name in node.input:
        if name in found:
            moved += _bytes(*found[name], _quantized_source(name, index))
    for name in node.output:
        if name in found:
            moved += _bytes(*found[name], _quantized_reader(name, index))
    count = macs.get(node.name, 0)
    outputs = math.prod(found[node.output[0]][0]) if node.output[0] in found else 1
    return Operator(
        node.name, node.op_type, count, moved, _precision(node, found, index), count // max(1, outputs)
    )


def _bytes(shape: tuple[int, ...], itemsize: int, quantized: bool) -> int:
    return math.prod(shape) * (1 if quantized else itemsize)


def _quantized_source(name: str, index: Index) -> bool:
    producer = index.producer.get(name)
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantized_reader(name: str, index: Index) -> bool:
    readers = index.readers.get(name, [])
    return bool(readers) and all(node.op_type == "QuantizeLinear" for node in readers)


def _precision(node: onnx.NodeProto, found: Found, index: Index) -> Precision:
    if node.input and _quantized_source(node.input[0], index):
        return "int8"
    itemsize = found[node.output[0]][1] if node.output[0] in found else 4
    return "fp16" if itemsize == 2 else "fp32"
