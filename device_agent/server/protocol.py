"""The Open Inference Protocol v2 over HTTP, without I/O: a request body in, the parts of an answer out.

Follows the protocol's "Inference Request JSON Object", "Inference Response JSON Object" and the binary tensor
data extension: JSON first, then the raw tensors in the order of the JSON, with the length of the JSON in the
header ``Inference-Header-Content-Length``. Content types are never looked at: real clients send none, or the
wrong one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Dict, Hashable, List, Mapping, Optional, Sequence, Tuple

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
    shared_part,
    timeout_s,
)
from device_agent.tensors import (
    Buffer,
    TensorError,
    decode_binary,
    decode_json,
    encode_binary,
    encode_json,
)

Arrays = Dict[str, "np.ndarray[Any, Any]"]

_CACHED_PLANS = 64
_CACHED_HEAD_BYTES = 4096


@dataclass(frozen=True)
class OutputWish:
    """An output that the client wants: raw, as JSON, or put into shared memory."""

    name: str
    binary: bool
    shared: Optional[SharedPart] = None


@dataclass(frozen=True)
class InferRequest:
    """A checked request.

    Attributes:
        id: the client's own name for it, to be echoed; None: it gave none.
        inputs: an array for each input of the model.
        rows: size along the batch axis.
        batch_key: requests with equal keys may share a run.
        outputs: what to answer, in this order.
        timeout_s: longest wait for the engine; None: no limit.
    """

    id: Optional[str]
    inputs: Arrays
    rows: int
    batch_key: Hashable
    outputs: Tuple[OutputWish, ...]
    timeout_s: Optional[float]


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
    shared: Optional[SharedPart] = None


@dataclass(frozen=True)
class _Plan:
    """What the JSON of a request says, checked against the model."""

    id: Optional[str]
    raw: Tuple[_RawTensor, ...]
    raw_bytes: int
    arrays: Mapping[str, np.ndarray[Any, Any]]
    rows: int
    batch_key: Hashable
    outputs: Tuple[OutputWish, ...]
    timeout_s: Optional[float]


ViewShared = Callable[[str, int, int], memoryview]


def no_shared_memory(region: str, offset: int, byte_size: int) -> memoryview:
    """What a protocol without shared memory answers to every region."""
    raise ProtocolError(400, f"shared memory region '{region}' is not registered")


class ModelProtocol:
    """Requests and answers of one model version.

    A client that asks for the same shapes again sends the same JSON before its raw tensors; what that JSON
    means is then taken from a small cache.
    """

    def __init__(
        self,
        name: str,
        version: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        max_batch_size: int,
        view_shared: ViewShared = no_shared_memory,
    ) -> None:
        """Describe a model.

        Args:
            name: what clients call it.
            version: likewise.
            inputs: its input tensors.
            outputs: its output tensors.
            max_batch_size: most rows in a request.
            view_shared: gives the bytes of a part of a shared memory region, or raises ProtocolError.
        """
        self.name = name
        self.version = version
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        self.max_batch_size = max_batch_size
        self._view_shared = view_shared
        self._plans: Dict[bytes, _Plan] = {}
        self._output_openings = {
            spec.name: f'{{"name":{json.dumps(spec.name)},"datatype":"{spec.dtype}","shape":['
            for spec in outputs
        }
        self._opening = f'{{"model_name":{json.dumps(name)},"model_version":{json.dumps(version)},'

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
            inputs[tensor.name] = _decode_raw(tensor, self._raw_data(tensor, tail))
        return InferRequest(plan.id, inputs, plan.rows, plan.batch_key, plan.outputs, plan.timeout_s)

    def _raw_data(self, tensor: _RawTensor, tail: memoryview) -> memoryview:
        if tensor.shared is None:
            return tail[tensor.start : tensor.stop]
        return self._view_shared(tensor.shared.region, tensor.shared.offset, tensor.shared.byte_size)

    def _remember(self, head: bytes, plan: _Plan) -> None:
        if len(self._plans) >= _CACHED_PLANS:
            self._plans.clear()
        self._plans[head] = plan

    def _plan(self, request: Mapping[str, Any]) -> _Plan:
        parameters = object_field(request, "parameters", "the request")
        if parameters.get("sequence_id") not in (None, 0, ""):
            raise ProtocolError(400, f"model '{self.name}' keeps no state between requests: no sequence_id")
        raw: List[_RawTensor] = []
        arrays: Arrays = {}
        shapes: Dict[str, Tuple[int, ...]] = {}
        position = 0
        for item in self._input_objects(request):
            spec, shape = self._checked_input(item, shapes)
            shapes[spec.name] = shape
            where = object_field(item, "parameters", f"input '{spec.name}'")
            shared = shared_part(where, f"input '{spec.name}'")
            size = 0 if shared else binary_size(item, where, spec.name)
            if size is None:
                arrays[spec.name] = _decode_data(spec, shape, item)
            else:
                raw.append(_RawTensor(spec.name, spec.dtype, shape, position, position + size, shared))
                position += size
        rows = self._rows(shapes)
        return _Plan(
            id=id_field(request),
            raw=tuple(raw),
            raw_bytes=position,
            arrays=arrays,
            rows=rows,
            batch_key=tuple((name, shapes[name][1:]) for name in self.inputs),
            outputs=self._wishes(request, parameters.get("binary_data_output") is True),
            timeout_s=timeout_s(parameters),
        )

    def _input_objects(self, request: Mapping[str, Any]) -> List[Mapping[str, Any]]:
        items = objects_field(request, "inputs")
        names = [item.get("name") for item in items]
        missing = [name for name in self.inputs if name not in names]
        if missing:
            raise ProtocolError(
                400, f"model '{self.name}' needs the input '{missing[0]}', which is not given"
            )
        return items

    def _checked_input(
        self, item: Mapping[str, Any], seen: Mapping[str, Tuple[int, ...]]
    ) -> Tuple[TensorSpec, Tuple[int, ...]]:
        name = item.get("name")
        spec = self.inputs.get(name) if isinstance(name, str) else None
        if spec is None:
            raise ProtocolError(
                400, f"model '{self.name}' has no input {name!r}; it has {sorted(self.inputs)}"
            )
        if name in seen:
            raise ProtocolError(400, f"input '{name}' is given twice")
        if item.get("datatype") != spec.dtype:
            raise ProtocolError(400, f"input '{name}' is {spec.dtype}, not {item.get('datatype')!r}")
        shape = item.get("shape")
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise ProtocolError(400, f"input '{name}' has no valid shape")
        if not _matches(shape, spec.shape):
            raise ProtocolError(400, f"input '{name}' has shape {shape}; the model takes {list(spec.shape)}")
        return spec, tuple(shape)

    def _rows(self, shapes: Mapping[str, Tuple[int, ...]]) -> int:
        batched = {name: shape[0] for name, shape in shapes.items() if self.inputs[name].shape[:1] == (-1,)}
        if not batched:
            return 1
        if len(set(batched.values())) != 1:
            raise ProtocolError(400, f"the inputs differ along the batch axis: {batched}")
        rows = next(iter(batched.values()))
        if not 1 <= rows <= self.max_batch_size:
            raise ProtocolError(
                400, f"model '{self.name}' takes batches of 1 to {self.max_batch_size}, not {rows}"
            )
        return rows

    def _wishes(self, request: Mapping[str, Any], binary_by_default: bool) -> Tuple[OutputWish, ...]:
        items = objects_field(request, "outputs") if request.get("outputs") is not None else []
        if not items:
            return tuple(OutputWish(name, binary_by_default) for name in self.outputs)
        return tuple(self._wish(item, binary_by_default) for item in items)

    def _wish(self, item: Mapping[str, Any], binary_by_default: bool) -> OutputWish:
        name = item.get("name")
        if not isinstance(name, str) or name not in self.outputs:
            raise ProtocolError(
                400, f"model '{self.name}' has no output {name!r}; it has {sorted(self.outputs)}"
            )
        parameters = object_field(item, "parameters", f"output '{name}'")
        if parameters.get("classification"):
            raise ProtocolError(400, f"output '{name}': this server does not offer classification")
        binary = parameters.get("binary_data", binary_by_default)
        if not isinstance(binary, bool):
            raise ProtocolError(400, f"output '{name}': binary_data is not true or false")
        return OutputWish(name, binary, shared_part(parameters, f"output '{name}'"))

    # Answers

    def encode(self, request: InferRequest, outputs: Arrays) -> Answer:
        """Write the answer to ``request``.

        Raises:
            ProtocolError: 400 where a wanted output has no JSON form.
        """
        entries: List[str] = []
        buffers: List[Buffer] = []
        for wish in request.outputs:
            array, datatype = outputs[wish.name], self.outputs[wish.name].dtype
            if wish.shared is not None:
                content = self._put_shared(wish.name, wish.shared, encode_binary(datatype, array))
            elif wish.binary:
                data = encode_binary(datatype, array)
                buffers.append(data)
                content = f'"parameters":{{"binary_data_size":{len(data)}}}'
            else:
                content = f'"data":{_dump_data(wish.name, datatype, array)}'
            shape = ",".join(map(str, array.shape))
            entries.append(f"{self._output_openings[wish.name]}{shape}],{content}}}")
        echo = "" if request.id is None else f'"id":{json.dumps(request.id)},'
        head = f'{self._opening}{echo}"outputs":[{",".join(entries)}]}}'.encode()
        return Answer([head, *buffers], len(head) if buffers else None)

    def _put_shared(self, name: str, part: SharedPart, data: Buffer) -> str:
        if len(data) > part.byte_size:
            raise ProtocolError(
                400, f"output '{name}' has {len(data)} bytes, its shared memory {part.byte_size}"
            )
        self._view_shared(part.region, part.offset, len(data))[:] = data
        return (
            f'"parameters":{{"shared_memory_region":{json.dumps(part.region)},'
            f'"shared_memory_offset":{part.offset},"shared_memory_byte_size":{len(data)}}}'
        )


# Tensors


def _matches(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(want in (-1, got) for got, want in zip(shape, expected))


def _decode_raw(tensor: _RawTensor, data: memoryview) -> np.ndarray[Any, Any]:
    try:
        return decode_binary(tensor.datatype, tensor.shape, data)
    except TensorError as error:
        raise ProtocolError(400, f"input '{tensor.name}' {error}") from error


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
