"""The same function in the form that quantization works on.

Opset 13 or newer, functions inlined, every node named, constants folded, Identity and Dropout gone,
BatchNormalization fused into the convolution before it, GELU and spatial means spelled as runtimes fuse
them, shapes inferred.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from calibration.branches import unfold_known_branches
from calibration.canonical import rewrite
from calibration.errors import CalibrationError
from calibration.folding import fold_constants, fuse_batch_norms
from calibration.graph import (
    Index,
    Names,
    attribute,
    drop_unused_constants,
    model_inputs,
    opset,
    outer_reads,
    rename_reads,
    replace_nodes,
    walk_graphs,
)
from calibration.storage import Source, attach, detach, infer_shapes, load_model

#: Per-channel Q/DQ exists from opset 13 on.
MIN_OPSET = 13
#: The file format that came with opset 13.
MIN_IR_VERSION = 7
_MARK = "calibration.prepared"
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger"})


def prepare(model: Source) -> ModelProto:
    """A copy of a model (in memory or a file) that computes the same function, ready for calibration.

    A model that this function returned is returned as it is: preparing twice changes nothing.

    Raises:
        CalibrationError: the model cannot be read, is quantized already, is not valid ONNX, or is so old
            that its operators cannot be brought to opset 13.
    """
    given = load_model(model)
    if any(entry.key == _MARK for entry in given.metadata_props):
        return given
    refuse_quantized(given)
    prepared = _upgrade(given, owned=given is not model)
    _freeze_constants(prepared)
    _name_nodes(prepared)
    _lift_constants(prepared)
    fold_constants(prepared)
    while unfold_known_branches(prepared):
        _lift_constants(prepared)
        fold_constants(prepared)
    _drop_identities(prepared)
    fuse_batch_norms(prepared)
    infer_shapes(prepared)
    rewrite(prepared)
    drop_unused_constants(prepared.graph)
    infer_shapes(prepared)
    prepared.metadata_props.add(key=_MARK, value="1")
    return prepared


def refuse_quantized(model: ModelProto) -> None:
    """Raise a CalibrationError where the model holds quantized operators already."""
    for graph in walk_graphs(model.graph):
        for node in graph.node:
            kind = node.op_type
            if kind in _QUANTIZED or kind.startswith("QLinear") or kind.startswith("MatMulInteger"):
                raise CalibrationError(
                    "the model is quantized already",
                    f"node {node.name or kind!r} is a {kind}",
                    "start from the float model",
                )


def _upgrade(model: ModelProto, *, owned: bool) -> ModelProto:
    """The model at opset 13 or newer and without functions, whose inside would not be seen.

    A copy, unless it is ``owned`` and needs no change: large models are not held twice.
    """
    current = opset(model)
    if owned and current >= MIN_OPSET and not model.functions:
        return model
    detached = detach(model)
    result = detached.model
    if model.functions:
        result = onnx.inliner.inline_local_functions(result)
    if current < MIN_OPSET:
        result = _convert(result, current)
    attach(result, detached.weights)
    return result


def _convert(model: ModelProto, current: int) -> ModelProto:
    try:
        return onnx.version_converter.convert_version(model, MIN_OPSET)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise CalibrationError(
            f"the model's opset {current} is too old for INT8",
            f"per-channel scales need {MIN_OPSET}, and the upgrade failed: {str(error).splitlines()[0]}",
            f"export the model again with opset {MIN_OPSET} or newer",
        ) from error


def _freeze_constants(model: ModelProto) -> None:
    """Take the initializers out of the inputs, where files older than IR version 4 list them too."""
    inputs = model_inputs(model)
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, MIN_IR_VERSION)


def _name_nodes(model: ModelProto) -> None:
    """Give every node a name of its own: exclusions and reports go by name."""
    names = Names(model)
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:
            node.name = names.fresh(f"{node.op_type}_{len(seen)}")
        seen.add(node.name)


def _lift_constants(model: ModelProto) -> None:
    """Turn Constant nodes into initializers."""
    kept: list[NodeProto] = []
    for node in model.graph.node:
        tensor = _constant_value(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            model.graph.initializer.append(tensor)
    replace_nodes(model.graph, kept)


def _constant_value(node: NodeProto) -> TensorProto | None:
    value = attribute(node, "value")
    if value is None:
        value = _plain_constant(node)
    if not isinstance(value, TensorProto):
        return None
    tensor = TensorProto()
    tensor.CopyFrom(value)
    tensor.name = node.output[0]
    return tensor


def _plain_constant(node: NodeProto) -> TensorProto | None:
    kinds = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    for name, kind in kinds.items():
        value = attribute(node, name)
        if value is not None:
            return numpy_helper.from_array(np.array(value, kind))
    return None


def _drop_identities(model: ModelProto) -> None:
    """Remove Identity and Dropout, whose mask nobody reads, and let the readers read their input."""
    index = Index(model)
    kept: list[NodeProto] = []
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for old in {name for name in (*node.input, *outer_reads(node)) if name in renamed}:
            rename_reads([node], old, renamed[old])
        if _is_identity(node, index):
            source = renamed.get(node.input[0], node.input[0])
            renamed[node.output[0]] = source
        else:
            kept.append(node)
    replace_nodes(model.graph, kept)


def _is_identity(node: NodeProto, index: Index) -> bool:
    if node.op_type not in ("Identity", "Dropout") or node.domain not in ("", "ai.onnx"):
        return False
    if len(node.input) > 2 and node.input[2]:
        return False
    extra_read = any(index.readers.get(name) or name in index.outputs for name in node.output[1:])
    return node.output[0] not in index.outputs and not extra_read
