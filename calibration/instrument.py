"""Adding outputs to a model that show what passes through it."""

from __future__ import annotations

from onnx import ModelProto, TensorProto, helper

from calibration.graph import Names
from calibration.storage import detach


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

    def _add(self, kind: str, tensor: str, dtype: int, **attributes: int) -> str:
        output = self._names.fresh(f"{tensor}_{kind}")
        node = helper.make_node(kind, [tensor], [output], name=output)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.model.graph.node.append(node)
        self.model.graph.output.append(helper.make_tensor_value_info(output, dtype, None))
        return output
