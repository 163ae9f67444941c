"""Graphs of the kinds that users bring, small and with fixed random weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from calibration.session import exact_session

Array = npt.NDArray[np.generic]


def build(
    nodes: list[NodeProto],
    inputs: Mapping[str, tuple[int, list[str | int]]],
    outputs: Mapping[str, list[str | int]],
    constants: Mapping[str, Array],
    opset: int = 18,
) -> ModelProto:
    """A checked model; ``inputs`` maps a name to its element type and shape."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def make_residual_cnn(opset: int = 18) -> ModelProto:
    """Conv, BatchNormalization, Relu, a residual Add, GlobalAveragePool and Gemm; width 16."""
    rng = np.random.default_rng(0)
    constants: dict[str, Array] = {}
    nodes: list[NodeProto] = []

    def conv(name: str, source: str, channels_in: int, channels: int) -> str:
        scale = np.sqrt(2.0 / (channels_in * 9))
        constants[f"{name}_w"] = (rng.normal(0, scale, (channels, channels_in, 3, 3))).astype(np.float32)
        for part, low, high in (("g", 0.5, 1.5), ("b", -0.3, 0.3), ("m", -0.2, 0.2), ("v", 0.5, 1.5)):
            constants[f"{name}_{part}"] = rng.uniform(low, high, channels).astype(np.float32)
        nodes.append(
            helper.make_node("Conv", [source, f"{name}_w"], [f"{name}_c"], name=name, pads=[1, 1, 1, 1])
        )
        norm = [f"{name}_c", *(f"{name}_{part}" for part in "gbmv")]
        nodes.append(helper.make_node("BatchNormalization", norm, [f"{name}_n"], name=f"{name}_norm"))
        return f"{name}_n"

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}_r"], name=f"{source}_relu"))
        return f"{source}_r"

    stem = relu(conv("stem", "image", 3, 16))
    inner = relu(conv("first", stem, 16, 16))
    nodes.append(helper.make_node("Add", [conv("second", inner, 16, 16), stem], ["sum"], name="residual"))
    last = relu(conv("third", relu("sum"), 16, 16))
    constants["fc_w"] = rng.normal(0, 0.25, (10, 16)).astype(np.float32)
    constants["fc_b"] = rng.normal(0, 0.1, 10).astype(np.float32)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc_w", "fc_b"], ["logits"], name="fc", transB=1),
    ]
    return build(
        nodes,
        {"image": (TensorProto.FLOAT, ["batch", 3, 8, 8])},
        {"logits": ["batch", 10]},
        constants,
        opset,
    )


def make_attention(width: int = 16) -> ModelProto:
    """One head of masked self-attention over embedded tokens, with dynamic batch and length."""
    rng = np.random.default_rng(1)
    constants: dict[str, Array] = {
        "table": rng.normal(0, 1, (50, width)).astype(np.float32),
        "zero": np.array(0.0, np.float32),
        "low": np.array(-1e9, np.float32),
        "axis": np.array([1], np.int64),
        **{name: rng.normal(0, 0.3, (width, width)).astype(np.float32) for name in ("wq", "wk", "wv", "wo")},
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], name="embed"),
        helper.make_node("MatMul", ["x", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], name="key"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], name="value"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], name="scores"),
        helper.make_node("Unsqueeze", ["attention_mask", "axis"], ["mask3"], name="widen"),
        helper.make_node("Cast", ["mask3"], ["keep"], name="to_bool", to=TensorProto.BOOL),
        helper.make_node("Where", ["keep", "scores", "low"], ["masked"], name="mask"),
        helper.make_node("Softmax", ["masked"], ["shares"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["mixed"], name="average"),
        helper.make_node("MatMul", ["mixed", "wo"], ["hidden"], name="output"),
    ]
    shape: list[str | int] = ["batch", "length"]
    return build(
        nodes,
        {"input_ids": (TensorProto.INT64, shape), "attention_mask": (TensorProto.INT64, shape)},
        {"hidden": ["batch", "length", width]},
        constants,
    )


def run(model: ModelProto, feed: Mapping[str, Array]) -> list[Array]:
    """The outputs of a model in ONNX Runtime with its default optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = exact_session(model.SerializeToString(), options)
    outputs: list[Array] = session.run(None, dict(feed))
    return outputs
