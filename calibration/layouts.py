"""Where Q/DQ pairs stand around the linear operators that run in int8.

Two classes of operators can follow the linear ones (Conv, MatMul, Gemm) into int8:

- joining (Add, Concat, GlobalAveragePool, AveragePool) take several values together;
- copying (Reshape, Transpose, MaxPool, ...) move integers without arithmetic, so their output takes the
  scale of their input.

Every other operator stays in float: quantizing all operator types is what ruins accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import NodeProto

from calibration.graph import Index

JOINING = frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"})
COPYING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Gather"})
#: Activations that ONNX Runtime and TensorRT merge into the operator before them.
MERGED = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Placement:
    """Where int8 begins and ends in one graph.

    Attributes:
        quantized: names of the linear nodes in int8.
        joined: names of the joining and copying nodes in int8.
        tensors: the activations with a Q/DQ pair, each with the tensor whose scale it takes.
        closed: those of ``tensors`` that every reader sees through the pair, because the operator that
            makes them has to end in integers.
        kept_float: linear nodes in float, with the reason.
    """

    quantized: frozenset[str]
    joined: frozenset[str]
    tensors: Mapping[str, str]
    closed: frozenset[str]
    kept_float: Mapping[str, str]


def integer_islands(index: Index, linear: list[NodeProto], kept: dict[str, str]) -> Placement:
    """For runtimes whose int8 operators end in integers: whole islands of the graph stay in int8.

    A convolution's result has a pair wherever it goes. A joining or copying operator takes part where all
    its inputs are int8 tensors and an int8 operator reads its result; it never starts an island.
    """
    return _Islands(index, linear).solve(kept)


def quantized_inputs(index: Index, linear: list[NodeProto], kept: dict[str, str]) -> Placement:
    """For runtimes that fuse Q/DQ into what comes before: pairs stand where an int8 operator reads.

    Nothing stands between a convolution and the residual Add that it feeds, so that both become one
    kernel; the Add's other operand has a pair (NVIDIA's TensorRT guide, "Q/DQ layer-placement
    recommendations"). What is joined by a Concat takes the Concat's scale, which then costs nothing; and
    where int8 operators alone read the Concat, what it alone reads has a pair too, with the same values, so
    that integers alone are joined.
    """
    tensors = {name for node in linear for name in node.input[:2] if index.is_float_activation(name)}
    convolutions = {node.output[0]: node for node in linear if node.op_type == "Conv"}
    order = {name: i for i, name in enumerate(convolutions)}
    joined = set()
    for node in index.graph.node:
        if node.op_type != "Add" or not all(index.is_float_activation(name) for name in node.input):
            continue
        fused = [name for name in node.input if name in convolutions and index.sole_reader(name) is not None]
        if fused:
            last = max(fused, key=lambda name: order[name])
            tensors.update(name for name in node.input if name != last)
            joined.add(node.name)
    ends = {_result(index, node) for node in (*linear, *(n for n in index.graph.node if n.name in joined))}
    for node in _concats_of_integers(index, tensors, {*joined, *(node.name for node in linear)}):
        tensors.update(x for x in node.input if index.is_float_activation(x) and index.sole_reader(x))
        joined.add(node.name)
    return Placement(
        quantized=frozenset(node.name for node in linear),
        joined=frozenset(joined),
        tensors=_roots(tensors, _concatenated(index, tensors)),
        closed=frozenset(tensors & ends),
        kept_float=kept,
    )


def _concats_of_integers(index: Index, tensors: set[str], in_int8: set[str]) -> list[NodeProto]:
    """Each Concat whose result int8 operators alone read."""
    return [
        node
        for node in index.graph.node
        if node.op_type == "Concat"
        and node.output[0] in tensors
        and node.output[0] not in index.outputs
        and all(reader.name in in_int8 for reader in index.readers[node.output[0]])
    ]


def _concatenated(index: Index, tensors: set[str]) -> dict[str, str]:
    """The quantized inputs of each Concat whose result is quantized, with that result."""
    return {
        name: node.output[0]
        for node in index.graph.node
        if node.op_type == "Concat" and node.output[0] in tensors
        for name in node.input
        if name in tensors
    }


def _roots(tensors: set[str], follows: Mapping[str, str]) -> dict[str, str]:
    """Each tensor with the one whose scale it takes, at the end of a chain of ``follows``."""
    roots = {}
    for name in sorted(tensors):
        root = name
        while root in follows:
            root = follows[root]
        roots[name] = root
    return roots


def _result(index: Index, node: NodeProto) -> str:
    """The tensor after the activation that the runtime merges into ``node``."""
    output: str = node.output[0]
    reader = index.sole_reader(output)
    if node.op_type in ("Conv", "Add") and reader is not None and reader.op_type in MERGED:
        return str(reader.output[0])
    return output


@dataclass
class _Islands:
    """Solves which joining and copying nodes follow the linear ones into int8."""

    index: Index
    linear: list[NodeProto]
    joined: set[str] = field(default_factory=set)

    def solve(self, kept: dict[str, str]) -> Placement:
        """Start from every candidate, and drop those without int8 around them until none is dropped."""
        nodes = [n for n in self.index.graph.node if n.op_type in JOINING | COPYING and self._candidate(n)]
        self.joined = {node.name for node in nodes}
        while True:
            tensors = self._tensors(nodes)
            demanded = self._demanded(nodes)
            lost = {n.name for n in nodes if n.name in self.joined and not self._holds(n, tensors, demanded)}
            if not lost:
                break
            self.joined -= lost
        return self._placement(nodes, kept)

    def _candidate(self, node: NodeProto) -> bool:
        inputs = self._data_inputs(node)
        float_activations = all(self.index.is_float_activation(name) for name in inputs)
        one_output = sum(1 for name in node.output if name) == 1
        return bool(inputs) and float_activations and one_output

    @staticmethod
    def _data_inputs(node: NodeProto) -> list[str]:
        """The inputs that hold values, without shapes, axes and indices."""
        return list(node.input[:1]) if node.op_type in COPYING else [name for name in node.input if name]

    def _tensors(self, nodes: list[NodeProto]) -> set[str]:
        """The tensors that have a Q/DQ pair, given ``joined``."""
        found: set[str] = set()
        for node in self.linear:
            found.update(name for name in node.input[:2] if name not in self.index.constants)
            if node.op_type == "Conv":
                found.add(_result(self.index, node))
        for node in nodes:
            if node.name in self.joined:
                found.add(_result(self.index, node))
        return found

    def _demanded(self, nodes: list[NodeProto]) -> set[str]:
        """The tensors that an int8 operator reads, given ``joined``."""
        found: set[str] = {name for node in self.linear for name in node.input[:2]}
        found.update(name for node in nodes if node.name in self.joined for name in self._data_inputs(node))
        return found

    def _holds(self, node: NodeProto, tensors: set[str], demanded: set[str]) -> bool:
        return _result(self.index, node) in demanded and all(
            name in tensors for name in self._data_inputs(node)
        )

    def _placement(self, nodes: list[NodeProto], kept: dict[str, str]) -> Placement:
        closed = {_result(self.index, node) for node in self.linear if node.op_type == "Conv"}
        closed |= {_result(self.index, node) for node in nodes if node.name in self.joined}
        copies = {
            _result(self.index, node): node.input[0]
            for node in nodes
            if node.name in self.joined and node.op_type in COPYING
        }
        return Placement(
            quantized=frozenset(node.name for node in self.linear),
            joined=frozenset(self.joined),
            tensors=_roots(self._tensors(nodes), copies),
            closed=frozenset(closed),
            kept_float=kept,
        )
