"""gRPC clients that are hostile, broken or unlucky: each gets a status, and the agent serves on."""

from __future__ import annotations

import asyncio
import socket
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from agent_testing import AgentProcess, identity, install, linear_bundle, write_bundle
from device_agent.manifest import TensorSpec
from device_agent.server.fields import ProtocolError
from device_agent.server.grpc_inference import GrpcInference
from device_agent.server.grpc_protocol import open_envelope
from device_agent.server.interface import ModelInterface
from device_agent.server.wire import delimited, tag, varint

SETTINGS = "[grpc]\nenabled = true\nport = 0\n[limits]\nmax_body_bytes = 4194304\ndrain_timeout_s = 60\n"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    """An agent with gRPC, and the models ``model`` (linear) and ``wide`` (FP32, any shape of two axes)."""
    running = AgentProcess(tmp_path, SETTINGS)
    wide = write_bundle(
        tmp_path / "wide", identity("FP32", (-1, -1)), {"x": np.ones((1, 3), np.float32)}, name="wide"
    )
    install(tmp_path / "state", [linear_bundle(tmp_path / "linear"), wide])
    yield running.start()
    running.kill()


@pytest.fixture
def channel(agent: AgentProcess) -> Iterator[grpc.Channel]:
    """A plain channel, which sends the bytes that it is given."""
    address = agent.wait_for(r"grpc=(\S+)").group(1)
    with grpc.insecure_channel(address) as connected:
        yield connected


def infer(channel: grpc.Channel, message: bytes) -> Any:
    """Send ``message`` as a ``ModelInferRequest``; the answer, or the status code."""
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    try:
        return service_pb2.ModelInferResponse.FromString(call(message, timeout=20))
    except grpc.RpcError as failed:
        failure = failed
    assert len(failure.details()) < 1000
    return failure.code()


def message_of(model: str = "model", shape: Any = (1, 8), raw: bytes = bytes(32), **changes: Any) -> bytes:
    """A request with one input ``x``."""
    request = service_pb2.ModelInferRequest(model_name=model, **changes)
    request.inputs.add(name="x", datatype="FP32", shape=list(shape))
    request.raw_input_contents.append(raw)
    return request.SerializeToString()


def typed(contents: bytes, shape: List[int]) -> bytes:
    """A request to ``wide`` whose ``InferTensorContents`` are these bytes."""
    dims = delimited(3, b"".join(map(varint, shape)))
    item = delimited(1, b"x") + delimited(2, b"FP32") + dims + delimited(5, contents)
    return delimited(1, b"wide") + delimited(5, item)


def test_what_is_not_a_request_is_an_invalid_argument(channel: grpc.Channel) -> None:
    """Damaged messages, contents of another type and sizes beyond reason are the client's fault, not ours."""
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    good = message_of()
    assert infer(channel, good).model_name == "model"
    for cut in range(1, len(good)):
        # Cut between two fields, it is a request that lacks one.
        assert infer(channel, good[:cut]) in (invalid, grpc.StatusCode.NOT_FOUND)
    one = np.float32(1).tobytes()
    assert infer(channel, typed(delimited(6, one), [1, 1])).model_name == "wide"
    for message in (
        b"\xff" * 100,
        delimited(1, b"\xff"),
        message_of(shape=(1, 2**62)),
        message_of(shape=(-1, 8)),
        message_of(raw=bytes(31)),
        message_of("wide", shape=(0, 2**62), raw=b""),
        typed(tag(6, 0) + varint(7), [1, 1]),
        typed(tag(6, 1) + bytes(8), [1, 2]),
        typed(delimited(6, b"abc"), [1, 1]),
        typed(b"", [1, 0, 0]),
        typed(delimited(1, b"\1"), [1, 1]),
        typed(delimited(6, one), [1, 2**40]),
    ):
        assert infer(channel, message) is invalid
    assert infer(channel, message_of("m" * 1_000_000)) is grpc.StatusCode.NOT_FOUND
    assert infer(channel, message_of(raw=bytes(5_000_000))) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert infer(channel, good).model_name == "model"


def test_a_message_of_millions_of_fields_keeps_nobody_waiting(channel: grpc.Channel) -> None:
    """A message has at most some thousand fields; more are refused before they are read."""
    assert infer(channel, (tag(9, 0) + varint(1)) * 1_500_000) is grpc.StatusCode.INVALID_ARGUMENT
    shape = tag(3, 0) + varint(1)
    item = delimited(1, b"x") + delimited(2, b"FP32") + shape * 1_500_000
    assert infer(channel, delimited(1, b"model") + delimited(5, item)) is grpc.StatusCode.INVALID_ARGUMENT


def test_dropped_calls_and_streams_harm_nobody(agent: AgentProcess, channel: grpc.Channel) -> None:
    """Calls that are cancelled, streams that are left open, bytes that are no HTTP/2: others are served."""
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    unary = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    good = message_of()
    left_open = []
    for number in range(20):
        call = stream(iter([good] * number + [b"\xff"]), timeout=30)
        if number % 2:
            call.cancel()
        else:
            left_open.append(call)
        unary.future(good).cancel()
    address, port = agent.wait_for(r"grpc=(\S+):(\d+)").groups()
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"\0" * 1000,
    ):
        with socket.create_connection((address, int(port)), timeout=10) as sock:
            sock.sendall(data)
    for number, call in enumerate(left_open):
        answers = [service_pb2.ModelStreamInferResponse.FromString(answer) for answer in call]
        assert [bool(answer.error_message) for answer in answers] == [False] * 2 * number + [True]
    assert infer(channel, good).model_name == "model"
    assert "Traceback" not in agent.log()


def test_streams_cannot_keep_the_agent_from_stopping(agent: AgentProcess, channel: grpc.Channel) -> None:
    """A stream that stays open and asks for nothing is ended when the agent stops."""
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    good = message_of()

    def requests() -> Iterator[bytes]:
        yield good
        agent.process.wait()

    call = stream(requests())
    assert service_pb2.ModelStreamInferResponse.FromString(next(call)).error_message == ""
    assert agent.stop() == 0  # waits for half of the time that a request may take
    call.cancel()


class GoneModel:
    """A double of the service: its one model's region is taken away before a request is answered."""

    def __init__(self, memory: np.ndarray) -> None:
        spec = (TensorSpec("x", "FP32", (-1, 8)),)
        self.interface = ModelInterface("model", "1", spec, spec, max_batch_size=4)
        self.protocols: Dict[object, Any] = {}
        self.regions = self
        self.memory: Optional[np.ndarray] = memory
        self.on_done: Optional[Callable[[Any], None]] = None

    def find(self, name: str, version: Optional[str]) -> Any:
        """The model."""
        return self

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """The region."""
        return memoryview(self.memory)[offset : offset + byte_size]  # type: ignore[arg-type]  # an array

    def submit(self, model: Any, request: Any, on_done: Callable[[Any], None]) -> Callable[[], None]:
        """Keep the request."""
        self.on_done = on_done
        return lambda: None

    def outputs_of(self, name: str, job: Any) -> Any:
        """Fail."""
        raise ProtocolError(400, "the region is gone")


def test_a_failure_that_nobody_waits_for_holds_no_shared_memory() -> None:
    """Where a client vanished before it could be told of an error, its memory goes with it, at once."""

    async def scenario() -> None:
        memory = np.zeros(32, np.uint8)
        held = weakref.ref(memory)
        service = GoneModel(memory)
        del memory
        request = service_pb2.ModelInferRequest(model_name="model")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 8])
        tensor.parameters["shared_memory_region"].string_param = "region"
        tensor.parameters["shared_memory_byte_size"].int64_param = 32
        inference = GrpcInference(service, lambda code: None)  # type: ignore[arg-type]  # the double
        answer = inference.submit(open_envelope(request.SerializeToString()), final=False)
        assert service.on_done is not None
        service.on_done(None)
        service.memory = service.on_done = None
        assert held() is None
        assert isinstance(answer.exception(), ProtocolError)

    asyncio.run(scenario())
