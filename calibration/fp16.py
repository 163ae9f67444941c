"""A float16 graph between float32 inputs and outputs, with float32 islands where float16 is too narrow.

An operator is converted where ONNX allows float16 for each of its float32 inputs and outputs; casts stand
between the two precisions. Which tensors a float16 cannot hold is known from the ranges that calibration
saw: magnitudes above 65504 become infinity, and a tensor that lies below 2**-14 throughout loses its bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.graph import (
    Index,
    Names,
    array,
    drop_unused_constants,
    opset,
    outer_reads,
    rename_reads,
    replace_nodes,
    subgraphs,
)
from calibration.prepare import prepare
from calibration.scales import Scales
from calibration.storage import Source, infer_shapes

MAX_FP16 = 65504.0
MIN_NORMAL_FP16 = 2.0**-14
#: Operators whose output type is an attribute; the converter rewrites that attribute.
_TYPED_BY_ATTRIBUTE = {"Cast": "to"}
#: Operators that lose more than they gain in float16, whatever the range.
_KEPT_OPERATORS = frozenset({"Range", "CumSum", "NonMaxSuppression", "RandomNormal", "RandomUniform"})
#: A scale in float16 would be another number.
_PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})
#: Operators in which a tiny operand is lost without harm beside a larger one. A third operand is a bias.
_ADDITIVE = frozenset({"Add", "Sub", "Sum", "Where", "Concat", "Max", "Min"})


@dataclass(frozen=True)
class Fp16Report:
    """What was converted.

    Attributes:
        converted: how many operators compute in float16.
        kept: the float operators that stay in float32, each with the reason.
        casts: how many Cast operators were added.
        guarded: whether ranges from calibration were there to judge by.
    """

    converted: int
    kept: Mapping[str, str]
    casts: int
    guarded: bool


def to_fp16(
    model: Source, scales: Scales | None = None, *, exclude: Collection[str] = ()
) -> tuple[ModelProto, Fp16Report]:
    """Convert a float32 model to float16 between float32 inputs and outputs.

    Args:
        model: the float model or its file; it is prepared first.
        scales: ranges from ``calibrate``; without them only constants are checked.
        exclude: names of operators to keep in float32.

    Raises:
        CalibrationError: the model is quantized already or not valid.
    """
    result = ModelProto()
    result.CopyFrom(prepare(model))
    return result, halve(result, scales, exclude)


def halve(model: ModelProto, scales: Scales | None, exclude: Collection[str] = ()) -> Fp16Report:
    """Convert the float32 operators of a prepared or quantized graph to float16, in place.

    Q/DQ pairs and their scales stay float32 with casts around them, so the integers mean the same numbers.

    Args:
        model: from ``prepare`` or ``write_qdq``, with its shapes inferred.
        scales: ranges from ``calibrate``; without them only constants are checked.
        exclude: names of operators to keep in float32.
    """
    converter = _Converter(model, scales, frozenset(exclude))
    converter.convert()
    del model.graph.value_info[:]
    drop_unused_constants(model.graph)
    infer_shapes(model)
    kept = dict(sorted(converter.kept.items()))
    return Fp16Report(converter.converted, kept, converter.casts, scales is not None)


class _Converter:
    def __init__(self, model: ModelProto, scales: Scales | None, exclude: frozenset[str]) -> None:
        self._graph = model.graph
        self._opset = opset(model)
        self._index = Index(model)
        self._names = Names(model)
        self._scales = scales
        self._exclude = exclude
        self._half: set[str] = set()  # activations that are float16 now
        self._casts: dict[tuple[str, int], str] = {}
        self._halved: dict[str, str] = {}
        self.converted = 0
        self.casts = 0
        self.kept: dict[str, str] = {}

    def convert(self) -> None:
        ordered: list[NodeProto] = []
        for node in self._graph.node:
            slots = self._float_slots(node)
            reason = self._reason_to_keep(node, slots)
            if reason is None:
                self._to_half(node, slots, ordered)
            else:
                if slots or any(self._is_float(name) for name in node.output):
                    self.kept[node.name] = reason
                self._to_float(node, ordered)
        self._restore_outputs(ordered)
        replace_nodes(self._graph, ordered)

    def _is_float(self, name: str) -> bool:
        return bool(name) and self._index.types.get(name) == TensorProto.FLOAT

    def _float_slots(self, node: NodeProto) -> list[int]:
        """Input slots that may hold float16 instead of the float32 they hold now."""
        schema = _schema(node, self._opset)
        if schema is None:
            return []
        return [
            i
            for i, name in enumerate(node.input)
            if self._is_float(name) and _allows_half(schema, _formal(list(schema.inputs), i))
        ]

    def _reason_to_keep(self, node: NodeProto, slots: list[int]) -> str | None:
        outputs = [name for name in node.output if self._is_float(name)]
        if node.name in self._exclude:
            return "excluded"
        if any(True for _ in subgraphs(node)):
            return f"{node.op_type} has a body"
        if node.op_type in _KEPT_OPERATORS | _PAIR or not (slots or outputs):
            return f"{node.op_type} is not converted"
        schema = _schema(node, self._opset)
        if schema is None:
            return f"{node.op_type} is not a standard operator"
        if node.op_type in _TYPED_BY_ATTRIBUTE:
            if not outputs:
                return "its result is not float"
        elif not slots and outputs:
            return f"{node.op_type} makes float32 from other types"
        for i, name in enumerate(node.output):
            if self._is_float(name) and not _allows_half(schema, _formal(list(schema.outputs), i)):
                return f"{node.op_type} returns float32 only"
        factors = [] if node.op_type in _ADDITIVE else [node.input[i] for i in slots if i < 2]
        return self._overflow([*(node.input[i] for i in slots), *outputs]) or self._underflow(
            [*factors, *outputs]
        )

    def _overflow(self, names: list[str]) -> str | None:
        for name in names:
            magnitude = self._magnitude(name)
            if magnitude > MAX_FP16:
                return f"{name!r} reaches {magnitude:.3g}, beyond float16"
        return None

    def _underflow(self, names: list[str]) -> str | None:
        for name in names:
            magnitude = self._magnitude(name)
            if 0.0 < magnitude < MIN_NORMAL_FP16:
                return f"{name!r} stays below {magnitude:.3g}, under float16's normal range"
        return None

    def _magnitude(self, name: str) -> float:
        """The largest magnitude that a tensor held; zero where nothing is known."""
        if name in self._index.constants:
            values = array(self._index.constants[name])
            return float(np.abs(values).max()) if values.size else 0.0
        name = self._quantized_from(name)
        found = self._scales.tensors.get(name) if self._scales is not None else None
        return max(abs(found.min), abs(found.max)) if found is not None else 0.0

    def _quantized_from(self, name: str) -> str:
        """The activation that a Q/DQ pair reads, where ``name`` is the pair's result; else ``name``."""
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            node = self._index.producer.get(name)
            if node is not None and node.op_type == kind:
                name = node.input[0]
        return name

    def _to_half(self, node: NodeProto, slots: list[int], ordered: list[NodeProto]) -> None:
        for i, name in enumerate(node.input):
            if i in slots:
                node.input[i] = self._as_half(name, ordered)
            elif name in self._half:
                node.input[i] = self._cast(name, TensorProto.FLOAT, ordered)
        for item in node.attribute:
            if item.name == _TYPED_BY_ATTRIBUTE.get(node.op_type) and item.i == TensorProto.FLOAT:
                item.i = TensorProto.FLOAT16
        self._half.update(name for name in node.output if self._is_float(name))
        self.converted += 1
        ordered.append(node)

    def _to_float(self, node: NodeProto, ordered: list[NodeProto]) -> None:
        for name in sorted({*node.input, *outer_reads(node)} & self._half):
            rename_reads([node], name, self._cast(name, TensorProto.FLOAT, ordered))
        ordered.append(node)

    def _as_half(self, name: str, ordered: list[NodeProto]) -> str:
        if name in self._half:
            return name
        if name not in self._index.constants:
            return self._cast(name, TensorProto.FLOAT16, ordered)
        if name not in self._halved:
            half = self._names.fresh(f"{name}_fp16")
            values = array(self._index.constants[name]).astype(np.float16)
            self._graph.initializer.append(numpy_helper.from_array(values, half))
            self._halved[name] = half
        return self._halved[name]

    def _cast(self, name: str, to: int, ordered: list[NodeProto]) -> str:
        """The tensor in the other precision; one Cast for all its readers."""
        if (name, to) not in self._casts:
            suffix = "fp16" if to == TensorProto.FLOAT16 else "fp32"
            output = self._names.fresh(f"{name}_{suffix}")
            ordered.append(helper.make_node("Cast", [name], [output], name=output, to=to))
            self.casts += 1
            self._casts[name, to] = output
        return self._casts[name, to]

    def _restore_outputs(self, ordered: list[NodeProto]) -> None:
        """Let the graph's outputs be float32 under their own names."""
        for value in self._graph.output:
            name = value.name
            if name not in self._half:
                continue
            inner = self._names.fresh(f"{name}_fp16")
            for node in ordered:
                _rename(node, name, inner)
            ordered.append(helper.make_node("Cast", [inner], [name], name=name, to=TensorProto.FLOAT))
            self.casts += 1


def _rename(node: NodeProto, old: str, new: str) -> None:
    for names in (node.input, node.output):
        for i, name in enumerate(names):
            if name == old:
                names[i] = new


def _schema(node: NodeProto, version: int) -> onnx.defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return None


def _formal(
    parameters: list[onnx.defs.OpSchema.FormalParameter], i: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter of a slot; a variadic one stands for all that follow."""
    return parameters[min(i, len(parameters) - 1)]


def _allows_half(schema: onnx.defs.OpSchema, parameter: onnx.defs.OpSchema.FormalParameter) -> bool:
    """Whether the slot's type is a variable that float16 may stand for."""
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return "tensor(float16)" in constraints.get(parameter.type_str, [])
