"""Latency against channels: each linear layer timed alone at several widths, on the device itself.

Kernels work in blocks of channels, so time falls in steps. A layer is timed at a few widths of its outputs
and of its inputs; between them its time is interpolated, and the two are taken to be independent:

    time(outputs, inputs) = time(all, all) x share(outputs) x share(inputs)

Where the device cannot be reached, the points come from the roofline of its profile instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.measure.device import Device, Timed
from edgekit.measure.roofline import operator_ms
from edgekit.measure.work import Operator
from edgekit.profile import Profile

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Shares of a layer's width at which it is timed.
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
_RUNS, _WARMUP = 15, 3
_NAMES = ("x", "w", "y")


@dataclass(frozen=True)
class Layer:
    """A convolution or a product with weights, and what it is given for one sample.

    Attributes:
        outputs, inputs: channels.
        groups: of a convolution; 1 for a product.
        kernel, stride, padding, dilation: of a convolution; empty for a product.
        size: the input's axes behind the channels; of a product, the number of its rows.
    """

    outputs: int
    inputs: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...]

    def cut(self, outputs: int, inputs: int) -> Layer:
        """The layer with other widths; a depthwise convolution stays one."""
        if self.groups == 1:
            return replace(self, outputs=outputs, inputs=inputs)
        each = self.inputs // self.groups
        groups = max(1, min(outputs, inputs) // max(1, each))
        return replace(
            self, outputs=groups * max(1, self.outputs // self.groups), inputs=groups * each, groups=groups
        )

    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return math.prod(self._output_size()) * self.outputs * self._per_output()

    def operator(self) -> Operator:
        """Its work, for the roofline."""
        weights = self.outputs * self._per_output()
        moved = weights + self.inputs * math.prod(self.size) + self.outputs * math.prod(self._output_size())
        return Operator(
            "", "Conv" if self.kernel else "MatMul", self.macs(), 4 * moved, "fp32", self._per_output()
        )

    def graph(self) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
        """The layer alone as a serialized ONNX model, and an input for it."""
        from onnx import TensorProto, helper, numpy_helper

        random = np.random.default_rng(0)
        if self.kernel:
            source = (1, self.inputs, *self.size)
            weight = (self.outputs, self.inputs // self.groups, *self.kernel)
            node = helper.make_node(
                "Conv", _NAMES[:2], _NAMES[2:], group=self.groups, strides=self.stride,
                pads=[*self.padding, *self.padding], dilations=self.dilation,
            )  # fmt: skip
        else:
            source, weight = (*self.size, self.inputs), (self.inputs, self.outputs)
            node = helper.make_node("MatMul", _NAMES[:2], _NAMES[2:])
        result = (1, self.outputs, *self._output_size()) if self.kernel else (*self.size, self.outputs)
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, source)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, result)
        weights = numpy_helper.from_array(random.normal(size=weight).astype(np.float32), "w")
        model = helper.make_model(
            helper.make_graph([node], "layer", [x], [y], [weights]),
            opset_imports=[helper.make_opsetid("", 13)],
        )
        model.ir_version = 8
        return model.SerializeToString(), {"x": random.normal(size=source).astype(np.float32)}

    def _per_output(self) -> int:
        return self.inputs // self.groups * math.prod(self.kernel)

    def _output_size(self) -> tuple[int, ...]:
        if not self.kernel:
            return self.size
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )


#: Width -> share of the time at full width.
Steps = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class LayerTimes:
    """A layer's time at its full widths, and how it falls with either."""

    full_ms: float
    by_outputs: Steps
    by_inputs: Steps

    def ms(self, outputs: int, inputs: int) -> float:
        """Time at these widths, interpolated."""
        return self.full_ms * _share(self.by_outputs, outputs) * _share(self.by_inputs, inputs)


@dataclass(frozen=True)
class LatencyModel:
    """A model's latency against the widths of its layers.

    Attributes:
        layers: module name -> its times.
        how: ``measured on ...`` or ``roofline of ...``.
    """

    layers: Mapping[str, LayerTimes]
    how: str

    @property
    def full_ms(self) -> float:
        """Of the unchanged model's layers, in fp32."""
        return sum(layer.full_ms for layer in self.layers.values())

    def share(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Latency with some layers at other widths, as a share of the unchanged model's.

        Args:
            widths: module name -> (outputs, inputs); layers that are left out are whole.
        """
        full = self.full_ms
        cut = sum(
            layer.ms(*widths[name]) if name in widths else layer.full_ms
            for name, layer in self.layers.items()
        )
        return cut / full if full else 1.0

    def as_json(self) -> dict[str, Any]:
        """The form that artifacts keep; ``from_json`` reads it."""
        return {
            "how": self.how,
            "layers": {
                name: [layer.full_ms, [list(s) for s in layer.by_outputs], [list(s) for s in layer.by_inputs]]
                for name, layer in self.layers.items()
            },
        }


def from_json(document: Mapping[str, Any]) -> LatencyModel:
    """Read what ``as_json`` gave."""
    return LatencyModel(
        {
            name: LayerTimes(full, tuple((w, s) for w, s in outputs), tuple((w, s) for w, s in inputs))
            for name, (full, outputs, inputs) in document["layers"].items()
        },
        document["how"],
    )


def layers(module: nn.Module, example: Sequence[Tensor]) -> dict[str, Layer]:
    """The layers that a model runs, by name, as they are met in one run.

    Args:
        module: in eval mode.
        example: an input of one sample.
    """
    import torch
    from torch import nn

    found: dict[str, Layer] = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(layer: Any, inputs: tuple[Any, ...], _output: Any) -> None:
            found[name] = (
                _linear(layer, inputs[0]) if isinstance(layer, nn.Linear) else _conv(layer, inputs[0])
            )

        return remember

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    hooks = [
        layer.register_forward_hook(hook(name))
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and _is_plain(layer)
    ]
    try:
        with torch.no_grad():
            module(*example)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def measure(found: Mapping[str, Layer], device: Device, threads: int, alignment: int) -> LatencyModel:
    """Time every layer at several widths on a device, each different one once."""
    points = {name: _points(layer, alignment) for name, layer in found.items()}
    distinct = dict.fromkeys(one for point in points.values() for side in point for _, one in side)
    graphs = {}
    for number, layer in enumerate(distinct):
        graph, inputs = layer.graph()
        graphs[str(number)] = Timed(graph, inputs)
    timed = device.time(graphs, runs=_RUNS, warmup=_WARMUP, threads=threads) if graphs else {}
    times = {layer: timed[str(number)].p50 for number, layer in enumerate(distinct)}
    where = next(iter(timed.values())).where if timed else "nothing"
    models = {name: _times(point, times.__getitem__) for name, point in points.items()}
    return LatencyModel(models, f"measured on {where}")


def predicted(found: Mapping[str, Layer], profile: Profile, alignment: int) -> LatencyModel:
    """The same from a profile's figures, for a device that cannot be reached."""
    return LatencyModel(
        {
            name: _times(_points(layer, alignment), lambda one: operator_ms(one.operator(), profile))
            for name, layer in found.items()
        },
        f"roofline of {profile.name}",
    )


Points = tuple[list[tuple[int, Layer]], list[tuple[int, Layer]]]


def _points(layer: Layer, alignment: int) -> Points:
    """(outputs, layer) and (inputs, layer) at several widths, the full one first."""
    if layer.groups > 1:  # inputs and outputs go together, and are told by the outputs
        return [(width, layer.cut(width, width)) for width in _widths(layer.outputs, alignment)], []
    return (
        [(width, layer.cut(width, layer.inputs)) for width in _widths(layer.outputs, alignment)],
        [(width, layer.cut(layer.outputs, width)) for width in _widths(layer.inputs, alignment)],
    )


def _widths(full: int, alignment: int) -> list[int]:
    wanted = (max(1, round(full * share)) for share in SHARES)
    return list(dict.fromkeys(min(full, math.ceil(width / alignment) * alignment) for width in wanted))


def _times(points: Points, ms: Callable[[Layer], float]) -> LayerTimes:
    by_outputs, by_inputs = points
    full_ms = ms(by_outputs[0][1])
    return LayerTimes(full_ms, _falling(by_outputs, ms, full_ms), _falling(by_inputs, ms, full_ms))


def _falling(points: Iterable[tuple[int, Layer]], ms: Callable[[Layer], float], full_ms: float) -> Steps:
    """Shares by width, none above the share of a wider layer: noise makes no narrower layer slower."""
    steps, least = [], 1.0
    for width, layer in points:
        least = min(least, ms(layer) / full_ms)
        steps.append((width, least))
    return tuple(steps)


def _share(steps: Steps, width: int) -> float:
    if not steps:
        return 1.0
    widths, shares = zip(*sorted((*steps, (0, 0.0))), strict=True)
    return float(np.interp(width, widths, shares))


def _is_plain(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "zeros") == "zeros" and not isinstance(
        getattr(layer, "padding", ()), str
    )


def _linear(layer: Any, given: Tensor) -> Layer:
    rows = max(1, given.numel() // given.shape[-1])
    return Layer(layer.out_features, layer.in_features, 1, (), (), (), (), (rows,))


def _conv(layer: Any, given: Tensor) -> Layer:
    return Layer(
        layer.out_channels, layer.in_channels, layer.groups, layer.kernel_size, layer.stride, layer.padding,
        layer.dilation, tuple(given.shape[2:]),
    )  # fmt: skip
