"""One rule an operator: the same function in older operators, or None where this case cannot be put so.

The formulas are those of the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto, helper

from calibration.graph import attribute, integer
from edgekit.lowering.resize import resize
from edgekit.lowering.roi_align import roi_align
from edgekit.lowering.view import View

#: What stands in place of a node, or None.
Rule = Callable[[NodeProto, View], list[NodeProto] | None]


def _number(node: NodeProto, name: str, default: float) -> float:
    value = attribute(node, name, default)
    return float(value) if isinstance(value, int | float) else default


def layer_normalization(node: NodeProto, view: View) -> list[NodeProto] | None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axes."""
    axes = _trailing_axes(node, view)
    if axes is None or any(node.output[1:]):
        return None
    chain, x = view.chain(node), node.input[0]
    centred = chain.then("Sub", x, chain.reduce("ReduceMean", x, axes, view))
    variance = chain.reduce("ReduceMean", chain.then("Mul", centred, centred), axes, view)
    scaled = _divided_by_deviation(node, view, chain, centred, variance)
    bias = node.input[2] if len(node.input) > 2 else ""
    result = chain.then("Mul", scaled, node.input[1], last=not bias)
    if bias:
        chain.then("Add", result, bias, last=True)
    return chain.nodes


def rms_normalization(node: NodeProto, view: View) -> list[NodeProto] | None:
    """X / sqrt(mean(x * x) + epsilon) * scale, over the last axes."""
    axes = _trailing_axes(node, view)
    if axes is None:
        return None
    chain, x = view.chain(node), node.input[0]
    square = chain.reduce("ReduceMean", chain.then("Mul", x, x), axes, view)
    chain.then("Mul", _divided_by_deviation(node, view, chain, x, square), node.input[1], last=True)
    return chain.nodes


def _trailing_axes(node: NodeProto, view: View) -> list[int] | None:
    axis = integer(node, "axis", -1)
    rank = view.rank(node.input[0])
    if axis >= 0:
        if rank is None:
            return None
        axis -= rank
    return list(range(axis, 0))


def _divided_by_deviation(node: NodeProto, view: View, chain: object, x: str, variance: str) -> str:
    epsilon = view.scalar(f"{node.name}/epsilon", _number(node, "epsilon", 1e-5), node.input[0])
    then = chain.then  # type: ignore[attr-defined]
    deviation = then("Sqrt", then("Add", variance, epsilon))
    return str(then("Div", x, deviation))


def group_normalization(node: NodeProto, view: View) -> list[NodeProto] | None:
    """Instance normalization of the groups, then scale and bias by channel (before opset 21: group)."""
    shape = view.shape(node.input[0])
    groups = integer(node, "num_groups", 1)
    if shape is None or len(shape) < 3 or not isinstance(shape[1], int):
        return None
    chain, x, channels = view.chain(node), node.input[0], shape[1]
    kind = helper.tensor_dtype_to_np_dtype(view.type(x))
    grouped = chain.then("Reshape", x, view.add(f"{node.name}/grouped", np.array([0, groups, -1], np.int64)))
    ones = view.add(f"{node.name}/ones", np.ones(groups, kind))
    zeros = view.add(f"{node.name}/zeros", np.zeros(groups, kind))
    normal = chain.then("InstanceNormalization", grouped, ones, zeros, epsilon=_number(node, "epsilon", 1e-5))
    flat = chain.then("Reshape", normal, chain.then("Shape", x))
    weights = [_by_channel(view, name, channels, len(shape)) for name in node.input[1:3]]
    if None in weights:
        return None
    scaled = chain.then("Mul", flat, str(weights[0]))
    chain.then("Add", scaled, str(weights[1]), last=True)
    return chain.nodes


def _by_channel(view: View, name: str, channels: int, rank: int) -> str | None:
    values = view.constant(name)
    if values is None:
        return None
    repeated = np.repeat(values, channels // len(values))
    return view.add(f"{name}/by_channel", repeated.reshape(-1, *[1] * (rank - 2)))


def gelu(node: NodeProto, view: View) -> list[NodeProto] | None:
    """X / 2 * (1 + erf(x / sqrt(2))), or its approximation by tanh."""
    chain, x = view.chain(node), node.input[0]
    half = chain.then("Mul", x, view.scalar(f"{node.name}/half", 0.5, x))
    if attribute(node, "approximate", b"none") == b"tanh":
        cube = chain.then("Mul", chain.then("Mul", x, x), x)
        inner = chain.then("Add", x, chain.then("Mul", cube, view.scalar(f"{node.name}/c", 0.044715, x)))
        root = view.scalar(f"{node.name}/root", math.sqrt(2 / math.pi), x)
        bent = chain.then("Tanh", chain.then("Mul", inner, root))
    else:
        bent = chain.then("Erf", chain.then("Div", x, view.scalar(f"{node.name}/root", math.sqrt(2), x)))
    chain.then("Mul", half, chain.then("Add", bent, view.scalar(f"{node.name}/one", 1.0, x)), last=True)
    return chain.nodes


def mish(node: NodeProto, view: View) -> list[NodeProto] | None:
    """X * tanh(softplus(x))."""
    chain, x = view.chain(node), node.input[0]
    chain.then("Mul", x, chain.then("Tanh", chain.then("Softplus", x)), last=True)
    return chain.nodes


def swish(node: NodeProto, view: View) -> list[NodeProto] | None:
    """X * sigmoid(alpha * x)."""
    chain, x = view.chain(node), node.input[0]
    alpha = view.scalar(f"{node.name}/alpha", _number(node, "alpha", 1.0), x)
    chain.then("Mul", x, chain.then("Sigmoid", chain.then("Mul", x, alpha)), last=True)
    return chain.nodes


def cast_like(node: NodeProto, view: View) -> list[NodeProto] | None:
    """A Cast to the type that the second input is known to have."""
    wanted = view.known_type(node.input[1])
    if wanted is None:
        return None
    chain = view.chain(node)
    chain.then("Cast", node.input[0], last=True, to=wanted)
    return chain.nodes


def einsum(node: NodeProto, view: View) -> list[NodeProto] | None:
    """The same equation in small letters, which name no axis yet."""
    value = attribute(node, "equation", b"")
    equation = value.decode() if isinstance(value, bytes) else ""
    free = iter(sorted(set("abcdefghijklmnopqrstuvwxyz") - set(equation)))
    names: dict[str, str | int | None] = {
        letter: next(free, "") for letter in sorted(set(equation)) if letter.isupper()
    }
    if "" in names.values():
        return None
    chain = view.chain(node)
    chain.then("Einsum", *node.input, last=True, equation=equation.translate(str.maketrans(names)))
    return chain.nodes


RULES: Mapping[str, Rule] = {
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "GroupNormalization": group_normalization,
    "Gelu": gelu,
    "Mish": mish,
    "Swish": swish,
    "CastLike": cast_like,
    "Einsum": einsum,
    "Resize": resize,
    "RoiAlign": roi_align,
}
