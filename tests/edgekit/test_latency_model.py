"""Latency that is predicted: the work of a graph, the roofline, and the staircase of a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from edgekit import profile
from edgekit.measure import roofline, staircase, work
from edgekit.measure.device import THIS_MACHINE, Timed
from edgekit.measure.staircase import LatencyModel, LayerTimes

CPU = profile.load("x86-cpu")


def _graph(quantized: bool = False) -> tuple[onnx.ModelProto, dict[str, Any]]:
    weight = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Softmax", ["r"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 6, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 6, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model, {"x": np.zeros((1, 3, 6, 4), np.float32)}


def test_a_graph_s_work_is_what_is_counted_by_hand() -> None:
    """Arithmetic and traffic of each operator; an activation moves nothing of its own."""
    conv, softmax = work.operators(*_graph())
    assert (conv.kind, conv.macs, conv.per_output) == ("Conv", 6 * 4 * 8 * 27, 27)
    assert conv.moved_bytes == 4 * (3 * 24 + 8 * 27 + 8 * 24)
    assert (softmax.kind, softmax.macs, softmax.moved_bytes) == ("Softmax", 0, 4 * 2 * 8 * 24)


def test_int8_moves_bytes_and_computes_in_int8() -> None:
    """The Q/DQ pairs of an INT8 graph cost nothing; what they surround reads and writes a byte a value."""
    from calibration import calibrate, quantize

    model, example = _graph()
    int8 = quantize(model, calibrate(model, [example])).model
    conv = next(operator for operator in work.operators(int8, example) if operator.kind == "Conv")
    assert conv.precision == "int8"
    assert conv.macs == 6 * 4 * 8 * 27
    assert conv.moved_bytes == 3 * 24 + 8 * 27 + 4 * 8 * 24  # Softmax reads float


def test_the_roofline_is_bound_by_arithmetic_or_traffic() -> None:
    """More arithmetic takes longer where it binds, more bytes where they do; the range holds the value."""

    def ms(macs: int, moved: int, precision: Any = "fp32") -> float:
        return roofline.operator_ms(work.Operator("", "Conv", macs, moved, precision, 576), CPU)

    assert ms(2 * 10**9, 1) == pytest.approx(2 * ms(10**9, 1), rel=0.01)
    assert ms(1, 2 * 10**9) == pytest.approx(2 * ms(1, 10**9), rel=0.01)
    assert ms(10**9, 10**6, "int8") < ms(10**9, 10**6)
    found = roofline.predict(work.operators(*_graph()), CPU)
    assert 0 < found.low_ms < found.value_ms < found.high_ms


class Net(nn.Module):
    """A convolution, a depthwise one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.depthwise(self.conv(x)).mean(dim=(2, 3)))
        return y


def _layers() -> dict[str, staircase.Layer]:
    return staircase.layers(Net().eval(), (torch.zeros(1, 3, 8, 8),))


def test_layers_are_those_that_ran_and_compute_what_torch_does() -> None:
    """Shapes as they were met; each alone as a graph gives an output of the right size."""
    found = _layers()
    assert [found["conv"].macs(), found["depthwise"].macs(), found["head"].macs()] == [
        64 * 32 * 27, 64 * 32 * 9, 320,
    ]  # fmt: skip
    for layer in (*found.values(), found["depthwise"].cut(16, 16)):
        graph, inputs = layer.graph()
        from edgekit import ort

        output = ort.Session(graph).run(inputs)["y"]
        assert output.shape[1 if layer.kernel else -1] == layer.outputs
        onnx.checker.check_model(onnx.load_from_string(graph))


def test_a_staircase_is_measured_on_the_device_and_kept_as_json() -> None:
    """Whole is 1, narrower is never more, and what was kept says the same."""
    model = staircase.measure(_layers(), THIS_MACHINE, 1, 8)
    assert model.how.startswith("measured on this host")
    assert model.share({}) == 1
    assert model.share({"conv": (32, 3), "head": (10, 32)}) == pytest.approx(1)
    assert model.share({"conv": (8, 3), "depthwise": (8, 1), "head": (10, 8)}) <= 1
    assert staircase.from_json(model.as_json()) == model


def test_without_the_device_the_profile_s_roofline_stands_in() -> None:
    """The same questions get answers, which name the profile."""
    model = staircase.predicted(_layers(), CPU, 8)
    assert model.how == "roofline of x86-cpu"
    assert model.share({"conv": (8, 3)}) < 1


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_layer_s_time_falls_with_its_widths(outputs: int, inputs: int) -> None:
    """Between the measured widths time is interpolated, and no narrower layer takes longer."""
    times = LayerTimes(2.0, ((64, 1.0), (32, 0.6), (16, 0.5)), ((64, 1.0), (32, 0.5)))
    model = LatencyModel({"a": times}, "by hand")
    share = model.share({"a": (outputs, inputs)})
    assert 0 <= share <= 1
    assert model.share({"a": (max(1, outputs - 1), inputs)}) <= share + 1e-12
    assert times.ms(32, 32) == pytest.approx(2.0 * 0.6 * 0.5)


def test_graphs_are_timed_in_turns_on_this_machine(tmp_path: Path) -> None:
    """A file and a serialized model, each with its own input, in one measurement."""
    model, example = _graph()
    onnx.save(model, str(tmp_path / "m.onnx"))
    graphs = {"file": Timed(tmp_path / "m.onnx", example), "bytes": Timed(model.SerializeToString(), example)}
    timed = THIS_MACHINE.time(graphs, runs=12, warmup=1, threads=1)
    assert {name: figures.runs for name, figures in timed.items()} == {"file": 12, "bytes": 12}
    assert len(THIS_MACHINE.digest) == 64
