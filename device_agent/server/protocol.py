"""The Open Inference Protocol v2 over HTTP, without I/O: a request body in, the parts of an answer out.

Follows the protocol's "Inference Request JSON Object", "Inference Response JSON Object" and the binary tensor
data extension: JSON first, then the raw tensors in the order of the JSON, with the length of the JSON in the
header ``Inference-Header-Content-Length``. Content types are never looked at: real clients send none, or the
wrong one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np

from device_agent.manifest import TensorSpec
from device_agent.server.fields import (
    ProtocolError,
    SharedPart,
    binary_size,
    id_field,
    load_json,
    object_field,
    objects_field,
)
from device_agent.server.interface import (
    Arrays,
    InferRequest,
    ModelInterface,
    RequestHead,
    ViewShared,
    decode_raw,
    no_shared_memory,
    put_shared,
)
from device_agent.tensors import (
    NUMPY_DTYPES,
    Buffer,
    TensorError,
    decode_json,
    element_count,
    encode_binary,
    encode_json,
)

_CACHED_PLANS = 64
_CACHED_OPENINGS = 8  # for each plan; the shapes of most outputs follow from those of the inputs
_CACHED_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Answer:
    """An answer to an inference request.

    Attributes:
        parts: buffers to send one after the other.
        json_bytes: length of the JSON in front; None: there is nothing but JSON.
    """

    parts: List[Buffer]
    json_bytes: Optional[int]


@dataclass(frozen=True)
class _RawTensor:
    """Where an input lies: behind the JSON, or in shared memory.

    Attributes:
        name: the input.
        datatype: as the protocol calls it.
        shape: of the tensor.
        start, stop: where its data lies behind the JSON.
        shared: where in shared memory.
        viewed_as: how its data behind the JSON can be viewed at once; None: it must be looked at first.
    """

    name: str
    datatype: str
    shape: Tuple[int, ...]
    start: int
    stop: int
    shared: Optional[SharedPart]
    viewed_as: Optional[np.dtype[Any]]


@dataclass(frozen=True)
class _Plan:
    """What the JSON of a request says, checked against the model."""

    id: Optional[str]
    head: RequestHead
    raw: Tuple[_RawTensor, ...]
    raw_bytes: int
    arrays: Mapping[str, np.ndarray[Any, Any]]


#: Shape of an output; and the size of its raw data, or what stands in its place in the JSON.
_Described = Tuple[Tuple[int, ...], Union[int, str]]


class ModelProtocol:
    """Requests and answers of one model version.

    A client that asks for the same shapes again sends the same JSON before its raw tensors; what that JSON
    means is then taken from a small cache.
    """

    def __init__(self, interface: ModelInterface, view_shared: ViewShared = no_shared_memory) -> None:
        """Speak for a model.

        Args:
            interface: the model.
            view_shared: gives the bytes of a part of a shared memory region, or raises ProtocolError.
        """
        self.interface = interface
        self._view_shared = view_shared
        self._plans: Dict[bytes, _Plan] = {}
        self._names = {name: json.dumps(name) for name in interface.outputs}
        self._about = (
            f'{{"model_name":{json.dumps(interface.name)},"model_version":{json.dumps(interface.version)},'
        )

    # Requests

    def decode(self, body: memoryview, json_bytes: Optional[int]) -> InferRequest:
        """Check an inference request and view its tensors.

        Args:
            body: the whole body; the arrays of the result may be views on it.
            json_bytes: value of ``Inference-Header-Content-Length``; None: the body is all JSON.

        Raises:
            ProtocolError: 400, naming what is wrong.
        """
        if json_bytes is not None and json_bytes > len(body):
            raise ProtocolError(
                400, f"the header announces {json_bytes} bytes of JSON in a body of {len(body)}"
            )
        head = bytes(body if json_bytes is None else body[:json_bytes])
        plan = self._plans.get(head)
        if plan is None:
            plan = self._plan(load_json(head, "the request"))
            if plan.raw and not plan.arrays and len(head) <= _CACHED_HEAD_BYTES:
                self._remember(head, plan)
        tail = body[len(head) :]
        if len(tail) != plan.raw_bytes:
            raise ProtocolError(
                400,
                f"{len(tail)} bytes follow the JSON, which announces {plan.raw_bytes} bytes of binary data",
            )
        inputs = dict(plan.arrays)
        for tensor in plan.raw:
            inputs[tensor.name] = self._view(tensor, tail)
        return InferRequest(plan.id, inputs, plan.head)

    def _view(self, tensor: _RawTensor, tail: memoryview) -> np.ndarray[Any, Any]:
        if tensor.viewed_as is not None:
            array: np.ndarray[Any, Any] = np.ndarray(tensor.shape, tensor.viewed_as, tail, tensor.start)
            return array if array.flags.aligned else array.copy()
        if tensor.shared is None:
            data = tail[tensor.start : tensor.stop]
        else:
            data = self._view_shared(tensor.shared.region, tensor.shared.offset, tensor.shared.byte_size)
        return decode_raw(tensor.name, tensor.datatype, tensor.shape, data)

    def _remember(self, head: bytes, plan: _Plan) -> None:
        if len(self._plans) >= _CACHED_PLANS:
            self._plans.clear()
        self._plans[head] = plan

    def _plan(self, request: Mapping[str, Any]) -> _Plan:
        items = objects_field(request, "inputs")
        head = self.interface.check(
            object_field(request, "parameters", "the request"),
            items,
            objects_field(request, "outputs") if request.get("outputs") is not None else [],
        )
        raw: List[_RawTensor] = []
        arrays: Arrays = {}
        position = 0
        for item in items:
            spec = self.interface.inputs[item["name"]]
            shape, shared = head.shapes[spec.name], head.shared.get(spec.name)
            parameters = object_field(item, "parameters", f"input '{spec.name}'")
            size = 0 if shared else binary_size(item, parameters, spec.name)
            if size is None:
                arrays[spec.name] = _decode_data(spec, shape, item)
            else:
                view = None if shared else _view_of(spec.dtype, shape, size)
                raw.append(_RawTensor(spec.name, spec.dtype, shape, position, position + size, shared, view))
                position += size
        return _Plan(id_field(request), head, tuple(raw), position, arrays)

    # Answers

    def encode(self, request: InferRequest, outputs: Arrays) -> Answer:
        """Write the answer to ``request``.

        Raises:
            ProtocolError: 400 where a wanted output has no JSON form.
        """
        described: List[_Described] = []
        buffers: List[Buffer] = []
        cached = True
        for wish in request.head.outputs:
            datatype, array = self.interface.answer_of(wish, outputs)
            if wish.shared is not None:
                put_shared(wish.name, wish.shared, encode_binary(datatype, array), self._view_shared)
                # As Triton: NVIDIA's C++ client takes any parameters for those of binary data that follows.
                described.append((array.shape, ""))
            elif wish.binary:
                data = encode_binary(datatype, array)
                buffers.append(data)
                described.append((array.shape, len(data)))
            else:
                cached = False
                described.append((array.shape, f',"data":{_dump_data(wish.name, datatype, array)}'))
        opening = self._cached_opening(request, described) if cached else self._opening(request, described)
        return Answer([opening, *buffers], len(opening) if buffers else None)

    def _cached_opening(self, request: InferRequest, described: List[_Described]) -> bytes:
        openings, key = request.head.openings, tuple(described)
        opening = openings.get(key)
        if opening is None:
            opening = self._opening(request, described)
            if len(openings) < _CACHED_OPENINGS:
                openings[key] = opening
        return opening

    def _opening(self, request: InferRequest, described: List[_Described]) -> bytes:
        """The JSON of an answer."""
        entries: List[str] = []
        for wish, (sizes, content) in zip(request.head.outputs, described):
            datatype = "BYTES" if wish.classes else self.interface.outputs[wish.name].dtype
            shape = ",".join(map(str, sizes))
            if isinstance(content, int):
                content = f',"parameters":{{"binary_data_size":{content}}}'
            entries.append(
                f'{{"name":{self._names[wish.name]},"datatype":"{datatype}","shape":[{shape}]{content}}}'
            )
        echo = "" if request.id is None else f'"id":{json.dumps(request.id)},'
        return f'{self._about}{echo}"outputs":[{",".join(entries)}]}}'.encode()


def _view_of(datatype: str, shape: Tuple[int, ...], byte_size: int) -> Optional[np.dtype[Any]]:
    """How raw data can be viewed as it is; None: it is of another kind, empty, or of the wrong size."""
    dtype = NUMPY_DTYPES[datatype]
    plain = datatype != "BYTES" and 0 < byte_size == element_count(shape) * dtype.itemsize
    return dtype if plain else None


# JSON data


def _decode_data(spec: TensorSpec, shape: Tuple[int, ...], item: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    if "data" not in item:
        raise ProtocolError(400, f"input '{spec.name}' has neither data nor binary_data_size")
    try:
        return decode_json(spec.dtype, shape, item["data"])
    except TensorError as error:
        raise ProtocolError(400, f"input '{spec.name}' {error}") from error


def _dump_data(name: str, datatype: str, array: np.ndarray[Any, Any]) -> str:
    try:
        return json.dumps(encode_json(datatype, array), separators=(",", ":"))
    except TensorError as error:
        raise ProtocolError(400, f"output '{name}' {error}") from error
