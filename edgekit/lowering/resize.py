"""Resize in any mode as products with constant matrices.

Every mode of Resize is linear in its input and goes axis by axis, so resizing an axis of n to m is a product
with an m x n matrix; ONNX Runtime itself computes that matrix, by resizing the identity.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from edgekit.lowering.view import Array, View

#: A matrix larger than this would cost more than the operator that it stands for.
_LARGEST_AXIS = 4096


def resize(node: NodeProto, view: View) -> list[NodeProto] | None:
    """MatMul over the width, then over the height; None where the sizes are free or other axes change."""
    sizes = _sizes(node, view)
    if sizes is None:
        return None
    (height, width), (new_height, new_width) = sizes
    across = _matrix(node, width, new_width, view.opset)
    down = _matrix(node, height, new_height, view.opset)
    kind = helper.tensor_dtype_to_np_dtype(view.type(node.input[0]))
    chain = view.chain(node)
    wide = chain.then("MatMul", node.input[0], view.add(f"{node.name}/across", across.T.astype(kind)))
    chain.then("MatMul", view.add(f"{node.name}/down", down.astype(kind)), wide, last=True)
    return chain.nodes


def _sizes(node: NodeProto, view: View) -> tuple[tuple[int, int], tuple[int, int]] | None:
    before, after = view.shape(node.input[0]), view.shape(node.output[0])
    if before is None or after is None or len(before) != 4 or len(after) != 4:
        return None
    if before[:2] != after[:2]:
        return None
    sizes = [*before[2:], *after[2:]]
    if not all(isinstance(size, int) and 0 < size <= _LARGEST_AXIS for size in sizes):
        return None
    if len(node.input) > 1 and node.input[1]:  # a region of interest: not separable from other sizes
        region = view.constant(node.input[1])
        if region is None or region.size:
            return None
    height, width, new_height, new_width = (int(str(size)) for size in sizes)
    return (height, width), (new_height, new_width)


def _matrix(node: NodeProto, size: int, new_size: int, opset: int) -> Array:
    """Column i is what becomes of a one at position i."""
    from edgekit import ort

    attributes = [item for item in node.attribute if item.name not in ("axes", "keep_aspect_ratio_policy")]
    made = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"])
    made.attribute.extend(attributes)
    graph = helper.make_graph(
        [made],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 1, size, new_size])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    identity = np.eye(size, dtype=np.float32).reshape(1, 1, size, size)
    resized = ort.Session(model.SerializeToString()).run({"x": identity})["y"]
    return np.ascontiguousarray(resized[0, 0].T)
