"""The same function in the spelling that runtimes recognise and fuse.

Exporters write one idea in several ways; each rewrite here turns a spelling that runtimes miss into
the one that they match. No value changes by more than the last bit.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from calibration.graph import Index, array, attribute, dims, integer, outer_reads, replace_nodes


def rewrite(model: ModelProto) -> None:
    """Apply every rewrite to a model whose shapes are inferred, in place."""
    _reorder_gelu(model)
    _name_spatial_means(model)


def _reorder_gelu(model: ModelProto) -> None:
    """Write x * (0.5 * (1 + erf(..))) as (x * (1 + erf(..))) * 0.5.

    Halving is exact in floating point, so the values are the same; the second form is the one that
    ONNX Runtime and TensorRT fuse into a GELU.
    """
    index = Index(model)
    for node in model.graph.node:
        if node.op_type != "Mul" or not _is_constant(index, node, 0.5):
            continue
        inner = _variable(index, node)
        outer = index.sole_reader(node.output[0])
        if inner is None or outer is None or outer.op_type != "Mul" or not _is_one_plus_erf(index, inner):
            continue
        half = next(name for name in node.input if name != inner)
        source = next((name for name in outer.input if name != node.output[0]), None)
        if source is None or source in index.constants:
            continue
        # ``node`` keeps its name and output, now x * (1 + erf); ``outer`` now halves it.
        node.input[:] = [source, inner]
        outer.input[:] = [node.output[0], half]
    _sort(model)


def _is_one_plus_erf(index: Index, name: str) -> bool:
    addition = index.producer.get(name)
    if addition is None or addition.op_type != "Add" or not _is_constant(index, addition, 1.0):
        return False
    inner = _variable(index, addition)
    erf = index.producer.get(inner) if inner else None
    return erf is not None and erf.op_type == "Erf"


def _is_constant(index: Index, node: NodeProto, value: float) -> bool:
    """Whether one operand of a binary node is the scalar constant ``value``."""
    for name in node.input:
        if name in index.constants:
            values = array(index.constants[name])
            if values.size == 1 and values.dtype == np.float32 and float(values.reshape(())) == value:
                return True
    return False


def _variable(index: Index, node: NodeProto) -> str | None:
    """The operand of a binary node that is not a constant; None where both or neither are."""
    found = [name for name in node.input if name not in index.constants]
    return found[0] if len(found) == 1 else None


def _name_spatial_means(model: ModelProto) -> None:
    """ReduceMean over all spatial axes with keepdims is GlobalAveragePool, which has an integer kernel."""
    index = Index(model)
    shapes = {
        value.name: dims(value)
        for value in (*model.graph.value_info, *model.graph.input)
        if value.type.tensor_type.HasField("shape")
    }
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        rank = len(shapes.get(node.input[0], ())) if node.input else 0
        if node.op_type == "ReduceMean" and rank >= 3 and _reduces_spatially(index, node, rank):
            nodes.append(
                helper.make_node("GlobalAveragePool", node.input[:1], list(node.output), name=node.name)
            )
        else:
            nodes.append(node)
    replace_nodes(model.graph, nodes)


def _reduces_spatially(index: Index, node: NodeProto, rank: int) -> bool:
    if integer(node, "keepdims", 1) != 1 or index.types.get(node.input[0]) != TensorProto.FLOAT:
        return False
    axes = attribute(node, "axes")
    if len(node.input) > 1 and node.input[1] in index.constants:
        axes = array(index.constants[node.input[1]]).reshape(-1).tolist()
    return isinstance(axes, list) and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _sort(model: ModelProto) -> None:
    """Put every node after the nodes that it reads from, keeping the order otherwise."""
    index = Index(model)
    done: set[str] = set()
    ordered: list[NodeProto] = []
    for start in model.graph.node:
        stack = [start]
        while stack:
            node = stack[-1]
            sources = (index.producer.get(name) for name in (*node.input, *outer_reads(node)))
            waiting = [s for s in sources if s is not None and s.name not in done]
            if waiting and node.name not in done:
                stack.extend(waiting)
                continue
            stack.pop()
            if node.name not in done:
                done.add(node.name)
                ordered.append(node)
    replace_nodes(model.graph, ordered)
