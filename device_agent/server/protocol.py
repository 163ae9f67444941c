"""The Open Inference Protocol v2 over HTTP, without I/O: a request body in, the parts of an answer out.

Follows the protocol's "Inference Request JSON Object", "Inference Response JSON Object" and the binary tensor
data extension: JSON first, then the raw tensors in the order of the JSON, with the length of the JSON in the
header ``Inference-Header-Content-Length``. Content types are never looked at: real clients send none, or the
wrong one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

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
from device_agent.tensors import Buffer, TensorError, decode_json, encode_binary, encode_json

_CACHED_PLANS = 64
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
    """Where an input lies: behind the JSON, or in shared memory."""

    name: str
    datatype: str
    shape: Tuple[int, ...]
    start: int
    stop: int
    shared: Optional[SharedPart]


@dataclass(frozen=True)
class _Plan:
    """What the JSON of a request says, checked against the model."""

    id: Optional[str]
    head: RequestHead
    raw: Tuple[_RawTensor, ...]
    raw_bytes: int
    arrays: Mapping[str, np.ndarray[Any, Any]]


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
        self._opening = (
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
            inputs[tensor.name] = decode_raw(
                tensor.name, tensor.datatype, tensor.shape, self._raw_data(tensor, tail)
            )
        return InferRequest(plan.id, inputs, plan.head)

    def _raw_data(self, tensor: _RawTensor, tail: memoryview) -> memoryview:
        if tensor.shared is None:
            return tail[tensor.start : tensor.stop]
        return self._view_shared(tensor.shared.region, tensor.shared.offset, tensor.shared.byte_size)

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
                raw.append(_RawTensor(spec.name, spec.dtype, shape, position, position + size, shared))
                position += size
        return _Plan(id_field(request), head, tuple(raw), position, arrays)

    # Answers

    def encode(self, request: InferRequest, outputs: Arrays) -> Answer:
        """Write the answer to ``request``.

        Raises:
            ProtocolError: 400 where a wanted output has no JSON form.
        """
        entries: List[str] = []
        buffers: List[Buffer] = []
        for wish in request.head.outputs:
            datatype, array = self.interface.answer_of(wish, outputs)
            if wish.shared is not None:
                put_shared(wish.name, wish.shared, encode_binary(datatype, array), self._view_shared)
                # As Triton: NVIDIA's C++ client takes any parameters for those of binary data that follows.
                content = ""
            elif wish.binary:
                data = encode_binary(datatype, array)
                buffers.append(data)
                content = f',"parameters":{{"binary_data_size":{len(data)}}}'
            else:
                content = f',"data":{_dump_data(wish.name, datatype, array)}'
            shape = ",".join(map(str, array.shape))
            entries.append(
                f'{{"name":{self._names[wish.name]},"datatype":"{datatype}","shape":[{shape}]{content}}}'
            )
        echo = "" if request.id is None else f'"id":{json.dumps(request.id)},'
        head = f'{self._opening}{echo}"outputs":[{",".join(entries)}]}}'.encode()
        return Answer([head, *buffers], len(head) if buffers else None)


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
