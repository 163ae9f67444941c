"""Writing Q/DQ pairs into a graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from calibration.affine import Affine, bias_s32, quantize, weight_s8
from calibration.eligibility import weight_axis
from calibration.graph import LINEAR, Index, Names, array, drop_unused_constants, rename_reads, replace_nodes
from calibration.layouts import Placement
from calibration.scales import Scales
from calibration.storage import Detached, attach, detach
from calibration.targets import Target


def write_qdq(
    model: ModelProto, scales: Scales, placement: Placement, target: Target, *, weight_levels: int
) -> ModelProto:
    """A copy of a prepared model with Q/DQ pairs at the places of ``placement``.

    Args:
        model: from ``prepare``.
        scales: has every root tensor of ``placement``.
        placement: from ``place``.
        target: decides about biases.
        weight_levels: largest integer in a weight, 127 or 63.
    """
    detached = detach(model)  # a weight that is replaced is never copied
    result = detached.model
    writer = _Writer(detached, scales, placement, target, weight_levels)
    writer.write()
    drop_unused_constants(result.graph)
    attach(result, detached.weights)
    return result


class _Writer:
    def __init__(
        self, detached: Detached, scales: Scales, placement: Placement, target: Target, weight_levels: int
    ) -> None:
        self._graph: GraphProto = detached.model.graph
        self._weights = detached.weights
        self._index = Index(detached.model)
        self._names = Names(detached.model)
        self._scales = scales
        self._placement = placement
        self._target = target
        self._weight_levels = weight_levels
        self._parameters: dict[str, tuple[str, str]] = {}
        self._constants: dict[tuple[object, ...], str] = {}
        self._before: dict[str, list[NodeProto]] = {}
        self._made: dict[str, list[str]] = {}

    def write(self) -> None:
        for node in self._graph.node:
            if node.name in self._placement.quantized:
                self._quantize_weights(node)
        after = {name: self._pair(name) for name in self._placement.tensors}
        if self._target.shields_float_layers:
            self._shield({nodes[-1].output[0] for nodes in after.values()})
        ordered: list[NodeProto] = []
        for name in (value.name for value in self._graph.input):
            ordered.extend(after.get(name, ()))
        for node in self._graph.node:
            ordered.extend(self._before.get(node.name, ()))
            ordered.append(node)
            for name in self._made.get(node.name, node.output):
                ordered.extend(after.get(name, ()))
        replace_nodes(self._graph, ordered)

    def activation(self, tensor: str) -> Affine:
        """How a tensor of the placement is quantized."""
        found = self._scales.tensors[self._placement.tensors[tensor]]
        return self._target.activation(found.lo, found.hi)

    def _pair(self, tensor: str) -> list[NodeProto]:
        """The Q and DQ nodes that follow a tensor; its readers are pointed at them."""
        root = self._placement.tensors[tensor]
        if root not in self._parameters:
            self._parameters[root] = self._store(root, self.activation(tensor))
        scale, zero_point = self._parameters[root]
        closed = tensor in self._placement.closed
        if closed and tensor in self._index.outputs:
            source, dequantized = self._rename_product(tensor), tensor
        else:
            source, dequantized = tensor, self._names.fresh(f"{tensor}_dequantized")
            readers = [n for n in self._index.readers.get(tensor, []) if closed or self._is_int8(n)]
            rename_reads(readers, tensor, dequantized)
        integers = self._names.fresh(f"{tensor}_quantized")
        quantizer = self._node("QuantizeLinear", [source, scale, zero_point], integers)
        return [quantizer, self._node("DequantizeLinear", [integers, scale, zero_point], dequantized)]

    def _shield(self, dequantized: set[str]) -> None:
        """Keep the layers that stay in float out of the runtime's reach.

        ONNX Runtime quantizes the float weight of a Conv, ConvTranspose or Gemm whose input comes straight
        from a DequantizeLinear, with one scale for the whole weight (its WeightBiasQuantization pass). A
        Sum of one term stands between them: it is a copy, and no pass removes it.
        """
        for node in self._graph.node:
            float_layer = node.op_type in LINEAR and node.name not in self._placement.quantized
            if float_layer and node.op_type != "MatMul" and node.input[0] in dequantized:
                copy = self._names.fresh(f"{node.input[0]}_shielded")
                self._before.setdefault(node.name, []).append(self._node("Sum", [node.input[0]], copy))
                node.input[0] = copy

    def _is_int8(self, node: NodeProto) -> bool:
        return node.name in self._placement.quantized or node.name in self._placement.joined

    def _rename_product(self, tensor: str) -> str:
        """Give a graph output's producer another name for it, so that the DQ can bear the output's."""
        renamed = self._names.fresh(f"{tensor}_float")
        node = self._index.producer[tensor]
        self._made.setdefault(node.name, list(node.output))
        for i, name in enumerate(node.output):
            if name == tensor:
                node.output[i] = renamed
        return renamed

    def _quantize_weights(self, node: NodeProto) -> None:
        """Point a linear node at its quantized weight and bias."""
        weight_name = node.input[1]
        if weight_name not in self._index.constants:
            return
        weight = self._values(weight_name)
        source = self.activation(node.input[0])
        bias_name = node.input[2] if len(node.input) > 2 else ""
        bias = None
        if bias_name and self._target.integer_bias:
            bias = self._values(bias_name).reshape(-1)
        affine = weight_s8(
            weight,
            weight_axis(node, weight.ndim),
            levels=self._weight_levels,
            bias=bias,
            input_scale=float(source.scale),
        )
        node.input[1] = self._constant(node, weight_name, weight, affine)
        if bias is not None:
            bias_affine = bias_s32(source.scale, affine)
            node.input[2] = self._constant(node, bias_name, bias, bias_affine)

    def _values(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self._weights.get(name, self._index.constants[name])
        return array(tensor).astype(np.float32, copy=False)

    def _constant(self, node: NodeProto, name: str, values: np.ndarray, affine: Affine) -> str:
        """Store a quantized constant with its DQ before its first reader; equal ones are shared."""
        key = (name, affine.scale.tobytes(), affine.axis)
        if key not in self._constants:
            scale, zero_point = self._store(name, affine)
            integers = self._names.fresh(f"{name}_quantized")
            output = self._names.fresh(f"{name}_dequantized")
            attributes = {} if affine.axis is None else {"axis": affine.axis}
            before = self._before.setdefault(node.name, [])
            if self._target.float_weights:
                before.append(self._node("QuantizeLinear", [name, scale, zero_point], integers, attributes))
            else:
                self._graph.initializer.append(numpy_helper.from_array(quantize(values, affine), integers))
            before.append(self._node("DequantizeLinear", [integers, scale, zero_point], output, attributes))
            self._constants[key] = output
        return self._constants[key]

    def _store(self, name: str, affine: Affine) -> tuple[str, str]:
        scale, zero_point = self._names.fresh(f"{name}_scale"), self._names.fresh(f"{name}_zero_point")
        self._graph.initializer.append(numpy_helper.from_array(affine.scale, scale))
        self._graph.initializer.append(numpy_helper.from_array(affine.zero_point, zero_point))
        return scale, zero_point

    def _node(
        self, kind: str, inputs: list[str], output: str, attributes: Mapping[str, int] | None = None
    ) -> NodeProto:
        node = helper.make_node(kind, inputs, [output], name=output)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in (attributes or {}).items())
        return node
