"""``ModelInferRequest`` and ``ModelInferResponse``, without I/O: a message in, a message out.

Raw tensors are viewed where they lie in the message. All that a request says besides its data is usually the
same as last time, so what those bytes mean is kept in a small cache, as for HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

from device_agent.manifest import TensorSpec
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_contents import decode_contents
from device_agent.server.grpc_messages import SCHEMA
from device_agent.server.interface import (
    Arrays,
    InferRequest,
    ModelInterface,
    OutputWish,
    RequestHead,
    Shape,
    ViewShared,
    decode_raw,
    no_shared_memory,
    put_shared,
)
from device_agent.server.wire import (
    LENGTH_DELIMITED,
    WireError,
    delimited,
    read_fields,
    read_text,
    tag,
    varint,
)
from device_agent.tensors import Buffer, encode_binary

_CACHED_PLANS = 64
_CACHED_OUTPUTS = 256
_CACHED_HEAD_BYTES = 4096

# Field numbers of ModelInferRequest and ModelInferResponse.
_MODEL_NAME, _MODEL_VERSION, _ID, _PARAMETERS, _INPUTS, _OUTPUTS, _RAW_INPUTS = range(1, 8)
_RAW_OUTPUTS = 6
_HEAD = frozenset({_PARAMETERS, _INPUTS, _OUTPUTS})

_FINAL = delimited(
    _PARAMETERS,
    delimited(1, b"triton_final_response")
    + delimited(2, SCHEMA.encode("InferParameter", {"bool_param": True})),
)


@dataclass(frozen=True)
class Envelope:
    """A request's parts, before it is known what the model takes.

    Attributes:
        model: the model's name.
        version: of the model; None: the client leaves it to the server.
        id: the client's own name for the request; None: it gave none.
        head: parameters, inputs and outputs, as they were written.
        raw: raw tensors, in order.
    """

    model: str
    version: Optional[str]
    id: Optional[str]
    head: bytes
    raw: List[memoryview]


def open_envelope(message: bytes) -> Envelope:
    """Part a ``ModelInferRequest``.

    Raises:
        ProtocolError: 400: it is none.
    """
    texts = {_MODEL_NAME: "", _MODEL_VERSION: "", _ID: ""}
    head: List[memoryview] = []
    raw: List[memoryview] = []
    data = memoryview(message)
    try:
        for number, wire_type, value, start, stop in read_fields(data):
            if wire_type != LENGTH_DELIMITED or not isinstance(value, memoryview):
                continue
            if number in _HEAD:
                head.append(data[start:stop])
            elif number == _RAW_INPUTS:
                raw.append(value)
            elif number in texts:
                texts[number] = read_text(value)
    except WireError as error:
        raise ProtocolError(400, f"the request is not a ModelInferRequest: {error}") from error
    return Envelope(
        texts[_MODEL_NAME], texts[_MODEL_VERSION] or None, texts[_ID] or None, b"".join(head), raw
    )


@dataclass(frozen=True)
class _Plan:
    """What the head of a request says, checked against the model.

    Attributes:
        head: the checked part.
        carried: the inputs whose data is in the message, in its order.
        contents: the ``contents`` of those that have such.
    """

    head: RequestHead
    carried: Tuple[TensorSpec, ...]
    contents: Mapping[str, memoryview] = field(default_factory=dict)


class GrpcProtocol:
    """Requests and answers of one model version.

    Attributes:
        interface: the model.
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
        self._output_heads: Dict[Tuple[str, str, Shape], bytes] = {}
        self._opening = delimited(_MODEL_NAME, interface.name.encode("utf-8")) + delimited(
            _MODEL_VERSION, interface.version.encode("utf-8")
        )

    # Requests

    def decode(self, envelope: Envelope) -> InferRequest:
        """Check a request and view its tensors, which may lie in the message.

        Raises:
            ProtocolError: 400, naming what is wrong.
        """
        plan = self._plans.get(envelope.head)
        if plan is None:
            plan = self._plan(envelope.head)
            if not plan.contents and len(envelope.head) <= _CACHED_HEAD_BYTES:
                if len(self._plans) >= _CACHED_PLANS:
                    self._plans.clear()
                self._plans[envelope.head] = plan
        inputs = self._raw(plan, envelope.raw) if envelope.raw else self._typed(plan)
        for name, part in plan.head.shared.items():
            data = self._view_shared(part.region, part.offset, part.byte_size)
            inputs[name] = decode_raw(name, self.interface.inputs[name].dtype, plan.head.shapes[name], data)
        return InferRequest(envelope.id, inputs, plan.head)

    def _plan(self, data: bytes) -> _Plan:
        try:
            request = SCHEMA.decode("ModelInferRequest", memoryview(data))
        except WireError as error:
            raise ProtocolError(400, f"the request is not a ModelInferRequest: {error}") from error
        for part in (request, *request["inputs"], *request["outputs"]):
            part["parameters"] = chosen_parameters(part["parameters"])
        head = self.interface.check(request["parameters"], request["inputs"], request["outputs"])
        carried = [item["name"] for item in request["inputs"] if item["name"] not in head.shared]
        contents = {item["name"]: item["contents"] for item in request["inputs"] if "contents" in item}
        return _Plan(head, tuple(self.interface.inputs[name] for name in carried), contents)

    def _raw(self, plan: _Plan, raw: List[memoryview]) -> Arrays:
        if plan.contents:
            name = next(iter(plan.contents))
            raise ProtocolError(400, f"input '{name}' has contents in a request with raw_input_contents")
        if len(raw) != len(plan.carried):
            raise ProtocolError(
                400, f"raw_input_contents has {len(raw)} tensors for {len(plan.carried)} inputs"
            )
        shapes = plan.head.shapes
        return {
            spec.name: decode_raw(spec.name, spec.dtype, shapes[spec.name], data)
            for spec, data in zip(plan.carried, raw)
        }

    def _typed(self, plan: _Plan) -> Arrays:
        return {
            spec.name: decode_contents(
                spec, plan.head.shapes[spec.name], plan.contents.get(spec.name, memoryview(b""))
            )
            for spec in plan.carried
        }

    # Answers

    def encode(self, request: InferRequest, outputs: Arrays, final: bool = False) -> bytes:
        """Write the ``ModelInferResponse`` to ``request``.

        Args:
            request: what was asked.
            outputs: an array for each output of the model.
            final: say that no other response to this request follows.

        Raises:
            ProtocolError: 400 where an output does not fit its shared memory.
        """
        parts: List[Buffer] = [self._opening]
        raw: List[Buffer] = []
        if request.id is not None:
            parts.append(delimited(_ID, request.id.encode("utf-8")))
        if final:
            parts.append(_FINAL)
        for wish in request.head.outputs:
            datatype, array = self.interface.answer_of(wish, outputs)
            data = encode_binary(datatype, array)
            parts.append(self._output_head(wish, datatype, array.shape, data))
            # Clients count raw contents and outputs alike, so that one in shared memory has an empty one.
            raw += _raw_output(b"" if wish.shared else data)
        return b"".join(parts + raw)

    def _output_head(self, wish: OutputWish, datatype: str, shape: Shape, data: Buffer) -> bytes:
        if wish.shared is not None:
            put_shared(wish.name, wish.shared, data, self._view_shared)
            return _output(
                wish.name,
                datatype,
                shape,
                {
                    "shared_memory_region": {"string_param": wish.shared.region},
                    "shared_memory_offset": {"int64_param": wish.shared.offset},
                    "shared_memory_byte_size": {"int64_param": len(data)},
                },
            )
        key = (wish.name, datatype, shape)
        known = self._output_heads.get(key)
        if known is None:
            if len(self._output_heads) >= _CACHED_OUTPUTS:
                self._output_heads.clear()
            known = self._output_heads[key] = _output(wish.name, datatype, shape, {})
        return known


def stream_response(message: bytes) -> bytes:
    """A ``ModelInferResponse`` as a ``ModelStreamInferResponse``."""
    return delimited(2, message)


def stream_error(request_id: Optional[str], text: str) -> bytes:
    """A failed request as a ``ModelStreamInferResponse``; the stream goes on."""
    echo = delimited(_ID, request_id.encode("utf-8")) if request_id else b""
    return delimited(1, text.encode("utf-8", "replace")) + delimited(2, echo + _FINAL)


def chosen_parameters(parameters: Mapping[str, Mapping[str, Any]]) -> Dict[str, Any]:
    """Parameters with the value that each has, whichever type was chosen for it."""
    return {key: value for key, choice in parameters.items() for value in choice.values()}


def _output(name: str, datatype: str, shape: Shape, parameters: Mapping[str, Any]) -> bytes:
    values = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
    return delimited(5, SCHEMA.encode("InferOutputTensor", values))


_RAW_OUTPUT_TAG = tag(_RAW_OUTPUTS, LENGTH_DELIMITED)


def _raw_output(data: Buffer) -> List[Buffer]:
    return [_RAW_OUTPUT_TAG, varint(len(data)), data]
