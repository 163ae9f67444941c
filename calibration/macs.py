"""Multiply-accumulates of each linear and recurrent operator, from the shapes that really ran."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onnx import ModelProto, NodeProto

from calibration.graph import LINEAR, RECURRENT, Index, integer
from calibration.shapes import Shape


class MacCounter:
    """Adds up multiply-accumulates over runs.

    Attributes:
        tensors: the tensors whose shapes ``add`` needs.
        totals: multiply-accumulates so far, by node name.
    """

    def __init__(self, model: ModelProto) -> None:
        index = Index(model)
        self._nodes = [node for node in model.graph.node if node.op_type in LINEAR | RECURRENT]
        self._constants = {
            name: tuple(index.constants[name].dims)
            for node in self._nodes
            for name in node.input
            if name in index.constants
        }
        needed = [name for node in self._nodes for name in _shaping(node)]
        self.tensors = [name for name in dict.fromkeys(needed) if name not in self._constants]
        self.totals: dict[str, int] = {node.name: 0 for node in self._nodes}

    def add(self, shapes: Mapping[str, Shape]) -> None:
        """Count one run, given the shapes of ``tensors``."""
        known = {**self._constants, **shapes}
        for node in self._nodes:
            self.totals[node.name] += _macs(node, known)


def _shaping(node: NodeProto) -> list[str]:
    """The tensors whose shapes give a node's multiply-accumulates."""
    if node.op_type in RECURRENT:
        return list(node.input[:3])
    return [node.input[0], node.input[1], node.output[0]]


def _macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    source, weight = shapes[node.input[0]], shapes[node.input[1]]
    if node.op_type in RECURRENT:
        # Every time step of every row meets the weights of the input and of the state.
        return math.prod(source[:2]) * (math.prod(weight) + math.prod(shapes[node.input[2]]))
    if node.op_type == "ConvTranspose":
        # Every input value meets every weight of its channel.
        return math.prod(source) * math.prod(weight[1:])
    outputs = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return outputs * math.prod(weight[1:])
    inner = source[0] if node.op_type == "Gemm" and integer(node, "transA", 0) else source[-1]
    return outputs * inner
