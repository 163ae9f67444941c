"""Running models, and single operators, in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.errors import CalibrationError
from calibration.graph import Array, array, read_names
from calibration.storage import Detached, detach

_ERRORS_ONLY = 4
_NO_SATURATION = "session.x64quantprecision"
_SHARED_WEIGHT = "replace the existing tensor"  # in what ONNX Runtime says of it


def exact_session(model: bytes | str, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU whose 8-bit products do not saturate.

    x86 processors without VNNI add two u8 x s8 products in 16 bits. ONNX Runtime can take other kernels there
    for weights of more than seven bits (onnxruntime_session_options_config_keys.h); on other processors the
    setting changes nothing. It fails where two operators share a weight: those keep the usual kernels.

    Args:
        model: the model, or the path of its file.
        options: of the session; changed.
    """
    options.add_session_config_entry(_NO_SATURATION, "1")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class below Exception
        if _SHARED_WEIGHT not in str(error):
            raise
        options.add_session_config_entry(_NO_SATURATION, "0")
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def open_session(model: ModelProto | Detached, threads: int = 0) -> ort.InferenceSession:
    """A session on the CPU provider.

    The weights are handed over beside the model: that is faster than inside it, and has no limit of 2 GB.

    Args:
        model: a float or quantized model.
        threads: within one operator; 0 leaves the choice to ONNX Runtime.

    Raises:
        CalibrationError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = threads
    detached = model if isinstance(model, Detached) else detach(model)
    weights = _needed(detached)
    values = [ort.OrtValue.ortvalue_from_numpy(array(tensor)) for tensor in weights.values()]
    options.add_external_initializers(list(weights), values)
    if detached.is_large:  # packing keeps each weight a second time
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return exact_session(detached.model.SerializeToString(), options)
    except Exception as error:  # ONNX Runtime's errors share no base class below Exception
        raise CalibrationError(
            "ONNX Runtime cannot load the model",
            str(error).strip().splitlines()[0],
            "check the file with onnx.checker, or export it again",
        ) from error


def _needed(detached: Detached) -> dict[str, TensorProto]:
    """The weights that ONNX Runtime keeps: it drops those that nobody reads, and refuses a value for them."""
    graph = detached.model.graph
    kept = read_names(graph) | {value.name for value in graph.input}
    return {name: tensor for name, tensor in detached.weights.items() if name in kept}


def run_node(model: ModelProto, node: NodeProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one operator of a model alone.

    Args:
        model: gives the operator sets.
        node: the operator.
        inputs: its inputs by name.

    Returns:
        Its outputs by name.

    Raises:
        RuntimeError, ValueError: ONNX Runtime has no kernel for it, or the inputs do not suit it.
    """
    names = [name for name in node.output if name]
    constants = [numpy_helper.from_array(inputs[name], name) for name in dict.fromkeys(node.input) if name]
    outputs = [helper.make_empty_tensor_value_info(name) for name in names]
    graph = helper.make_graph([node], "single", [], outputs, constants)
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = exact_session(single.SerializeToString(), options)
    return dict(zip(names, session.run(names, {}), strict=True))
