"""Which linear operators can run in int8, and why the others cannot."""

from __future__ import annotations

import math

from onnx import NodeProto

from calibration.graph import Index, attribute, integer
from calibration.targets import Target

_KEEPS_DISTRIBUTION = frozenset({"Where", "Reshape", "Transpose", "Cast", "Expand", "Squeeze", "Unsqueeze"})


def reason_to_keep(node: NodeProto, index: Index, target: Target, excluded: frozenset[str]) -> str | None:
    """Why a linear node stays in float; None: it is quantized."""
    if node.name in excluded:
        return "excluded"
    if node.op_type not in target.linear:
        return f"{target.name} has no integer {node.op_type}"
    source, weight = node.input[0], node.input[1]
    if not index.is_float_activation(source):
        return "its first input is a constant or not float32"
    if weight not in index.constants:
        return _product_reason(node, index, target)
    if node.op_type == "Gemm":
        return _gemm_reason(node, index)
    bias = node.input[2] if len(node.input) > 2 else ""
    return "its bias is not a constant" if bias and bias not in index.constants else None


def _product_reason(node: NodeProto, index: Index, target: Target) -> str | None:
    """Why a product without a constant weight stays in float."""
    if node.op_type != "MatMul" or not index.is_float_activation(node.input[1]):
        return "its weight is not a constant"
    if not target.quantizes_products:
        return f"{target.name} multiplies two activations in float"
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
    columns = index.constants[node.input[1]].dims[weight_axis(node, 2) or 0]
    if bias not in index.constants or math.prod(index.constants[bias].dims) != columns:
        return "its bias is not one constant for each output"
    return None if attribute(node, "beta", 1.0) == 1.0 else "it scales its bias"


def weight_axis(node: NodeProto, rank: int) -> int | None:
    """Axis of the output channels in a linear node's weight; None: one scale for the tensor."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if integer(node, "group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if integer(node, "transB", 0) else 1
    return 1 if rank == 2 else None
