"""A model as its clients see it: tensors, limits, and what a request asks of it. Pure; no transport.

HTTP and gRPC carry the same requests in different clothes. Each reads its own form into the mapping that the
protocol's "Inference Request JSON Object" describes, and the checks are made here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Hashable, Mapping, Optional, Sequence, Tuple

import numpy as np

from device_agent.manifest import TensorSpec
from device_agent.server.classification import checked_count, classify
from device_agent.server.fields import (
    ProtocolError,
    SharedPart,
    is_size,
    object_field,
    priority,
    shared_part,
    shown,
    timeout_s,
)
from device_agent.tensors import Buffer, TensorError, decode_binary

Arrays = Dict[str, "np.ndarray[Any, Any]"]
Shape = Tuple[int, ...]
ViewShared = Callable[[str, int, int], memoryview]


@dataclass(frozen=True)
class OutputWish:
    """An output that the client wants: raw, as JSON, or put into shared memory.

    Attributes:
        name: the output.
        binary: whether raw.
        shared: where to put it; None: into the answer.
        classes: how many of its best classes are wanted in place of its values; 0: the values.
    """

    name: str
    binary: bool
    shared: Optional[SharedPart] = None
    classes: int = 0


@dataclass(frozen=True)
class RequestHead:
    """What a request says besides its data, checked against the model.

    Attributes:
        shapes: of each input.
        shared: where in shared memory an input lies; inputs that the request carries itself are not in it.
        rows: size along the batch axis.
        batch_key: requests with equal keys may share a run.
        outputs: what to answer, in this order.
        timeout_s: longest wait for the engine; None: no limit.
        priority: 1 is the highest; 0: the model's default.
        openings: what answers to it began with, by the shapes and sizes of the outputs; a cache.
    """

    shapes: Mapping[str, Shape]
    shared: Mapping[str, SharedPart]
    rows: int
    batch_key: Hashable
    outputs: Tuple[OutputWish, ...]
    timeout_s: Optional[float]
    priority: int = 0
    openings: Dict[Hashable, bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class InferRequest:
    """A checked request.

    Attributes:
        id: the client's own name for it, to be echoed; None: it gave none.
        inputs: an array for each input of the model.
        head: everything else.
    """

    id: Optional[str]
    inputs: Arrays
    head: RequestHead


class ModelInterface:
    """One model version: names, tensors and limits, and the checks of requests against them."""

    def __init__(
        self,
        name: str,
        version: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        max_batch_size: int,
        labels: Optional[Mapping[str, Sequence[str]]] = None,
    ) -> None:
        """Describe a model.

        Args:
            name: what clients call it.
            version: likewise.
            inputs: its input tensors.
            outputs: its output tensors.
            max_batch_size: most rows in a request; 0: the first axis is no batch.
            labels: names of classes, by output.
        """
        self.name = name
        self.version = version
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        self.max_batch_size = max_batch_size
        self._labels = labels or {}

    def check(
        self,
        parameters: Mapping[str, Any],
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
    ) -> RequestHead:
        """Check what a request says besides its data.

        Args:
            parameters: of the whole request.
            inputs: an object for each input: name, datatype, shape, parameters.
            outputs: an object for each wanted output: name, parameters; empty: all are wanted.

        Raises:
            ProtocolError: 400, naming what is wrong.
        """
        if parameters.get("sequence_id") not in (None, 0, ""):
            raise ProtocolError(400, f"model '{self.name}' keeps no state between requests: no sequence_id")
        shapes = self._shapes(inputs)
        places = {item["name"]: _place(item) for item in inputs}
        return RequestHead(
            shapes=shapes,
            shared={name: place for name, place in places.items() if place is not None},
            rows=self._rows(shapes),
            batch_key=tuple((name, shapes[name][1:]) for name in self.inputs),
            outputs=self._wishes(outputs, parameters.get("binary_data_output") is True),
            timeout_s=timeout_s(parameters),
            priority=priority(parameters),
        )

    def answer_of(self, wish: OutputWish, outputs: Arrays) -> Tuple[str, np.ndarray[Any, Any]]:
        """What answers a wish: the datatype of a tensor, and its values."""
        spec, array = self.outputs[wish.name], outputs[wish.name]
        if not wish.classes:
            return spec.dtype, array
        batched = self.max_batch_size > 0 and spec.shape[:1] == (-1,)
        return "BYTES", classify(array, wish.classes, self._labels.get(wish.name, ()), batched)

    # Inputs

    def _shapes(self, items: Sequence[Mapping[str, Any]]) -> Dict[str, Shape]:
        given = [item.get("name") for item in items]
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise ProtocolError(
                400, f"model '{self.name}' needs the input '{missing[0]}', which is not given"
            )
        shapes: Dict[str, Shape] = {}
        for item in items:
            name, shape = self._checked_input(item)
            if name in shapes:
                raise ProtocolError(400, f"input '{name}' is given twice")
            shapes[name] = shape
        return shapes

    def _checked_input(self, item: Mapping[str, Any]) -> Tuple[str, Shape]:
        name = item.get("name")
        spec = self.inputs.get(name) if isinstance(name, str) else None
        if spec is None:
            raise ProtocolError(
                400, f"model '{self.name}' has no input {shown(name)}; it has {sorted(self.inputs)}"
            )
        if item.get("datatype") != spec.dtype:
            raise ProtocolError(400, f"input '{name}' is {spec.dtype}, not {shown(item.get('datatype'))}")
        shape = item.get("shape")
        if not isinstance(shape, list) or not all(map(is_size, shape)):
            raise ProtocolError(400, f"input '{name}' has no valid shape")
        if not _matches(shape, spec.shape):
            raise ProtocolError(
                400, f"input '{name}' has shape {shown(shape)}; the model takes {list(spec.shape)}"
            )
        return spec.name, tuple(shape)

    def _rows(self, shapes: Mapping[str, Shape]) -> int:
        batched = {name: shape[0] for name, shape in shapes.items() if self.inputs[name].shape[:1] == (-1,)}
        if not batched or self.max_batch_size == 0:
            return 1
        if len(set(batched.values())) != 1:
            raise ProtocolError(400, f"the inputs differ along the batch axis: {batched}")
        rows = next(iter(batched.values()))
        if not 1 <= rows <= self.max_batch_size:
            raise ProtocolError(
                400, f"model '{self.name}' takes batches of 1 to {self.max_batch_size}, not {rows}"
            )
        return rows

    # Outputs

    def _wishes(self, items: Sequence[Mapping[str, Any]], binary_by_default: bool) -> Tuple[OutputWish, ...]:
        if not items:
            return tuple(OutputWish(name, binary_by_default) for name in self.outputs)
        wishes = tuple(self._wish(item, binary_by_default) for item in items)
        if len({wish.name for wish in wishes}) != len(wishes):
            raise ProtocolError(400, "an output is asked for twice")  # or, with patience, a million times
        return wishes

    def _wish(self, item: Mapping[str, Any], binary_by_default: bool) -> OutputWish:
        name = item.get("name")
        if not isinstance(name, str) or name not in self.outputs:
            raise ProtocolError(
                400, f"model '{self.name}' has no output {shown(name)}; it has {sorted(self.outputs)}"
            )
        parameters = object_field(item, "parameters", f"output '{name}'")
        classes = checked_count(name, self.outputs[name].dtype, parameters.get("classification"))
        shared = shared_part(parameters, f"output '{name}'")
        if classes and shared is not None:
            raise ProtocolError(400, f"output '{name}': classification is not put into shared memory")
        binary = parameters.get("binary_data", binary_by_default)
        if not isinstance(binary, bool):
            raise ProtocolError(400, f"output '{name}': binary_data is not true or false")
        return OutputWish(name, binary, shared, classes)


def _place(item: Mapping[str, Any]) -> Optional[SharedPart]:
    where = f"input '{item['name']}'"
    return shared_part(object_field(item, "parameters", where), where)


def _matches(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(want in (-1, got) for got, want in zip(shape, expected))


# Data


def no_shared_memory(region: str, offset: int, byte_size: int) -> memoryview:
    """What a protocol without shared memory answers to every region."""
    raise ProtocolError(400, f"shared memory region {shown(region)} is not registered")


def decode_raw(name: str, datatype: str, shape: Shape, data: memoryview) -> np.ndarray[Any, Any]:
    """View an input's raw bytes as an array.

    Raises:
        ProtocolError: 400: there are more or fewer bytes than its shape needs.
    """
    try:
        return decode_binary(datatype, shape, data)
    except TensorError as error:
        raise ProtocolError(400, f"input '{name}' {error}") from error


def put_shared(name: str, part: SharedPart, data: Buffer, view_shared: ViewShared) -> None:
    """Copy an output's raw bytes to where the client wants them.

    Raises:
        ProtocolError: 400: they do not fit, or there is no such place.
    """
    if len(data) > part.byte_size:
        raise ProtocolError(400, f"output '{name}' has {len(data)} bytes, its shared memory {part.byte_size}")
    view_shared(part.region, part.offset, len(data))[:] = data
