"""Lowering: older operators, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_graphs import graph, images, one
from onnx import ModelProto, TensorProto, helper

from edgekit import ort, profile
from edgekit.errors import BadInput
from edgekit.lowering.lower import lower, prove
from edgekit.lowering.tables import dla_for_profile, for_profile

TABLES = {
    name: for_profile(profile.load(name)) for name in ("jetson-agx-xavier", "jetson-agx-orin", "jetson-thor")
}
OLDEST = TABLES["jetson-agx-xavier"]


def operators(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def weights(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).uniform(0.5, 1.5, shape).astype(np.float32)


CASES = {
    "LayerNormalization": one("LayerNormalization", ["n", 6, 8], {"s": weights(8), "b": weights(8)}),
    "two axes": one("LayerNormalization", ["n", 6, 8], {"s": weights(6, 8)}, axis=1, epsilon=1e-3),
    "GroupNormalization": one(
        "GroupNormalization", ["n", 8, 6, 6], {"s": weights(8), "b": weights(8)}, num_groups=2, opset=21
    ),
    "Gelu": one("Gelu", ["n", 8]),
    "Gelu by tanh": one("Gelu", ["n", 8], approximate="tanh"),
    "Mish": one("Mish", ["n", 8]),
    "RMSNormalization": one("RMSNormalization", ["n", 8], {"s": weights(8)}, opset=23),
    "cubic": one(
        "Resize", [2, 3, 6, 8],
        {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 1.5], np.float32)}, mode="cubic",
    ),
    "antialias": one(
        "Resize", [2, 3, 8, 8],
        {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 0.5, 0.5], np.float32)},
        mode="linear", antialias=1,
    ),
    "ReduceMean": one("ReduceMean", ["n", 4, 8], {"axes": np.array([1, 2])}, keepdims=0),
    "ReduceMean of none": one("ReduceMean", ["n", 4], {"a": np.zeros(0, np.int64)}, noop_with_empty_axes=1),
    "GridSample": graph(
        [helper.make_node("GridSample", ["x", "g"], ["y"], name="it", mode="linear")],
        {"x": (TensorProto.FLOAT, ["n", 2, 5, 5])}, {"y": None},
        {"g": np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 2)).astype(np.float32)},
    ),
    "uneven Split": graph(
        [
            helper.make_node("Split", ["x"], ["a", "b"], name="it", axis=1, num_outputs=2),
            helper.make_node("Concat", ["b", "a"], ["y"], name="join", axis=1),
        ],
        {"x": (TensorProto.FLOAT, ["n", 7])}, {"y": None},
    ),
    "capitals": graph(
        [helper.make_node("Einsum", ["x", "w"], ["y"], name="it", equation="Bi,iJ->BJ")],
        {"x": (TensorProto.FLOAT, ["n", 8])}, {"y": None}, {"w": weights(8, 3)},
    ),
    "inside an If": graph(
        [
            helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
            helper.make_node("Greater", ["sum", "zero"], ["positive"], name="test"),
            helper.make_node(
                "If", ["positive"], ["y"], name="choice",
                then_branch=helper.make_graph([helper.make_node("Gelu", ["x"], ["t"], name="g")], "then", [],
                    [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]),
                else_branch=helper.make_graph([helper.make_node("Mish", ["x"], ["e"], name="m")], "else", [],
                    [helper.make_tensor_value_info("e", TensorProto.FLOAT, None)]),
            ),
        ],
        {"x": (TensorProto.FLOAT, ["n", 8])}, {"y": None}, {"zero": np.zeros((), np.float32)},
    ),
}  # fmt: skip


#: Sizes are free, so there is no constant matrix to take the place of the interpolation.
FREE_RESIZE = one(
    "Resize", ["n", 1, "h", "w"], {"r": np.zeros(0, np.float32), "s": np.ones(4, np.float32)}, mode="cubic"
)


@pytest.mark.parametrize("name", CASES)
def test_the_oldest_parser_gets_what_it_knows_and_the_numbers_stay(name: str) -> None:
    """For TensorRT 8.5 every case ends in opset 17 or less and its operators, and computes the same."""
    model = CASES[name]
    lowered = lower(model, OLDEST)
    assert lowered.refused == ()
    assert lowered.changes
    assert lowered.model.opset_import[0].version <= 17
    shape = [2 if isinstance(size, str) else size for size in _input_shape(model)]
    assert prove(model, lowered.model, [{"x": images(*shape)}]) < 1e-5


def _input_shape(model: ModelProto) -> list[Any]:
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    return [size.dim_param or size.dim_value for size in sizes]


def test_a_graph_that_is_too_old_is_brought_up_to_date() -> None:
    """Parsers read opset 9 and newer; an older graph is converted, and computes the same."""
    model = one("Softmax", [2, 8], axis=1, opset=7)
    lowered = lower(model, TABLES["jetson-thor"])
    assert lowered.changes == ("opset 7 brought up to 13",)
    assert lowered.refused == ()
    assert prove(model, lowered.model, [{"x": images(2, 8)}]) == 0


def test_a_newer_parser_keeps_what_it_has() -> None:
    """LayerNormalization stays one operator where the parser has it; Gelu goes for 10.3 and stays for 11."""
    normal, gelu = CASES["LayerNormalization"], CASES["Gelu"]
    assert lower(normal, TABLES["jetson-agx-orin"]).model is normal
    assert "Gelu" not in operators(lower(gelu, TABLES["jetson-agx-orin"]).model)
    assert lower(gelu, TABLES["jetson-thor"]).changes == ()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3),
    st.sampled_from(["half_pixel", "output_half_pixel"]), st.integers(16, 20),
)  # fmt: skip
def test_regions_are_aligned_without_the_plugin(
    seed: int, batch: int, size: int, samples: int, transformation: str, opset: int
) -> None:
    """For TensorRT-RTX, whose RoiAlign needs a GPU to be read; regions may be tiny, turned or outside."""
    rng = np.random.default_rng(seed)
    model = graph(
        [
            helper.make_node(
                "RoiAlign", ["x", "regions", "owners"], ["y"], name="it", output_height=size, output_width=2,
                sampling_ratio=samples, spatial_scale=0.5, coordinate_transformation_mode=transformation,
            )
        ],
        {"x": (TensorProto.FLOAT, ["n", 2, 7, 5]), "regions": (TensorProto.FLOAT, ["r", 4]),
         "owners": (TensorProto.INT64, ["r"])},
        {"y": None},
        opset=opset,
    )  # fmt: skip
    lowered = lower(model, for_profile(profile.load("rtx-4000-ada")))
    assert lowered.changes == ("RoiAlign taken apart (1)",)
    assert lowered.refused == ()
    feed = {
        "x": rng.normal(size=(batch, 2, 7, 5)).astype(np.float32),
        "regions": rng.uniform(-8, 24, (6, 4)).astype(np.float32),
        "owners": rng.integers(0, batch, 6),
    }
    assert prove(model, lowered.model, [feed]) < 1e-5


def test_the_given_model_is_never_changed() -> None:
    """Lowering works on a copy."""
    model = CASES["GroupNormalization"]
    before = model.SerializeToString()
    lower(model, OLDEST)
    assert model.SerializeToString() == before


def test_64_bit_inputs_and_constants_become_what_the_parser_makes_of_them() -> None:
    """Token numbers come in as int32; a constant beyond 32 bits is cut, and the slice stays the same."""
    model = graph(
        [
            helper.make_node("Gather", ["table", "tokens"], ["rows"], name="embed"),
            helper.make_node("Slice", ["rows", "one", "end", "one"], ["y"], name="cut"),
        ],
        {"tokens": (TensorProto.INT64, ["n", "t"])},
        {"y": None},
        {"table": weights(50, 4), "one": np.array([1]), "end": np.array([np.iinfo(np.int64).max])},
        opset=17,
    )
    lowered = lower(model, OLDEST)
    assert lowered.model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT32
    assert {"input tokens is int32", "constant end cut to 32 bits"} <= set(lowered.changes)
    assert prove(model, lowered.model, [{"tokens": np.arange(12).reshape(2, 6)}]) == 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (one("BitShift", ["n"], direction="LEFT"), "BitShift is not among its operators"),
        (one("Det", ["n", 3, 3]), "Det is not among its operators"),
        (one("DynamicQuantizeLinear", ["n", 3]), "not among its operators"),
        (one("PRelu", ["n", 3, 8], {"slope": weights(3)}, opset=17), "do not broadcast"),
        (one("MaxPool", ["n", 3, 8], opset=17, kernel_shape=[2], dilations=[2]), "no dilated pooling"),
        (FREE_RESIZE, "nearest or linear, not cubic"),
    ],
)  # fmt: skip
def test_what_cannot_be_lowered_is_named(model: ModelProto, said: str) -> None:
    """An operator without a rule stays, and is reported with its node and the reason."""
    (refused,) = lower(model, OLDEST).refused
    assert refused.node == "it"
    assert said in refused.why


def test_an_opset_that_cannot_be_lowered_is_named() -> None:
    """Where the older opset does not have what a node uses, that is said, and no graph is made up."""
    model = one(
        "Pad", ["n", 4], {"pads": np.array([1, 1]), "v": np.array(0, np.float32), "axes": np.array([1])}
    )
    (refused,) = lower(model, OLDEST).refused
    assert "Pad takes 3 inputs in opset 13" in refused.why


def test_a_wrong_graph_is_never_passed_off_as_the_same() -> None:
    """The proof is a computation: a graph that differs is refused."""
    with pytest.raises(BadInput, match="does not compute the same"):
        prove(CASES["Gelu"], CASES["Mish"], [{"x": images(2, 8)}])


@settings(max_examples=15)
@given(
    st.lists(
        st.sampled_from(["Gelu", "Mish", "LayerNormalization", "Relu", "ReduceMax"]), min_size=1, max_size=5
    ),
    st.integers(18, 20),
)
def test_any_chain_of_rules_computes_the_same(kinds: list[str], opset: int) -> None:
    """Rules compose: whatever operators follow one another, the lowered graph agrees with the original."""
    nodes, constants = [], {"scale": weights(8), "axes": np.array([-1])}
    for i, kind in enumerate(kinds):
        kind = "Relu" if kind == "Gelu" and opset < 20 else kind
        extra = {"LayerNormalization": ["scale"], "ReduceMax": ["axes"]}.get(kind, [])
        output = "y" if i == len(kinds) - 1 else f"t{i}"
        middle = f"m{i}" if kind == "ReduceMax" else output
        nodes.append(helper.make_node(kind, ["x" if i == 0 else f"t{i - 1}", *extra], [middle], name=f"n{i}"))
        if kind == "ReduceMax":
            source = "x" if i == 0 else f"t{i - 1}"
            nodes.append(helper.make_node("Sub", [source, middle], [output], name=f"s{i}"))
    model = graph(nodes, {"x": (TensorProto.FLOAT, ["n", 8])}, {"y": None}, constants, opset)
    lowered = lower(model, OLDEST)
    assert lowered.refused == ()
    prove(model, lowered.model, [{"x": images(3, 8)}])
    ort.Session(lowered.model.SerializeToString())


def test_a_dla_is_known_where_tensorrt_reaches_it() -> None:
    """Xavier's DLA runs fewer operators than Orin's; TensorRT 11.4 reaches AGX Orin's only; Nano has none."""
    xavier = dla_for_profile(profile.load("jetson-agx-xavier"))
    orin = dla_for_profile(profile.load("jetson-agx-orin"))
    assert xavier is not None
    assert orin is not None
    assert xavier.operators < orin.operators
    names = ("jetson-agx-orin-jp7", "jetson-orin-nx-jp7", "jetson-orin-nano", "jetson-thor", "x86-cpu")
    reached = [name for name in names if dla_for_profile(profile.load(name)) is not None]
    assert reached == ["jetson-agx-orin-jp7"]
