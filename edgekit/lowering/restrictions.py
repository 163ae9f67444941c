"""What a TensorRT parser refuses of operators that it has.

Source: "Restrictions" in onnx-tensorrt's docs/operators.md (8.5 to 10.15), and TensorRT-RTX 1.7.1's own
parser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import NodeProto

from calibration.graph import attribute, integer
from edgekit.lowering.tables import Table
from edgekit.lowering.view import View

Restriction = Callable[[NodeProto, View], str | None]

_RESIZE_TRANSFORMATIONS = {
    "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
}  # fmt: skip
_RESIZE_NEAREST = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}


def refusal(node: NodeProto, table: Table, view: View) -> str | None:
    """Why a parser does not take a node; None: it does, as far as the published lists say."""
    if node.domain not in ("", "ai.onnx"):
        return f"operators of the domain {node.domain} are not known"
    if node.op_type not in table.operators:
        return f"{node.op_type} is not among its operators"
    restriction = RESTRICTIONS.get(node.op_type)
    return restriction(node, view) if restriction is not None else None


def _text(node: NodeProto, name: str, default: str) -> str:
    value = attribute(node, name, default.encode())
    return value.decode() if isinstance(value, bytes) else default


def _resize(node: NodeProto, _view: View) -> str | None:
    mode = _text(node, "mode", "nearest")
    transformation = _text(node, "coordinate_transformation_mode", "half_pixel")
    if mode not in ("nearest", "linear"):
        return f"it resizes by nearest or linear, not {mode}"
    if transformation not in _RESIZE_TRANSFORMATIONS:
        return f"it has no coordinates of {transformation}"
    if mode == "nearest" and _text(node, "nearest_mode", "round_prefer_floor") not in _RESIZE_NEAREST:
        return "it has no such rounding"
    if integer(node, "antialias", 0):
        return "it does not antialias"
    if _text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "it does not keep the aspect ratio"
    return None


def _einsum(node: NodeProto, _view: View) -> str | None:
    equation = _text(node, "equation", "")
    return "it takes small letters in equations only" if equation != equation.lower() else None


def _first_output_only(node: NodeProto, _view: View) -> str | None:
    return "it gives the first output only" if any(node.output[1:]) else None


def _pool(node: NodeProto, view: View) -> str | None:
    dilations = attribute(node, "dilations")
    if isinstance(dilations, list) and any(value != 1 for value in dilations):
        return "it has no dilated pooling"
    rank = view.rank(node.input[0])
    if rank is not None and rank not in (3, 4, 5):
        return f"it pools over one to three axes, not {rank - 2}"
    return _first_output_only(node, view)


def _zero_point(node: NodeProto, view: View) -> str | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    values = view.constant(node.input[2])
    if values is None:
        return "its zero point has to be constant"
    if values.any():
        return "its zero points have to be zero"
    return f"it quantizes to int8, not {values.dtype}" if values.dtype.name in ("uint8", "int32") else None


def _recurrent(node: NodeProto, _view: View) -> str | None:
    return "it has no other layout than 0" if integer(node, "layout", 0) else None


def _slope(node: NodeProto, view: View) -> str | None:
    """Files older than opset 9 have one slope a channel without the axes that say so."""
    data, slope = view.shape(node.input[0]), view.shape(node.input[1])
    if data is None or slope is None:
        return None
    pairs = zip(reversed(data), reversed(slope), strict=False)
    fits = len(slope) <= len(data) and all(b == 1 or b == a or not isinstance(a, int) for a, b in pairs)
    return None if fits else f"slopes of shape {slope} do not broadcast to {data}"


def _constant_slot(slot: int, name: str) -> Restriction:
    def restriction(node: NodeProto, view: View) -> str | None:
        given = len(node.input) > slot and node.input[slot]
        return f"{name} has to be constant" if given and view.constant(node.input[slot]) is None else None

    return restriction


RESTRICTIONS: Mapping[str, Restriction] = {
    "Resize": _resize,
    "Einsum": _einsum,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "LayerNormalization": _first_output_only,
    "QuantizeLinear": _zero_point,
    "DequantizeLinear": _zero_point,
    "PRelu": _slope,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "CumSum": _constant_slot(1, "its axis"),
    "OneHot": _constant_slot(1, "its depth"),
    "ReduceSum": _constant_slot(1, "its axes"),
}
