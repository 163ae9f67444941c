"""Reading and editing ONNX graphs: who makes a tensor, who reads it, which name is free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

Array = npt.NDArray[np.generic]

#: Operators with weights or two operands, where the multiply-accumulates of a network are.
LINEAR = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
#: Operators that run over time steps; they stay in float.
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


class Index:
    """A read-only view of a graph; make a new one after an edit.

    Attributes:
        graph: the graph it was made from.
        producer: the node that makes a tensor, by tensor name.
        readers: the nodes that read a tensor, by tensor name; a node is listed once for each input slot.
        constants: the initializers by name.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph: GraphProto = model.graph
        self.producer: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in node.output:
                if name:
                    self.producer[name] = node
            for name in (*node.input, *outer_reads(node)):
                if name:
                    self.readers.setdefault(name, []).append(node)
        self.constants: dict[str, TensorProto] = {t.name: t for t in self.graph.initializer}
        self.outputs = frozenset(value.name for value in self.graph.output)

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type of each tensor that is known, as ``TensorProto`` numbers."""
        found = {t.name: t.data_type for t in self.graph.initializer}
        for value in (*self.graph.input, *self.graph.output, *self.graph.value_info):
            if value.type.HasField("tensor_type"):
                found[value.name] = value.type.tensor_type.elem_type
        return found

    def sole_reader(self, name: str) -> NodeProto | None:
        """The only node that reads ``name``; None where there are more, none, or the graph returns it."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def is_float_activation(self, name: str) -> bool:
        """Whether ``name`` is a float32 tensor that depends on the inputs."""
        return bool(name) and name not in self.constants and self.types.get(name) == TensorProto.FLOAT


class Names:
    """Gives out names that no tensor, node or initializer of the model has, in subgraphs neither."""

    def __init__(self, model: ModelProto) -> None:
        self._taken = {value.name for value in model.graph.input}
        for graph in walk_graphs(model.graph):
            self._taken.update(t.name for t in graph.initializer)
            self._taken.update(value.name for value in (*graph.input, *graph.output))
            for node in graph.node:
                self._taken.update((node.name, *node.output))

    def fresh(self, wish: str) -> str:
        """Reserve ``wish``, or ``wish_2``, ``wish_3``, ... where it is taken."""
        name, count = wish, 1
        while name in self._taken:
            count += 1
            name = f"{wish}_{count}"
        self._taken.add(name)
        return name


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of an If, Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def walk_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and every graph inside it."""
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from walk_graphs(body)


def outer_reads(node: NodeProto) -> Iterator[str]:
    """Names that the bodies of a node read from outside (ONNX subgraphs capture by name)."""
    for body in subgraphs(node):
        own = {t.name for t in body.initializer} | {value.name for value in body.input}
        own |= {name for inner in body.node for name in inner.output}
        for inner in body.node:
            yield from (name for name in (*inner.input, *outer_reads(inner)) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


def attribute(node: NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute as a Python object, or ``default`` where it is absent."""
    for item in node.attribute:
        if item.name == name:
            value: object = onnx.helper.get_attribute_value(item)
            return value
    return default


def integer(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    value = attribute(node, name, default)
    return value if isinstance(value, int) else default


def array(tensor: TensorProto) -> Array:
    """The values of an initializer."""
    return numpy_helper.to_array(tensor)


def dims(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """Sizes of a tensor: an int, the symbol of a dynamic axis, or None where it has no symbol."""
    return [
        d.dim_value if d.HasField("dim_value") else (d.dim_param or None)
        for d in value.type.tensor_type.shape.dim
    ]


def model_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller has to give (old files list the initializers among them too)."""
    constants = {t.name for t in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def opset(model: ModelProto) -> int:
    """Version of the default operator set; 1 where the model names none."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Put ``nodes``, already in order, in place of the graph's."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def rename_reads(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    """Let ``nodes`` read ``new`` where they read ``old``, in their bodies too."""
    for node in nodes:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for body in subgraphs(node):
            rename_reads(body.node, old, new)
            for value in body.output:
                if value.name == old:
                    value.name = new


def read_names(graph: GraphProto) -> set[str]:
    """What the nodes of a graph read, their bodies too, and what it puts out."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update((*node.input, *outer_reads(node)))
    return names


def drop_unused_constants(graph: GraphProto) -> None:
    """Remove the initializers that nothing reads."""
    used = read_names(graph)
    for i in reversed(range(len(graph.initializer))):  # the others are not moved: they may be gigabytes
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
