"""Preparation changes the form of a model, never its function."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from graphs import build, make_residual_cnn, run
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, calibrate, prepare, quantize
from calibration.graph import opset


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("version", [9, *range(11, 23)])
def test_function_is_unchanged_for_every_opset(version: int, images: np.ndarray) -> None:
    """A CNN of any opset computes the same after preparation, at opset 13 or newer, without its norms."""
    model = make_residual_cnn(version)
    prepared = prepare(model)
    assert opset(prepared) == max(version, 13)
    assert "BatchNormalization" not in operators(prepared)
    np.testing.assert_allclose(
        run(prepared, {"image": images})[0], run(model, {"image": images})[0], rtol=1e-4, atol=1e-5
    )


def test_attention_is_unchanged(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """A text layer computes the same after preparation."""
    np.testing.assert_allclose(run(prepare(attention), tokens)[0], run(attention, tokens)[0], atol=1e-5)


def test_preparing_twice_changes_nothing(residual_cnn: ModelProto) -> None:
    """Preparation is deterministic, and a prepared model comes back as it is."""
    once = prepare(residual_cnn)
    assert prepare(once).SerializeToString() == once.SerializeToString()
    assert prepare(residual_cnn).SerializeToString() == once.SerializeToString()


def test_the_callers_model_is_untouched(residual_cnn: ModelProto) -> None:
    """The model that was given stays as it was."""
    before = residual_cnn.SerializeToString()
    prepare(residual_cnn)
    assert residual_cnn.SerializeToString() == before


def test_a_norm_whose_input_has_other_readers_stays() -> None:
    """A norm is not fused where something else reads the convolution's output too."""
    rng = np.random.default_rng(0)
    names = ("gamma", "beta", "mean", "var")
    constants = {name: rng.uniform(0.5, 1.5, 4).astype(np.float32) for name in names}
    constants["w"] = rng.normal(0, 1, (4, 2, 1, 1)).astype(np.float32)
    model = build(
        [
            helper.make_node("Conv", ["x", "w"], ["c"]),
            helper.make_node("BatchNormalization", ["c", *names], ["n"]),
            helper.make_node("Add", ["c", "n"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [1, 2, 3, 3])},
        {"y": [1, 4, 3, 3]},
        constants,
    )
    feed = {"x": rng.normal(0, 1, (1, 2, 3, 3)).astype(np.float32)}
    prepared = prepare(model)
    assert operators(prepared)["BatchNormalization"] == 1
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-6)


def test_a_weight_shared_by_two_normed_convolutions() -> None:
    """Two convolutions with one weight and different norms each get a weight of their own."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(0, 1, (3, 3, 1, 1)).astype(np.float32)}
    nodes = []
    source = "x"
    for i in range(2):
        names = [f"{part}{i}" for part in ("gamma", "beta", "mean", "var")]
        constants |= {name: rng.uniform(0.5, 1.5, 3).astype(np.float32) for name in names}
        nodes.append(helper.make_node("Conv", [source, "w"], [f"c{i}"]))
        nodes.append(helper.make_node("BatchNormalization", [f"c{i}", *names], [f"n{i}"]))
        source = f"n{i}"
    model = build(nodes, {"x": (TensorProto.FLOAT, [1, 3, 4, 4])}, {"n1": [1, 3, 4, 4]}, constants)
    feed = {"x": rng.normal(0, 1, (1, 3, 4, 4)).astype(np.float32)}
    prepared = prepare(model)
    assert operators(prepared) == {"Conv": 2}
    np.testing.assert_allclose(run(prepared, feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-6)


def test_constants_and_identities_are_folded() -> None:
    """Arithmetic on constants is done once, and Identity and Dropout are gone."""
    model = build(
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Mul", ["w", "two"], ["w2"]),
            helper.make_node("Transpose", ["w2"], ["wt"]),
            helper.make_node("Identity", ["x"], ["same"]),
            helper.make_node("MatMul", ["same", "wt"], ["m"]),
            helper.make_node("Dropout", ["m"], ["d"]),
            helper.make_node("Relu", ["d"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["n", 3])},
        {"y": ["n", 2]},
        {"w": np.arange(6, dtype=np.float32).reshape(2, 3)},
    )
    feed = {"x": np.ones((1, 3), np.float32)}
    prepared = prepare(model)
    assert operators(prepared) == {"MatMul": 1, "Relu": 1}
    np.testing.assert_array_equal(run(prepared, feed)[0], run(model, feed)[0])


@pytest.mark.parametrize("half_first", [True, False])
def test_gelu_keeps_its_values_in_either_spelling(half_first: bool) -> None:
    """The spelling of GELU that runtimes fuse gives the values of the one that exporters write."""
    last = ["half", "one_plus"] if half_first else ["x", "one_plus"]
    model = build(
        [
            helper.make_node("Div", ["x", "root"], ["d"]),
            helper.make_node("Erf", ["d"], ["e"]),
            helper.make_node("Add", ["e", "one"], ["one_plus"]),
            helper.make_node("Mul", last, ["m"]),
            helper.make_node("Mul", ["m", "x" if half_first else "half"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["n", 8])},
        {"y": ["n", 8]},
        {
            name: np.array(value, np.float32)
            for name, value in (("root", 2**0.5), ("one", 1.0), ("half", 0.5))
        },
    )
    feed = {"x": np.linspace(-6, 6, 64, dtype=np.float32).reshape(8, 8)}
    np.testing.assert_allclose(run(prepare(model), feed)[0], run(model, feed)[0], rtol=1e-5, atol=1e-6)


def test_functions_are_inlined() -> None:
    """A product inside a local function is seen and quantized like any other."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    product = helper.make_function("local", "Product", ["a", "b"], ["c"], body, opsets[:1])
    graph = helper.make_graph(
        [helper.make_node("Product", ["x", "w"], ["y"], domain="local")],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")],
    )
    model = helper.make_model(graph, functions=[product], opset_imports=opsets, ir_version=8)
    scales = calibrate(model, [{"x": np.ones((1, 3), np.float32)}])
    assert quantize(model, scales).report.int8_macs_fraction == 1.0


def test_quantized_models_are_refused(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """A model that is quantized already is refused by the name of a quantized node."""
    int8 = quantize(residual_cnn, calibrate(residual_cnn, [{"image": images}])).model
    del int8.metadata_props[:]
    with pytest.raises(CalibrationError, match="quantized already"):
        prepare(int8)


def test_every_node_gets_a_name_of_its_own() -> None:
    """Nodes without a name, or with one that is taken, get one: exclusions go by name."""
    model = build(
        [
            helper.make_node("Relu", ["x"], ["a"], name="same"),
            helper.make_node("Relu", ["a"], ["b"], name="same"),
            helper.make_node("Relu", ["b"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, [1])},
        {"y": [1]},
        {},
    )
    names = [node.name for node in prepare(model).graph.node]
    assert len(set(names)) == 3
    assert all(names)


def test_an_opset_that_cannot_be_upgraded_is_refused() -> None:
    """A model so old that its operators cannot be converted is refused by its opset, with what to do."""
    node = helper.make_node("Add", ["x", "b"], ["y"], broadcast=1, axis=1)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    bias = numpy_helper.from_array(np.ones(2, np.float32), "b")
    graph = helper.make_graph([node], "old", ends[:1], ends[1:], [bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 5)], ir_version=4)
    with pytest.raises(CalibrationError, match="opset 5 is too old") as caught:
        prepare(model)
    assert "opset 13 or newer" in caught.value.fix
