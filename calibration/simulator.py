"""Running a Q/DQ graph in exact integers, without a runtime's kernels.

Between a DequantizeLinear and the QuantizeLinear that follows, a Conv, MatMul or Gemm is a sum of integer
products. Here it is computed as one, in int64, so that the result is what the scales mean and nothing else;
a runtime's integer kernels have to agree within one step, whatever their instructions.

Small graphs only: this is arithmetic to check against, not to serve with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from calibration.affine import Affine, dequantize, quantize, spread
from calibration.errors import CalibrationError
from calibration.graph import Array, array, attribute, integer
from calibration.session import run_node

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Levels:
    """A tensor between DequantizeLinear and its reader: still the integers, with what they mean."""

    values: npt.NDArray[np.integer]
    affine: Affine

    def real(self) -> npt.NDArray[np.float32]:
        return dequantize(self.values, self.affine)

    def centered(self) -> Integers:
        """The integers with zero at 0."""
        zero_point = spread(self.affine.zero_point, self.values.ndim, self.affine.axis)
        return self.values.astype(np.int64) - zero_point.astype(np.int64)


def simulate(model: ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of a Q/DQ graph: integers as they are, the others as float.

    Args:
        model: from ``quantize``, for any target.
        inputs: by name.

    Raises:
        CalibrationError: an operator cannot be run alone.
    """
    simulation = _Simulation(model, inputs)
    for node in model.graph.node:
        simulation.step(node)
    return {
        name: value.real() if isinstance(value, _Levels) else value
        for name, value in simulation.tensors.items()
    }


class _Simulation:
    def __init__(self, model: ModelProto, inputs: Mapping[str, Array]) -> None:
        self._model = model
        self.tensors: dict[str, Array | _Levels] = {t.name: array(t) for t in model.graph.initializer}
        self.tensors.update(inputs)

    def step(self, node: NodeProto) -> None:
        """Run one node on the tensors so far."""
        if node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif node.op_type == "DequantizeLinear":
            values = self._array(node.input[0])
            if not np.issubdtype(values.dtype, np.integer):
                raise TypeError(f"{node.input[0]} is not an integer tensor")
            self.tensors[node.output[0]] = _Levels(values, self._affine(node))  # type: ignore[arg-type]
        elif node.op_type in _PRODUCTS and all(self._is_levels(name) for name in node.input[:2]):
            self.tensors[node.output[0]] = self._product(node)
        else:
            self._float(node)

    def _quantize(self, node: NodeProto) -> None:
        values = self._array(node.input[0]).astype(np.float32, copy=False)
        self.tensors[node.output[0]] = quantize(values, self._affine(node))

    def _affine(self, node: NodeProto) -> Affine:
        scale = self._array(node.input[1]).astype(np.float32)
        zero_point = self._array(node.input[2])
        axis = integer(node, "axis", 1) if scale.ndim else None
        return Affine(scale, zero_point.astype(zero_point.dtype), axis)

    def _product(self, node: NodeProto) -> npt.NDArray[np.float32]:
        left, right = (self._levels(name) for name in node.input[:2])
        total = _PRODUCTS[node.op_type](node, left.centered(), right.centered())
        axis = 1 if node.op_type == "Conv" else total.ndim - 1
        unit = left.affine.scale.astype(np.float64) * right.affine.scale.astype(np.float64)
        bias = self.tensors.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if isinstance(bias, _Levels):  # int32, in the unit of the sum
            total = total + spread(bias.values, total.ndim, axis).astype(np.int64)
        real: npt.NDArray[np.float32] = (total * spread(unit, total.ndim, axis)).astype(np.float32)
        if isinstance(bias, np.ndarray):
            real = real + spread(bias, total.ndim, axis).astype(np.float32)
        return real

    def _float(self, node: NodeProto) -> None:
        reads = {name: self._array(name) for name in node.input if name}
        try:
            self.tensors.update(run_node(self._model, node, reads))
        except (RuntimeError, ValueError) as error:
            raise CalibrationError(
                f"node {node.name!r} cannot be simulated",
                str(error).strip().splitlines()[0],
                "simulate a graph of standard operators without bodies",
            ) from error

    def _is_levels(self, name: str) -> bool:
        return isinstance(self.tensors[name], _Levels)

    def _levels(self, name: str) -> _Levels:
        value = self.tensors[name]
        if not isinstance(value, _Levels):
            raise TypeError(f"{name} is not quantized")
        return value

    def _array(self, name: str) -> Array:
        value = self.tensors[name]
        return value.real() if isinstance(value, _Levels) else value


def _matmul(node: NodeProto, left: Integers, right: Integers) -> Integers:
    del node  # it has no settings
    product: Integers = np.matmul(left, right)
    return product


def _gemm(node: NodeProto, left: Integers, right: Integers) -> Integers:
    return _matmul(node, left, right.T if integer(node, "transB", 0) else right)


def _conv(node: NodeProto, source: Integers, weight: Integers) -> Integers:
    """A grouped convolution over any number of spatial axes."""
    kernel = weight.shape[2:]
    rank = len(kernel)
    strides, dilations = (_list(node, name, [1] * rank) for name in ("strides", "dilations"))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    source = np.pad(source, [(0, 0), (0, 0), *_pads(node, source.shape[2:], reach, strides)])
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(source, reach, axis=axes)
    steps = tuple(slice(None, None, step) for step in (1, 1, *strides, *dilations))
    windows = windows[steps]
    group = integer(node, "group", 1)
    parts = zip(np.split(windows, group, axis=1), np.split(weight, group, axis=0), strict=True)
    window_axes = [1, *range(2 + rank, 2 + 2 * rank)]
    sums = [np.tensordot(part, kernels, (window_axes, range(1, 2 + rank))) for part, kernels in parts]
    return np.moveaxis(np.concatenate(sums, axis=-1), -1, 1)


def _pads(
    node: NodeProto, sizes: tuple[int, ...], reach: list[int], strides: list[int]
) -> list[tuple[int, int]]:
    rank = len(sizes)
    mode = attribute(node, "auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        totals = [
            max((-(-size // step) - 1) * step + span - size, 0)
            for size, span, step in zip(sizes, reach, strides, strict=True)
        ]
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if mode == b"SAME_UPPER" else [(after, before) for before, after in halves]
    pads = _list(node, "pads", [0] * (2 * rank))
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _list(node: NodeProto, name: str, default: list[int]) -> list[int]:
    value = attribute(node, name, default)
    return value if isinstance(value, list) else default


_PRODUCTS = {"Conv": _conv, "MatMul": _matmul, "Gemm": _gemm}
