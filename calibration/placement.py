"""Placement: which operators run in int8, and at which tensors Q/DQ pairs stand. The rules, by target.

Three classes of operators take part:

- linear (Conv, MatMul, Gemm): int8 where their weights are constant; two activations in a MatMul too.
- joining (Add, Concat, GlobalAveragePool, AveragePool): int8 only where every input is an int8 tensor
  already and an int8 operator reads the result. They never start an island of their own.
- copying (Reshape, Transpose, MaxPool, ...): they move integers without arithmetic, so their output
  takes the scale of their input.

Every other operator stays in float: quantizing all operator types is what ruins accuracy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx import ModelProto, NodeProto

from calibration.errors import CalibrationError
from calibration.graph import LINEAR, Index, array, attribute, integer, subgraphs, walk_graphs

JOINING = frozenset({"Add", "Concat", "GlobalAveragePool", "AveragePool"})
COPYING = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Gather"})
_KEEPS_DISTRIBUTION = frozenset({"Where", "Reshape", "Transpose", "Cast", "Expand", "Squeeze", "Unsqueeze"})
#: Activations that ONNX Runtime and TensorRT merge into the operator before them.
MERGED = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class Target:
    """What a runtime asks of a quantized graph.

    Attributes:
        name: as the user gives it.
        linear: operator types with an integer kernel.
        integer_bias: whether biases are int32 (else they stay float).
        shields_float_layers: whether float layers between int8 ones have to be hidden from the runtime.
    """

    name: str
    linear: frozenset[str]
    integer_bias: bool
    shields_float_layers: bool


TARGETS: Mapping[str, Target] = {
    # ONNX Runtime's CPU provider has no integer ConvTranspose.
    "onnxruntime": Target(
        "onnxruntime", frozenset({"Conv", "MatMul", "Gemm"}), integer_bias=True, shields_float_layers=True
    ),
}


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


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        CalibrationError: there is no such target.
    """
    if name in TARGETS:
        return TARGETS[name]
    raise CalibrationError(
        f"there is no target {name!r}",
        "a target is the runtime that the Q/DQ graph is made for",
        "choose one of: " + ", ".join(sorted(TARGETS)),
    )


def place(model: ModelProto, target: Target, exclude: Iterable[str] = ()) -> Placement:
    """Decide what is quantized in a prepared model.

    Args:
        model: from ``prepare``.
        target: the runtime.
        exclude: names of linear nodes to keep in float.

    Raises:
        CalibrationError: ``exclude`` names a node that is not there, or the only linear operators are
            inside If, Loop or Scan bodies.
    """
    index = Index(model)
    excluded = _check_exclude(model, frozenset(exclude))
    kept: dict[str, str] = {}
    linear: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in LINEAR:
            reason = _reason_to_keep(node, index, target, excluded)
            if reason is None:
                linear.append(node)
            else:
                kept[node.name] = reason
    kept.update(_inside_bodies(model))
    return _Layout(index, linear).solve(kept)


def observed_tensors(model: ModelProto) -> frozenset[str]:
    """Every tensor that some target would quantize: their ranges have to be finite."""
    found: set[str] = set()
    for target in TARGETS.values():
        found.update(place(model, target).tensors.values())
    return frozenset(found)


def weight_axis(node: NodeProto, rank: int) -> int | None:
    """Axis of the output channels in a linear node's weight; None: one scale for the tensor."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if integer(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if integer(node, "transB", 0) else 1
    return 1 if rank == 2 else None


def _check_exclude(model: ModelProto, exclude: frozenset[str]) -> frozenset[str]:
    unknown = sorted(exclude - {node.name for node in model.graph.node})
    if unknown:
        raise CalibrationError(
            f"there is no node {unknown[0]!r} to exclude",
            "nodes are named as in the prepared model",
            "take the names from the report's quantized and kept_float lists",
        )
    return exclude


def _inside_bodies(model: ModelProto) -> dict[str, str]:
    found = {}
    for node in model.graph.node:
        for body in subgraphs(node):
            for graph in walk_graphs(body):
                for i, inner in enumerate(graph.node):
                    if inner.op_type in LINEAR:
                        name = f"{node.name}/{inner.name or f'{inner.op_type}_{i}'}"
                        found[name] = f"inside the body of a {node.op_type}"
    return found


def _reason_to_keep(node: NodeProto, index: Index, target: Target, excluded: frozenset[str]) -> str | None:
    """Why a linear node stays in float; None: it is quantized."""
    if node.name in excluded:
        return "excluded"
    if node.op_type not in target.linear:
        return f"{target.name} has no integer {node.op_type}"
    source, weight = node.input[0], node.input[1]
    if not index.is_float_activation(source):
        return "its first input is a constant or not float32"
    if weight not in index.constants:
        return _product_reason(node, index)
    if node.op_type == "Gemm":
        return _gemm_reason(node, index)
    bias = node.input[2] if len(node.input) > 2 else ""
    return "its bias is not a constant" if bias and bias not in index.constants else None


def _product_reason(node: NodeProto, index: Index) -> str | None:
    """Why a product without a constant weight stays in float."""
    if node.op_type != "MatMul" or not index.is_float_activation(node.input[1]):
        return "its weight is not a constant"
    if any(_is_distribution(name, index) for name in node.input[:2]):
        # Over n positions the values are near 1/n: at 512 tokens below half a step of uint8, and on a
        # text encoder the cosine to float fell from 0.994 to 0.975.
        return "it averages by a Softmax, whose values sink below one integer step on long inputs"
    return None


def _is_distribution(name: str, index: Index) -> bool:
    """Whether a tensor is a Softmax, masked or moved about."""
    node = index.producer.get(name)
    while node is not None and node.op_type in _KEEPS_DISTRIBUTION:
        values = node.input[2] if node.op_type == "Where" else node.input[0]
        node = index.producer.get(values)
    return node is not None and node.op_type == "Softmax"


def _gemm_reason(node: NodeProto, index: Index) -> str | None:
    if integer(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
        return "it scales or transposes its input"
    bias = node.input[2] if len(node.input) > 2 else ""
    if not bias:
        return None
    columns = array(index.constants[node.input[1]]).shape[weight_axis(node, 2) or 0]
    if bias not in index.constants or array(index.constants[bias]).size != columns:
        return "its bias is not one constant for each output"
    return None if attribute(node, "beta", 1.0) == 1.0 else "it scales its bias"


@dataclass
class _Layout:
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

    def _result(self, node: NodeProto) -> str:
        """The tensor after the activation that the runtime merges into ``node``."""
        output: str = node.output[0]
        reader = self.index.sole_reader(output)
        if node.op_type in ("Conv", "Add") and reader is not None and reader.op_type in MERGED:
            return str(reader.output[0])
        return output

    def _tensors(self, nodes: list[NodeProto]) -> set[str]:
        """The tensors that have a Q/DQ pair, given ``joined``."""
        found: set[str] = set()
        for node in self.linear:
            found.update(name for name in node.input[:2] if name not in self.index.constants)
            if node.op_type == "Conv":
                found.add(self._result(node))
        for node in nodes:
            if node.name in self.joined:
                found.add(self._result(node))
        return found

    def _demanded(self, nodes: list[NodeProto]) -> set[str]:
        """The tensors that an int8 operator reads, given ``joined``."""
        found: set[str] = {name for node in self.linear for name in node.input[:2]}
        found.update(name for node in nodes if node.name in self.joined for name in self._data_inputs(node))
        return found

    def _holds(self, node: NodeProto, tensors: set[str], demanded: set[str]) -> bool:
        return self._result(node) in demanded and all(name in tensors for name in self._data_inputs(node))

    def _placement(self, nodes: list[NodeProto], kept: dict[str, str]) -> Placement:
        closed = {self._result(node) for node in self.linear if node.op_type == "Conv"}
        closed |= {self._result(node) for node in nodes if node.name in self.joined}
        roots: dict[str, str] = {}
        tensors = self._tensors(nodes)
        copies = {
            self._result(node): node.input[0]
            for node in nodes
            if node.name in self.joined and node.op_type in COPYING
        }
        for name in sorted(tensors):
            root = name
            while root in copies:
                root = copies[root]
            roots[name] = root
        return Placement(
            quantized=frozenset(node.name for node in self.linear),
            joined=frozenset(self.joined),
            tensors=roots,
            closed=frozenset(closed),
            kept_float=kept,
        )
