"""Adding outputs to a model that show what passes through it."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration.graph import Names
from calibration.storage import detach

#: Beyond the end of every tensor.
_END = 2**62


class Instrument:
    """A copy of a model that returns only what is asked for here.

    Attributes:
        detached: the copy, for ``open_session``.
    """

    def __init__(self, model: ModelProto) -> None:
        self.detached = detach(model)
        self.model = self.detached.model
        del self.model.graph.output[:]
        self._names = Names(model)
        self._constants: dict[tuple[int, ...], str] = {}

    def values(self, tensor: str) -> str:
        """Return the tensor itself."""
        self.model.graph.output.append(helper.make_empty_tensor_value_info(tensor))
        return tensor

    def size(self, tensor: str) -> str:
        """Return how many values it has; the name of that output."""
        return self._add("Size", tensor, TensorProto.INT64)

    def shape(self, tensor: str) -> str:
        """Return its shape; the name of that output."""
        return self._add("Shape", tensor, TensorProto.INT64)

    def reduce(self, kind: str, tensor: str) -> str:
        """Return one number, by ReduceMin, ReduceMax or ReduceSum; the name of that output."""
        return self._add(kind, tensor, TensorProto.FLOAT, keepdims=0)

    def every(self, tensor: str, step: int) -> str:
        """Return every ``step``-th of its values in memory order; the name of that output."""
        flat = self._node("Reshape", [tensor, self._constant([-1])])
        bounds = [self._constant(numbers) for numbers in ([0], [_END], [0], [step])]
        return self._returned(self._node("Slice", [flat, *bounds]), TensorProto.FLOAT)

    def lattice(self, tensor: str, stride: int) -> str:
        """Return what stands at every ``stride``-th row and column of an image; the name of that output.

        A pooling window of one value copies it, and ONNX Runtime pools in its own blocked layout.
        """
        return self._add("MaxPool", tensor, TensorProto.FLOAT, kernel_shape=[1, 1], strides=[stride, stride])

    def largest_of_channels(self, tensor: str) -> str:
        """Return the largest value of each channel of an image; the name of that output."""
        return self._add("GlobalMaxPool", tensor, TensorProto.FLOAT)

    def _add(self, kind: str, tensor: str, dtype: int, **attributes: int | list[int]) -> str:
        return self._returned(self._node(kind, [tensor], **attributes), dtype)

    def _node(self, kind: str, inputs: list[str], **attributes: int | list[int]) -> str:
        output = self._names.fresh(f"{inputs[0]}_{kind}")
        node = helper.make_node(kind, inputs, [output], name=output)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.model.graph.node.append(node)
        return output

    def _constant(self, numbers: list[int]) -> str:
        key = tuple(numbers)
        if key not in self._constants:
            self._constants[key] = self._names.fresh(f"calibration_{'_'.join(map(str, numbers))}")
            tensor = numpy_helper.from_array(np.array(numbers, np.int64), self._constants[key])
            self.model.graph.initializer.append(tensor)
        return self._constants[key]

    def _returned(self, output: str, dtype: int) -> str:
        self.model.graph.output.append(helper.make_tensor_value_info(output, dtype, None))
        return output
