"""Embedding tables in int8: a quarter of their size, and no arithmetic in integers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.affine import Affine, quantize, weight_s8
from calibration.graph import Index, Names, array, drop_unused_constants, integer, replace_nodes

#: Smaller tables are not worth an operator more.
MIN_TABLE_BYTES = 64 << 10


def store_tables(model: ModelProto, exclude: Collection[str] = ()) -> tuple[str, ...]:
    """Store the float tables that Gather reads rows of as int8 with a scale for each column, in place.

    The rows are gathered as integers and dequantized after: what is computed with them stays in float.

    Args:
        model: a graph; edited.
        exclude: names of Gather nodes whose tables stay in float.

    Returns:
        The names of the Gather nodes that read integers now.
    """
    index, names = Index(model), Names(model)
    tables = [name for name in index.constants if _is_table(name, index, exclude)]
    stored = {name: _store(model, name, index, names) for name in tables}
    nodes: list[NodeProto] = []
    changed: list[str] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "Gather" or node.input[0] not in stored:
            continue
        node.input[0], scale, zero_point = stored[node.input[0]]
        output = node.output[0]
        node.output[0] = names.fresh(f"{output}_integers")
        dequantizer = helper.make_node(
            "DequantizeLinear", [node.output[0], scale, zero_point], [output], axis=-1
        )
        dequantizer.name = names.fresh(f"{output}_dequantize")
        nodes.append(dequantizer)
        changed.append(node.name)
    replace_nodes(model.graph, nodes)
    drop_unused_constants(model.graph)
    return tuple(sorted(changed))


def _is_table(name: str, index: Index, exclude: Collection[str]) -> bool:
    """Whether a tensor is a large float matrix that only Gathers of whole rows read."""
    tensor = index.constants[name]
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2 or name in index.outputs:
        return False
    large = 4 * int(np.prod(tensor.dims)) >= MIN_TABLE_BYTES
    return large and all(
        reader.op_type == "Gather"
        and reader.input[0] == name
        and integer(reader, "axis", 0) == 0
        and reader.name not in exclude
        for reader in index.readers.get(name, [])
    )


def _store(model: ModelProto, table: str, index: Index, names: Names) -> tuple[str, str, str]:
    """Add the int8 table, its scales and zero points; their names."""
    values = array(index.constants[table]).astype(np.float32, copy=False)
    affine: Affine = weight_s8(values, axis=1)
    parts = {
        "quantized": quantize(values, affine),
        "scale": affine.scale,
        "zero_point": affine.zero_point,
    }
    added = {part: names.fresh(f"{table}_{part}") for part in parts}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, added[part]) for part, value in parts.items()
    )
    return added["quantized"], added["scale"], added["zero_point"]
