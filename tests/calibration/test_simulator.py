"""The integer-exact simulator, and that ONNX Runtime's integer kernels agree with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphs import build, make_attention, make_residual_cnn, run
from onnx import ModelProto, TensorProto, helper

from calibration import calibrate, quantize
from calibration.simulator import simulate

Feed = dict[str, np.ndarray]
rng = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    return rng.normal(0, 0.4, shape).astype(np.float32)


def images(channels: int = 4, size: int = 9) -> Feed:
    return {"x": rng.normal(0, 1, (3, channels, size, size)).astype(np.float32)}


def convolutions(**settings: object) -> Callable[[], tuple[ModelProto, Feed]]:
    """Two convolutions, the first with the given attributes, a Relu between them."""

    def make() -> tuple[ModelProto, Feed]:
        group = settings.get("group", 1)
        model = build(
            [
                helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="one", **settings),
                helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
                helper.make_node("Conv", ["r1", "w2"], ["y"], name="two"),
            ],
            {"x": (TensorProto.FLOAT, ["n", 4, 9, 9])},
            {"y": ["n", 3, "h", "w"]},
            {"w1": weights(8, 4 // int(str(group)), 3, 3), "b1": weights(8), "w2": weights(3, 8, 1, 1)},
        )
        return model, images()

    return make


def one_dimensional() -> tuple[ModelProto, Feed]:
    model = build(
        [
            helper.make_node("Conv", ["x", "w1"], ["c1"], name="one", pads=[2, 0], strides=[2]),
            helper.make_node("Conv", ["c1", "w2", "b2"], ["y"], name="two"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 2, 16])},
        {"y": ["n", 3, "length"]},
        {"w1": weights(6, 2, 3), "w2": weights(3, 6, 1), "b2": weights(3)},
    )
    return model, {"x": rng.normal(0, 1, (4, 2, 16)).astype(np.float32)}


def perceptron() -> tuple[ModelProto, Feed]:
    model = build(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="one", transB=1),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="two"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 12])},
        {"y": ["n", 5]},
        {"w1": weights(20, 12), "b1": weights(20), "w2": weights(20, 5), "b2": weights(5)},
    )
    return model, {"x": rng.normal(0, 1, (6, 12)).astype(np.float32)}


def branches() -> tuple[ModelProto, Feed]:
    """MaxPool, Concat and average pooling between convolutions."""
    shapes = {"w1": (4, 4, 3, 3), "w2": (4, 4, 1, 1), "w3": (6, 8, 1, 1), "w4": (6, 2)}
    model = build(
        [
            helper.make_node("Conv", ["x", "w1"], ["a"], name="one", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["x", "w2"], ["b"], name="two"),
            helper.make_node("Concat", ["a", "b"], ["ab"], name="join", axis=1),
            helper.make_node("MaxPool", ["ab"], ["m"], name="pool", kernel_shape=[3, 3], strides=[2, 2]),
            helper.make_node("Conv", ["m", "w3"], ["c"], name="three"),
            helper.make_node("GlobalAveragePool", ["c"], ["g"], name="mean"),
            helper.make_node("Flatten", ["g"], ["f"], name="flat"),
            helper.make_node("Gemm", ["f", "w4"], ["y"], name="four"),
        ],
        {"x": (TensorProto.FLOAT, ["n", 4, 9, 9])},
        {"y": ["n", 2]},
        {name: weights(*shape) for name, shape in shapes.items()},
    )
    return model, images()


def residual() -> tuple[ModelProto, Feed]:
    return make_residual_cnn(), {"image": rng.normal(0, 1, (4, 3, 8, 8)).astype(np.float32)}


def attention() -> tuple[ModelProto, Feed]:
    mask = (np.arange(8)[None, :] < np.array([[8], [5], [2]])).astype(np.int64)
    return make_attention(), {"input_ids": rng.integers(0, 50, (3, 8)), "attention_mask": mask}


GRAPHS: dict[str, Callable[[], tuple[ModelProto, Feed]]] = {
    "padded": convolutions(pads=[1, 1, 1, 1]),
    "strided": convolutions(strides=[2, 2], pads=[1, 0, 1, 0]),
    "dilated": convolutions(dilations=[2, 3]),
    "grouped": convolutions(group=2),
    "depthwise": convolutions(group=4, pads=[1, 1, 1, 1]),
    "same": convolutions(auto_pad="SAME_UPPER", strides=[2, 2]),
    "one_dimensional": one_dimensional,
    "perceptron": perceptron,
    "branches": branches,
    "residual": residual,
    "attention": attention,
}


def with_integers(model: ModelProto) -> ModelProto:
    """The model returning every quantized activation."""
    exposed = ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            exposed.graph.output.append(helper.make_empty_tensor_value_info(node.output[0]))
    return exposed


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", GRAPHS)
def test_onnx_runtime_agrees_within_one_step(name: str, target: str) -> None:
    """On every quantized tensor ONNX Runtime is at most one integer step from exact arithmetic."""
    model, feed = GRAPHS[name]()
    int8 = quantize(model, calibrate(model, [feed]), target).model
    exact = simulate(int8, feed)
    exposed = with_integers(int8)
    names = [value.name for value in exposed.graph.output]
    assert names
    found = dict(zip(names, run(exposed, feed), strict=True))
    steps = {key: np.abs(found[key].astype(int) - exact[key].astype(int)) for key in names}
    assert {key: int(value.max()) for key, value in steps.items() if value.max() > 1} == {}
    assert np.concatenate([value.ravel() for value in steps.values()]).mean() < 0.02


def test_the_simulator_is_exact() -> None:
    """A product of small integers with scale one is that product."""
    weight = np.array([[127, 1], [-3, 127], [5, -7]], np.float32)
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"x": (TensorProto.FLOAT, ["n", 3])},
        {"y": ["n", 2]},
        {"w": weight},
    )
    feed = {"x": np.array([[0, 255, 7]], np.float32)}
    int8 = quantize(model, calibrate(model, [feed])).model
    np.testing.assert_array_equal(
        simulate(int8, feed)["y"], feed["x"] @ np.array([[127, 1], [-3, 127], [5, -7]])
    )
