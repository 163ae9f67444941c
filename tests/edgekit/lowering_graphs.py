"""Small graphs with operators that older parsers do not have."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Arrays = dict[str, np.ndarray[Any, Any]]


def graph(
    nodes: list[NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, list[Any] | None],
    constants: Arrays | None = None,
    opset: int = 20,
) -> ModelProto:
    """A model; shapes with names for free axes."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def images(*shape: int) -> np.ndarray[Any, Any]:
    """Normally distributed, the same at every call."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def one(op_type: str, shape: list[Any], constants: Arrays | None = None, **attributes: Any) -> ModelProto:
    """A graph of one operator from ``x`` to ``y``; constants are its further inputs."""
    opset = attributes.pop("opset", 20)
    node = helper.make_node(op_type, ["x", *(constants or {})], ["y"], name="it", **attributes)
    return graph([node], {"x": (TensorProto.FLOAT, shape)}, {"y": None}, constants, opset)
