"""One view of the weights of Conv, Gemm and MatMul, and edits of constants that leave other readers alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from calibration.affine import Floats
from calibration.graph import Array, Index, Names, array, attribute, drop_unused_constants, integer
from calibration.storage import attach, detach

_KINDS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Site:
    """A constant that a node reads.

    Attributes:
        node: name of the node.
        slot: position among the node's inputs.
    """

    node: str
    slot: int


class Editor:
    """A copy of a prepared model whose constants can be replaced for one reader at a time.

    A weight that is replaced is never copied.

    Attributes:
        model: the copy, without its weights until ``finish``.
        nodes: its nodes by name.
    """

    def __init__(self, model: ModelProto) -> None:
        detached = detach(model)
        self.model = detached.model
        self._weights = detached.weights
        self.names = Names(self.model)
        self.refresh()

    def refresh(self) -> None:
        """Look the nodes and constants up again, after the graph's lists were changed."""
        self.nodes: dict[str, NodeProto] = {node.name: node for node in self.model.graph.node}
        self._constants = {t.name: t for t in self.model.graph.initializer}

    def has(self, site: Site) -> bool:
        """Whether the node reads anything there."""
        inputs = self.nodes[site.node].input
        return len(inputs) > site.slot and bool(inputs[site.slot])

    def read(self, site: Site) -> Floats:
        """The constant's values as float32."""
        name = self.nodes[site.node].input[site.slot]
        tensor = self._weights.get(name, self._constants[name])
        return array(tensor).astype(np.float32, copy=False)

    def write(self, site: Site, values: Array) -> None:
        """Give the node a constant of its own with these values; another reader keeps the old one."""
        node = self.nodes[site.node]
        while len(node.input) <= site.slot:
            node.input.append("")
        name = self.names.fresh(f"{node.name}_input{site.slot}")
        tensor = numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)
        self.model.graph.initializer.append(tensor)
        self._constants[name] = self.model.graph.initializer[-1]
        node.input[site.slot] = name

    def finish(self) -> ModelProto:
        """The copy, whole again and without the constants that nothing reads any more."""
        drop_unused_constants(self.model.graph)
        attach(self.model, self._weights)
        return self.model


def is_layer(node: NodeProto, index: Index) -> bool:
    """Whether a node is a Conv, Gemm or MatMul of an activation with a constant weight, in its plain form."""
    if node.op_type not in _KINDS or not index.is_float_activation(node.input[0]):
        return False
    weight = index.constants.get(node.input[1])
    bias = node.input[2] if len(node.input) > 2 else ""
    if weight is None or (bias and bias not in index.constants):
        return False
    if node.op_type == "Conv":
        return len(weight.dims) >= 3
    plain = node.op_type == "MatMul" or (
        integer(node, "transA", 0) == 0
        and attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
    )
    return plain and len(weight.dims) == 2


def to_groups(node: NodeProto, weight: Floats) -> Floats:
    """A layer's weight as [groups, outputs of a group, inputs of a group, kernel positions]."""
    if node.op_type == "Conv":
        groups = integer(node, "group", 1)
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    matrix = weight if _outputs_first(node) else weight.T
    return matrix[None, :, :, None]


def from_groups(node: NodeProto, grouped: Floats, like: Floats) -> Floats:
    """The inverse of ``to_groups``; ``like`` has the shape to return to."""
    if node.op_type == "Conv":
        return grouped.reshape(like.shape)
    matrix = grouped[0, :, :, 0]
    return matrix if _outputs_first(node) else matrix.T


def outputs_of(node: NodeProto, weight: Floats) -> int:
    """Number of output channels."""
    groups, outputs, _, _ = to_groups(node, weight).shape
    return int(groups * outputs)


def bias_site(node: NodeProto, index: Index) -> Site | None:
    """Where a layer's bias is, or where it may be put; None: it has no place for one.

    A MatMul's bias is the constant vector of the Add that alone reads it.
    """
    if node.op_type != "MatMul":
        return Site(node.name, 2)
    addition = index.sole_reader(node.output[0])
    if addition is None or addition.op_type != "Add":
        return None
    slot = 1 - list(addition.input).index(node.output[0])
    bias = index.constants.get(addition.input[slot])
    width = index.constants[node.input[1]].dims[1]
    is_vector = bias is not None and list(bias.dims)[-1:] == [width] and int(np.prod(bias.dims)) == width
    return Site(addition.name, slot) if is_vector else None


def _outputs_first(node: NodeProto) -> bool:
    return node.op_type == "Gemm" and bool(integer(node, "transB", 0))


def restored(model: ModelProto, original: ModelProto, names: Collection[str]) -> ModelProto:
    """``model`` with the weights and biases that some of its layers have in ``original``.

    Args:
        model: a graph whose constants were replaced by an ``Editor``.
        original: the graph before that, with the same nodes.
        names: of the layers.

    Returns:
        A copy; ``model`` itself where there is nothing to restore.
    """
    if model is original or not names:
        return model
    before, editor = Editor(original), Editor(model)
    index = Index(original)
    for node in index.graph.node:
        if node.name not in names or not is_layer(node, index):
            continue
        for site in (Site(node.name, 1), bias_site(node, index)):
            if site is None:
                continue
            if before.has(site):
                editor.write(site, before.read(site))
            elif editor.has(site):
                del editor.nodes[site.node].input[site.slot :]
    return editor.finish()
