"""Folding: what depends on constants alone is computed once, and BatchNormalization disappears."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from calibration.graph import Array, Index, Names, array, attribute, integer, replace_nodes, subgraphs
from calibration.session import run_node

#: A folded tensor may be larger than what it was made from by this much: a broadcast table stays a node.
MAX_GROWTH_BYTES = 64 << 20
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial"})


def fold_constants(model: ModelProto) -> None:
    """Replace the nodes that depend on constants alone by their values, in place.

    Each is run by ONNX Runtime, the runtime whose numbers the rest of calibration uses. A node whose
    value would be larger than its inputs by more than 64 MiB stays.
    """
    constants = {t.name: t for t in model.graph.initializer}
    index = Index(model)
    kept: list[NodeProto] = []
    for node in model.graph.node:
        values = _evaluate(model, node, constants) if _foldable(node, constants, index) else None
        if values is None:
            kept.append(node)
            continue
        for name, value in values.items():
            tensor = numpy_helper.from_array(value, name)
            constants[name] = tensor
            model.graph.initializer.append(tensor)
    replace_nodes(model.graph, kept)


def _foldable(node: NodeProto, constants: dict[str, TensorProto], index: Index) -> bool:
    return (
        node.domain in ("", "ai.onnx")
        and node.op_type not in _RANDOM
        and not any(True for _ in subgraphs(node))
        and all(not name or name in constants for name in node.input)
        and not any(name in index.outputs for name in node.output)
    )


def _evaluate(
    model: ModelProto, node: NodeProto, constants: dict[str, TensorProto]
) -> dict[str, Array] | None:
    """Run one node on its constant inputs; None where ONNX Runtime cannot, or the result is too large."""
    reads = {name: array(constants[name]) for name in node.input if name}
    try:
        values = run_node(model, node, reads)
    except (RuntimeError, ValueError):  # an operator without a CPU kernel stays in the graph
        return None
    if not all(isinstance(value, np.ndarray) for value in values.values()):
        return None
    grown = sum(v.nbytes for v in values.values()) - sum(v.nbytes for v in reads.values())
    return values if grown <= MAX_GROWTH_BYTES else None


def fuse_batch_norms(model: ModelProto) -> None:
    """Fold each BatchNormalization into the Conv or ConvTranspose that alone feeds it, in place.

    y = scale * (conv(x) - mean) / sqrt(var + epsilon) + shift is a convolution with other weights
    (Jacob et al., 2018, section 3.2).
    """
    names = Names(model)
    index = Index(model)
    fused: set[str] = set()
    for node in model.graph.node:
        source = index.producer.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if source is not None and _fusable(node, source, index):
            _fuse(model, node, source, index, names)
            fused.add(node.name)
    replace_nodes(model.graph, [node for node in model.graph.node if node.name not in fused])


def _fusable(norm: NodeProto, source: NodeProto, index: Index) -> bool:
    constants = all(name in index.constants for name in norm.input[1:5])
    weights = all(name in index.constants for name in source.input[1:] if name)
    grouped_transpose = source.op_type == "ConvTranspose" and integer(source, "group", 1) != 1
    return (
        source.op_type in ("Conv", "ConvTranspose")
        and not grouped_transpose
        and constants
        and weights
        and integer(norm, "training_mode", 0) == 0
        and index.sole_reader(norm.input[0]) is not None
        and not any(name for name in norm.output[1:])
    )


def _fuse(model: ModelProto, norm: NodeProto, source: NodeProto, index: Index, names: Names) -> None:
    gamma, beta, mean, variance = (array(index.constants[n]).astype(np.float64) for n in norm.input[1:5])
    epsilon = attribute(norm, "epsilon", 1e-5)
    factor = gamma / np.sqrt(variance + float(epsilon))  # type: ignore[arg-type]  # an ONNX float
    weight = array(index.constants[source.input[1]])
    channel_axis = 1 if source.op_type == "ConvTranspose" else 0
    shape = [-1 if axis == channel_axis else 1 for axis in range(weight.ndim)]
    has_bias = len(source.input) > 2 and bool(source.input[2])
    bias = array(index.constants[source.input[2]]).astype(np.float64) if has_bias else 0.0
    fused_weight = (weight * factor.reshape(shape)).astype(weight.dtype)
    fused_bias = ((bias - mean) * factor + beta).astype(weight.dtype)
    # New names: the old constants may have other readers.
    weight_name, bias_name = names.fresh(f"{source.name}_weight"), names.fresh(f"{source.name}_bias")
    model.graph.initializer.append(numpy_helper.from_array(fused_weight, weight_name))
    model.graph.initializer.append(numpy_helper.from_array(fused_bias, bias_name))
    inputs = [source.input[0], weight_name, bias_name]
    del source.input[:]
    source.input.extend(inputs)
    source.output[0] = norm.output[0]
