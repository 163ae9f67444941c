"""Older opsets: the same operators as an earlier version of ONNX spells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from calibration.graph import attribute, integer, replace_nodes, walk_graphs
from edgekit.lowering.view import View

_AXES_AS_INPUT = 18  # since when reductions take their axes so; ReduceSum since 13
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSumSquare",
)  # fmt: skip


class OpsetError(Exception):
    """A node cannot be put into the older opset; the text says which and why."""


def to_opset(model: ModelProto, wanted: int) -> list[str]:
    """Bring a model down to an older opset, in place.

    Returns:
        Names of the operator types that had to be written otherwise.

    Raises:
        OpsetError: a node uses what the older opset does not have.
    """
    view = View(model)
    changed: set[str] = set()
    for graph in walk_graphs(model.graph):
        nodes: list[NodeProto] = []
        for node in graph.node:
            made = _older(node, view, wanted)
            changed.update({node.op_type} if made != [node] else ())
            nodes.extend(made)
        replace_nodes(graph, nodes)
    model.graph.initializer.extend(view.added)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = wanted
    return sorted(changed)


def _older(node: NodeProto, view: View, wanted: int) -> list[NodeProto]:
    if node.domain not in ("", "ai.onnx"):
        return [node]
    try:
        old = onnx.defs.get_schema(node.op_type, wanted)
        new = onnx.defs.get_schema(node.op_type, view.opset)
    except onnx.defs.SchemaError as error:
        raise OpsetError(f"{node.op_type} is not in opset {wanted}") from error
    if old.since_version == new.since_version:
        return [node]
    rule = _RULES.get(node.op_type)
    if rule is not None:
        node = rule(node, view, wanted)
    return [_without_new_defaults(node, old, new)]


def _without_new_defaults(node: NodeProto, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> NodeProto:
    """Drop attributes that the older version does not know, where they change nothing."""
    kept = []
    for item in node.attribute:
        if item.name in old.attributes:
            kept.append(item)
        elif item.name not in new.attributes or not _is_default(item, new.attributes[item.name]):
            raise OpsetError(f"{node.op_type} has no {item.name} in opset {old.since_version}")
    if len(node.input) > old.max_input:
        raise OpsetError(f"{node.op_type} takes {old.max_input} inputs in opset {old.since_version}")
    if len(kept) == len(node.attribute):
        return node
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.attribute[:]
    made.attribute.extend(kept)
    return made


def _is_default(item: onnx.AttributeProto, formal: onnx.defs.OpSchema.Attribute) -> bool:
    if not formal.default_value.name:
        return False
    default: object = helper.get_attribute_value(formal.default_value)
    value: object = helper.get_attribute_value(item)
    return value == default


def _reduction(node: NodeProto, view: View, wanted: int) -> NodeProto:
    if wanted >= _AXES_AS_INPUT or view.opset < _AXES_AS_INPUT:
        return node
    axes = view.integers(node, 1)
    if axes is None and len(node.input) > 1 and node.input[1]:
        raise OpsetError(f"{node.op_type} computes its axes, which opset {wanted} wants to know")
    if not axes and integer(node, "noop_with_empty_axes", 0):
        return helper.make_node("Identity", node.input[:1], node.output, name=node.name)
    made = helper.make_node(
        node.op_type, node.input[:1], node.output, name=node.name, keepdims=integer(node, "keepdims", 1)
    )
    if axes:
        made.attribute.append(helper.make_attribute("axes", axes))
    return made


def _split(node: NodeProto, view: View, wanted: int) -> NodeProto:
    """Equal parts by number came with opset 18: before, the sizes have to be said or the parts be even."""
    if attribute(node, "num_outputs") is None:
        return node
    axis = integer(node, "axis", 0)
    shape = view.shape(node.input[0])
    size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    if not isinstance(size, int):
        raise OpsetError(f"Split cuts an axis of unknown size, which opset {wanted} wants to know")
    part = -(-size // len(node.output))
    sizes = [min(part, size - part * i) for i in range(len(node.output))]
    name = view.add(f"{node.name}/sizes", np.array(sizes, np.int64))
    return helper.make_node("Split", [node.input[0], name], node.output, name=node.name, axis=axis)


def _grid_sample(node: NodeProto, _view: View, wanted: int) -> NodeProto:
    """Opset 20 gave the modes other names."""
    if wanted >= 20:
        return node
    made = onnx.NodeProto()
    made.CopyFrom(node)
    for item in made.attribute:
        if item.name == "mode":
            item.s = {b"linear": b"bilinear", b"cubic": b"bicubic"}.get(item.s, item.s)
    if attribute(node, "mode") is None:
        made.attribute.append(helper.make_attribute("mode", "bilinear"))
    return made


_RULES: Mapping[str, Callable[[NodeProto, View, int], NodeProto]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    "Split": _split,
    "GridSample": _grid_sample,
}
