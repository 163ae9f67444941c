"""What rules ask of a graph: constants, types, shapes, and free names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.graph import Names, attribute, dims, opset, walk_graphs

Array = np.ndarray[Any, Any]


class View:
    """A graph with everything inside it, as its rules see it.

    Attributes:
        opset: of the default domain.
        added: constants that rules made; the caller appends them to the main graph, which bodies see too.
    """

    def __init__(self, model: ModelProto) -> None:
        self.opset = opset(model)
        self.added: list[TensorProto] = []
        self._names = Names(model)
        self._constants: dict[str, TensorProto] = {}
        self._types: dict[str, int] = {}
        self._shapes: dict[str, list[int | str | None]] = {}
        for graph in walk_graphs(model.graph):
            self._read(graph)

    def _read(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._constants[tensor.name] = tensor
        for node in graph.node:
            if node.op_type == "Constant" and isinstance(attribute(node, "value"), TensorProto):
                self._constants[node.output[0]] = attribute(node, "value")  # type: ignore[assignment]
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.HasField("tensor_type"):
                self._types[value.name] = value.type.tensor_type.elem_type
                if value.type.tensor_type.HasField("shape"):
                    self._shapes[value.name] = dims(value)

    def constant(self, name: str) -> Array | None:
        """The values of a constant; None where ``name`` is none."""
        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def integers(self, node: NodeProto, slot: int) -> list[int] | None:
        """A constant integer input; None where the node has none there, or it is computed."""
        if len(node.input) <= slot or not node.input[slot]:
            return None
        values = self.constant(node.input[slot])
        return None if values is None else [int(value) for value in values.reshape(-1)]

    def type(self, name: str) -> int:
        """Element type of a tensor; float32 where it is not known."""
        if name in self._constants:
            return self._constants[name].data_type
        return self._types.get(name, TensorProto.FLOAT)

    def known_type(self, name: str) -> int | None:
        """Element type of a tensor, if it is known."""
        return self._constants[name].data_type if name in self._constants else self._types.get(name)

    def shape(self, name: str) -> list[int | str | None] | None:
        """Sizes of a tensor, symbols for free ones; None where even the rank is not known."""
        if name in self._constants:
            return list(self._constants[name].dims)
        return self._shapes.get(name)

    def rank(self, name: str) -> int | None:
        """Number of axes of a tensor, if it is known."""
        shape = self.shape(name)
        return None if shape is None else len(shape)

    def add(self, wish: str, values: Array) -> str:
        """Make a constant; returns its name."""
        name = self._names.fresh(wish)
        self.added.append(numpy_helper.from_array(values, name))
        return name

    def scalar(self, wish: str, value: float, like: str) -> str:
        """Make a scalar of the type of ``like``."""
        return self.add(wish, np.array(value, helper.tensor_dtype_to_np_dtype(self.type(like))))

    def chain(self, node: NodeProto) -> Chain:
        """Start a replacement for ``node``."""
        return Chain(node, self._names)


class Chain:
    """Nodes in place of one, named after it, the last of them making its output."""

    def __init__(self, node: NodeProto, names: Names) -> None:
        self.nodes: list[NodeProto] = []
        self._origin = node
        self._names = names
        self._stem = node.name or node.output[0]

    def then(self, op_type: str, *inputs: str, last: bool = False, **attributes: Any) -> str:
        """Append an operator; returns the name of its output."""
        made = self._names.fresh(f"{self._stem}/{op_type}")
        output = self._origin.output[0] if last else self._names.fresh(f"{self._stem}/{op_type}_output")
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=made, **attributes))
        return output

    def reduce(self, op_type: str, data: str, axes: Sequence[int], view: View) -> str:
        """Append a reduction that keeps its axes, as the graph's opset spells it."""
        if view.opset >= 18:
            return self.then(
                op_type, data, view.add(f"{self._stem}/axes", np.array(axes, np.int64)), keepdims=1
            )
        return self.then(op_type, data, axes=list(axes), keepdims=1)
