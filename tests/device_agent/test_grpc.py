"""The gRPC port, on real sockets: an agent process and Triton's own gRPC clients."""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.utils.shared_memory as shm
from google.protobuf import json_format
from onnx import helper
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from agent_testing import (
    AgentProcess,
    identity,
    install,
    linear,
    linear_bundle,
    make_model,
    session_of,
    write_bundle,
)
from device_agent.engines.onnxruntime import CARRIES_BFLOAT16
from device_agent.manifest import TensorSpec

GRPC = "[grpc]\nenabled = true\nport = 0\n"
GRPC_LEFT_OPEN = "[grpc]\nport = 0\n"
MAX_BODY_BYTES = 4 * 1024 * 1024
DTYPES = ("BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64")


def grpc_address(agent: AgentProcess) -> str:
    """Where the agent serves gRPC."""
    return agent.wait_for(r" grpc=(\S+)").group(1)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with ``model`` (linear), ``text`` (BYTES), ``wide`` and an identity for many datatypes."""
    root = tmp_path_factory.mktemp("grpc")
    bundles = [
        linear_bundle(root / "linear"),
        write_bundle(root / "text", identity("BYTES"), {"x": np.array([["a", "b", "c"]])}, name="text"),
        write_bundle(
            root / "wide", identity("FP32", (-1, -1)), {"x": np.ones((1, 3), np.float32)}, name="wide"
        ),
    ]
    for dtype in DTYPES:
        golden = np.ones((1, 3), tritonclient.utils.triton_to_np_dtype(dtype))
        bundles.append(write_bundle(root / dtype, identity(dtype), {"x": golden}, name=dtype.lower()))
    running = AgentProcess(root, GRPC + f"[limits]\nmax_body_bytes = {MAX_BODY_BYTES}\n")
    install(root / "state", bundles)
    yield running.start()
    running.kill()


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Any]:
    """Triton's own gRPC client, unmodified."""
    with tritonclient.grpc.InferenceServerClient(grpc_address(agent)) as connected:
        yield connected


@pytest.fixture
def stub(agent: AgentProcess) -> Iterator[Any]:
    """The plain calls, as protobuf and grpcio make them."""
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(array: np.ndarray, dtype: str = "FP32", name: str = "x") -> Any:
    """An input of Triton's client."""
    value = tritonclient.grpc.InferInput(name, list(array.shape), dtype)
    value.set_data_from_numpy(array)
    return value


def direct(x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime itself answers."""
    return session_of(linear()).run(None, {"x": x})[0]


def slow_bundle(directory: Path, **changes: Any) -> Any:
    """A bundle of one row a run that keeps the engine busy for tens of milliseconds."""
    names = ["x", *[f"h{i}" for i in range(399)], "y"]
    nodes = [helper.make_node("MatMul", [names[i], "x"], [names[i + 1]]) for i in range(400)]
    spec = [TensorSpec("x", "FP32", (160, 160)), TensorSpec("y", "FP32", (160, 160))]
    golden = {"x": np.zeros((160, 160), np.float32)}
    return write_bundle(
        directory, make_model(nodes, spec[:1], spec[1:]), golden, name="slow", max_batch_size=1, **changes
    )


SLOW_INPUT = np.zeros((160, 160), np.float32)


# Triton's client


def test_triton_client_gets_what_onnx_runtime_gives(client: Any) -> None:
    """At every batch size the answer is bit for bit that of the session itself, and the id comes back."""
    rng = np.random.default_rng(3)
    for rows in (1, 2, 3, 8):
        x = rng.standard_normal((rows, 8)).astype(np.float32)
        result = client.infer("model", [tensor(x)], request_id=f"caf\u00e9-{rows}")
        np.testing.assert_array_equal(result.as_numpy("scores"), direct(x))
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == (
            f"caf\u00e9-{rows}",
            "model",
            "1",
        )


def test_triton_client_reads_every_document(client: Any) -> None:
    """Health, metadata, config, statistics and the repository index are as the client expects them."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert not client.is_model_ready("model", "2")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata().name == "edgekit-agent"
    (tensor_metadata,) = client.get_model_metadata("model").inputs
    assert (tensor_metadata.name, list(tensor_metadata.shape)) == ("x", [-1, 8])
    entries = {entry.name: entry.state for entry in client.get_model_repository_index().models}
    assert entries["model"] == entries["text"] == "READY"
    assert client.get_cuda_shared_memory_status().regions == {}


def test_both_protocols_tell_the_same(agent: AgentProcess, client: Any) -> None:
    """Metadata, configuration and statistics are the same documents over HTTP and over gRPC."""
    client.infer("model", [tensor(np.ones((3, 8), np.float32))])
    with tritonclient.http.InferenceServerClient(agent.http) as http:
        pairs = [
            (http.get_server_metadata(), client.get_server_metadata()),
            (http.get_model_metadata("model"), client.get_model_metadata("model")),
            (http.get_model_config("model"), client.get_model_config("model").config),
            (http.get_inference_statistics("model"), client.get_inference_statistics("model")),
        ]
    for document, message in pairs:
        expected = json_format.ParseDict(document, type(message)())
        for stats in [*getattr(expected, "model_stats", ()), *getattr(message, "model_stats", ())]:
            stats.last_inference -= stats.last_inference % 1000  # read at two times
        assert message == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_datatype_travels_raw(client: Any, dtype: str) -> None:
    """Values at the ends of each type come back bit for bit."""
    numpy_type = np.dtype(tritonclient.utils.triton_to_np_dtype(dtype))
    if numpy_type.kind in "iu":
        limits = np.iinfo(numpy_type)
        x = np.array([[limits.min, 1, limits.max]], numpy_type)
    else:
        x = np.array([[0, 1, 0.5]], numpy_type)
    np.testing.assert_array_equal(client.infer(dtype.lower(), [tensor(x, dtype)]).as_numpy("y"), x)


@pytest.mark.skipif(not CARRIES_BFLOAT16, reason="this ONNX Runtime takes no BF16 from a caller")
def test_bf16_travels_raw(start_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """BF16 goes in and out as bit patterns."""
    bundle = write_bundle(tmp_path / "b", *bf16_model())
    agent = start_agent(bundle, settings=GRPC)
    bits = np.array([[0x3F80, 0xC000, 0x7F7F]], np.uint16)
    request = service_pb2.ModelInferRequest(model_name="model", raw_input_contents=[bits.tobytes()])
    request.inputs.add(name="x", datatype="BF16", shape=[1, 3])
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert answer.raw_output_contents == [bits.tobytes()]


def bf16_model() -> Any:
    """``y`` is ``x``, with golden values that need no reference run."""
    golden = np.array([[0x3F80, 0x4000, 0]], np.uint16)
    return identity("BF16"), {"x": golden}, {"y": golden}


def test_text_and_typed_contents(client: Any, stub: Any) -> None:
    """BYTES go raw and typed; a typed request is answered raw."""
    x = np.array([["a", "gr\u00fc\u00df dich", "b'x'"]], dtype=object)
    got = client.infer("text", [tensor(x, "BYTES")]).as_numpy("y")
    assert [item.decode() for item in got[0]] == x[0].tolist()
    request = service_pb2.ModelInferRequest(model_name="model")
    sent = request.inputs.add(name="x", datatype="FP32", shape=[1, 8])
    sent.contents.fp32_contents.extend(range(8))
    answer = stub.ModelInfer(request)
    expected = direct(np.arange(8, dtype=np.float32)[None])
    assert answer.raw_output_contents == [expected.tobytes()]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_messages_may_be_compressed(client: Any, algorithm: str) -> None:
    """GRPC's own compression works."""
    x = np.ones((2, 8), np.float32)
    result = client.infer("model", [tensor(x)], compression_algorithm=algorithm)
    np.testing.assert_array_equal(result.as_numpy("scores"), direct(x))


def test_errors_have_tritons_codes(agent: AgentProcess, client: Any) -> None:
    """NOT_FOUND, INVALID_ARGUMENT, RESOURCE_EXHAUSTED and UNIMPLEMENTED, each with its cause."""
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        for method in ("ModelInfer", "ModelReady"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            with pytest.raises(grpc.RpcError, match="is not a Model") as caught:
                call(b"\x0a\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    x = np.ones((1, 8), np.float32)
    for version in ("", "7"):
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.infer("nothing" if not version else "model", [tensor(x)], version)
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*\[1, 9\]"):
        client.infer("model", [tensor(np.ones((1, 9), np.float32))])
    with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
        client.infer("wide", [tensor(np.ones((1, MAX_BODY_BYTES // 4), np.float32))])
    with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        client.get_trace_settings()
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        client.infer("text", [tensor(np.array([[b"\xff", b"", b""]], dtype=object), "BYTES")])


def test_large_messages_pass(client: Any) -> None:
    """The limit is the agent's own, not gRPC's 4 MiB, and a compressed message cannot get around it."""
    x = np.zeros((1, MAX_BODY_BYTES // 4 - 64), np.float32)
    np.testing.assert_array_equal(client.infer("wide", [tensor(x)]).as_numpy("y"), x)
    huge = np.zeros((4, MAX_BODY_BYTES // 4), np.float32)
    with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
        client.infer("wide", [tensor(huge)], compression_algorithm="gzip")


def test_a_model_can_be_unloaded_and_loaded_again(client: Any) -> None:
    """Unloaded, it stays in the index and is not ready; loaded again, it serves."""
    x = np.ones((1, 3), np.float16)
    client.unload_model("fp16")
    assert not client.is_model_ready("fp16")
    states = {entry.name: entry.state for entry in client.get_model_repository_index().models}
    assert states["fp16"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException, match="NOT_FOUND"):
        client.infer("fp16", [tensor(x, "FP16")])
    client.load_model("fp16")
    assert client.infer("fp16", [tensor(x, "FP16")]).as_numpy("y").tolist() == [[1, 1, 1]]
    client.unload_model("nothing")
    with pytest.raises(InferenceServerException, match="not installed"):
        client.load_model("nothing")
    with pytest.raises(InferenceServerException, match="signed"):
        client.load_model("fp16", config='{"max_batch_size": 1}', files={"file:1/model.onnx": b"x"})


def test_the_asynchronous_clients_work(agent: AgentProcess, client: Any) -> None:
    """Many requests at once over tritonclient.grpc.aio, and callbacks of the other, get their own answers."""

    async def one(connected: Any, value: float) -> None:
        x = np.full((1, 8), value, np.float32)
        result = await connected.infer("model", [tensor(x)])
        np.testing.assert_allclose(result.as_numpy("scores"), direct(x), rtol=1e-5, atol=1e-6)

    async def main() -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(grpc_address(agent)) as connected:
            assert await connected.is_server_ready()
            await asyncio.gather(*(one(connected, float(i)) for i in range(20)))

    asyncio.run(main())
    answers: queue.Queue[Any] = queue.Queue()
    x = np.ones((1, 8), np.float32)
    client.async_infer("model", [tensor(x)], lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=20)
    assert error is None
    np.testing.assert_array_equal(result.as_numpy("scores"), direct(x))


CONFIG = """
backend: "onnxruntime" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [8] }
output { name: "scores" data_type: TYPE_FP32 dims: [4] label_filename: "labels.txt" }
version_policy { all { } }
dynamic_batching {
  preferred_batch_size: [2, 4] max_queue_delay_microseconds: 100 preserve_ordering: true
  priority_levels: 3 default_priority_level: 2
  default_queue_policy { timeout_action: DELAY max_queue_size: 7 }
  priority_queue_policy { key: 1 value { max_queue_size: 3 } }
}
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
model_warmup {
  name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: [8] zero_data: true } }
}
"""


def test_a_repository_is_served_over_grpc_too(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """Configurations are whole, classes are named, and a load request brings a model along."""
    model = linear().SerializeToString()
    directory = tmp_path / "repository" / "classes"
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(model)
    (directory / "labels.txt").write_text("a\nb\nc\nd\n")
    (directory / "config.pbtxt").write_text(CONFIG)
    arguments = ["--model-repository", str(directory.parent), "--model-control-mode", "explicit"]
    agent = start_agent(settings=GRPC, arguments=[*arguments, "--load-model", "*"])
    x = np.ones((1, 8), np.float32)
    with tritonclient.grpc.InferenceServerClient(grpc_address(agent)) as client:
        with tritonclient.http.InferenceServerClient(agent.http) as http:
            document = http.get_model_config("classes")
        config = client.get_model_config("classes").config
        assert config == json_format.ParseDict(document, type(config)())
        wish = tritonclient.grpc.InferRequestedOutput("scores", class_count=1)
        (best,) = client.infer("classes", [tensor(x)], outputs=[wish]).as_numpy("scores")[0]
        assert best.decode().endswith(f":{direct(x).argmax()}:{'abcd'[direct(x).argmax()]}")
        client.load_model("sent", config='{"backend": "onnxruntime"}', files={"file:1/model.onnx": model})
        np.testing.assert_array_equal(client.infer("sent", [tensor(x)]).as_numpy("scores"), direct(x))


def test_failures_are_counted_by_code(agent: AgentProcess, client: Any) -> None:
    """Prometheus sees each status code other than OK."""
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("nothing")
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=20) as page:
        text = page.read().decode()
    assert 'edgekit_grpc_errors_total{code="NOT_FOUND"}' in text


# Shared memory


def test_tensors_may_pass_through_shared_memory(client: Any) -> None:
    """Inputs are read from, and outputs written to, a region of another process."""
    key = f"edgekit-grpc-{os.getpid()}"
    region = shm.create_shared_memory_region("frames", key, 4096)
    try:
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        client.register_system_shared_memory("frames", key, 4096)
        status = client.get_system_shared_memory_status().regions["frames"]
        assert (status.key, status.offset, status.byte_size) == (key, 0, 4096)
        with pytest.raises(InferenceServerException, match="already"):
            client.register_system_shared_memory("frames", "other", 4096)
        x = np.full((2, 8), 1.5, np.float32)
        shm.set_shared_memory_region(region, [x], offset=64)
        sent = tritonclient.grpc.InferInput("x", [2, 8], "FP32")
        sent.set_shared_memory("frames", x.nbytes, offset=64)
        wish = tritonclient.grpc.InferRequestedOutput("scores")
        wish.set_shared_memory("frames", 32, offset=1024)
        output = client.infer("model", [sent], outputs=[wish]).get_output("scores")
        assert output.parameters["shared_memory_region"].string_param == "frames"
        got = shm.get_contents_as_numpy(region, np.float32, [2, 4], offset=1024)
        np.testing.assert_array_equal(got, direct(x))
        client.unregister_system_shared_memory("frames")
        with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*not registered"):
            client.infer("model", [sent])
        with pytest.raises(InferenceServerException, match="no CUDA"):
            client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, 16)
    finally:
        shm.destroy_shared_memory_region(region)


# Streams


def test_a_stream_answers_in_order_and_survives_errors(client: Any) -> None:
    """A failed request is one answer among others; each good one says that it is the only one."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    inputs = [np.full((1, 8), value, np.float32) for value in range(5)]
    for index, x in enumerate(inputs):
        model = "nothing" if index == 2 else "model"
        client.async_stream_infer(
            model, [tensor(x)], request_id=str(index), enable_empty_final_response=index == 4
        )
    for index, x in enumerate(inputs):
        result, error = answers.get(timeout=20)
        if index == 2:
            assert "'nothing' is not found" in str(error)
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(index)
        assert response.parameters["triton_final_response"].bool_param
        np.testing.assert_allclose(result.as_numpy("scores"), direct(x), rtol=1e-5, atol=1e-6)
    client.stop_stream()
    assert answers.empty()


def test_a_strict_stream_ends_with_a_status(client: Any) -> None:
    """Clients that send triton_grpc_error get gRPC's status, and the stream is over."""
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(
        lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"}
    )
    client.async_stream_infer("nothing", [tensor(np.ones((1, 8), np.float32))])
    _, error = answers.get(timeout=20)
    assert error.status() == "StatusCode.NOT_FOUND"
    client.stop_stream()


def test_a_stream_takes_more_than_it_holds(stub: Any) -> None:
    """Hundreds of requests sent without waiting are all answered, in their order."""
    request = service_pb2.ModelInferRequest(model_name="model", raw_input_contents=[bytes(32)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 8])

    def requests() -> Iterator[Any]:
        for index in range(300):
            request.id = str(index)
            yield request

    ids = [answer.infer_response.id for answer in stub.ModelStreamInfer(requests(), timeout=30)]
    assert ids == [str(index) for index in range(300)]


# Load and ends


def test_a_full_queue_is_unavailable_with_advice(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """More than the queue holds is refused at once with the time to come back; all others are answered."""
    agent = start_agent(slow_bundle(tmp_path / "b"), settings=GRPC + "[limits]\nmax_queue_size = 3\n")
    request = slow_request()
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer.future(request, timeout=60) for _ in range(24)]
        codes = [call.code() for call in calls]
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert codes.count(grpc.StatusCode.OK) >= 4
        refused = calls[codes.index(grpc.StatusCode.UNAVAILABLE)]
        metadata = dict(refused.trailing_metadata())
        assert metadata["grpc-retry-pushback-ms"] == "1000"
        assert b"google.rpc.RetryInfo" in metadata["grpc-status-details-bin"]


def slow_request(**fields: Any) -> Any:
    """A request to :func:`slow_bundle`."""
    request = service_pb2.ModelInferRequest(
        model_name="slow", raw_input_contents=[SLOW_INPUT.tobytes()], **fields
    )
    request.inputs.add(name="x", datatype="FP32", shape=[160, 160])
    return request


def test_a_request_that_cannot_meet_its_timeout_is_unavailable(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """The request parameter timeout, in microseconds, bounds the wait."""
    agent = start_agent(slow_bundle(tmp_path / "b"), settings=GRPC)
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        ahead = [stub.ModelInfer.future(slow_request(), timeout=60) for _ in range(4)]
        hurried = slow_request()
        hurried.parameters["timeout"].int64_param = 100
        late = stub.ModelInfer.future(hurried, timeout=60)
        assert late.code() is grpc.StatusCode.UNAVAILABLE
        assert "timeout" in late.details()
        assert [call.code() for call in ahead] == [grpc.StatusCode.OK] * 4


def test_calls_that_are_given_up_free_their_place(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """Cancelled calls, calls past their deadline and cancelled streams leave the queue uncomputed."""
    agent = start_agent(slow_bundle(tmp_path / "b"), settings=GRPC)
    with grpc.insecure_channel(grpc_address(agent)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        leaving = [stub.ModelInfer.future(slow_request(), timeout=60) for _ in range(20)]
        leaving += [stub.ModelInfer.future(slow_request(), timeout=0.05) for _ in range(10)]
        stream = stub.ModelStreamInfer(iter([slow_request() for _ in range(10)]), timeout=60)
        time.sleep(0.1)  # let them arrive
        for call in leaving:
            call.cancel()
        stream.cancel()
        assert stub.ModelInfer(slow_request(), timeout=60).model_name == "slow"
        (stats,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="slow")).model_stats
        assert stats.execution_count < 30


def test_a_stop_under_load_loses_nothing(start_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """What was accepted is answered; later calls are told that nobody listens; the agent ends with 0."""
    agent = start_agent(linear_bundle(tmp_path / "b"), slow_bundle(tmp_path / "s"), settings=GRPC)
    address = grpc_address(agent)
    problems: List[str] = []
    counts: Dict[int, int] = {}
    running = threading.Barrier(17)

    def ask(number: int) -> None:
        x = np.full((1, 8), number, np.float32)
        with tritonclient.grpc.InferenceServerClient(address) as client:
            for count in range(1_000_000):
                if count == 20:
                    running.wait(20)
                try:
                    client.infer("model", [tensor(x)])
                except InferenceServerException as error:
                    counts[number] = count
                    if error.status() != "StatusCode.UNAVAILABLE":
                        problems.append(repr(str(error)))
                    return

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    running.wait(20)
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        accepted = [stub.ModelInfer.future(slow_request(), timeout=60) for _ in range(5)]
        streamed = stub.ModelStreamInfer(endless([slow_request(id=str(n)) for n in range(3)]), timeout=60)
        assert next(streamed).infer_response.id == "0"
        assert agent.stop() == 0
        assert [call.code() for call in accepted] == [grpc.StatusCode.OK] * 5
        assert [next(streamed).infer_response.id for _ in range(2)] == ["1", "2"]
        with pytest.raises(grpc.RpcError, match="the agent is stopping"):
            next(streamed)
    for thread in threads:
        thread.join(20)
    assert problems == []
    assert len(counts) == 16
    with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the kernel likes
        socket.create_connection((address.split(":")[0], int(address.split(":")[1])), timeout=2)


def endless(requests: List[Any]) -> Iterator[Any]:
    """Requests, after which the client keeps its side of the stream open."""
    yield from requests
    threading.Event().wait(20)


def test_a_port_that_is_taken_is_an_error_of_three_lines(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """The agent says which address and what to do, and ends, instead of sharing the port."""
    first = start_agent(settings=GRPC)
    root = tmp_path / "second"
    root.mkdir()
    second = AgentProcess(root, f"[grpc]\nenabled = true\nport = {grpc_address(first).split(':')[1]}\n")
    with pytest.raises(AssertionError, match="cannot be listened on"):
        second.start()
    assert second.process.wait(timeout=20) == 4
    assert "Traceback" not in second.log()


def test_without_grpcio_the_agent_says_what_to_install(
    start_agent: Callable[..., AgentProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gRPC is asked for and not installed, the agent ends with code 4 and names the package."""
    (tmp_path / "grpc.py").write_text("raise ImportError('no grpc here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    root = tmp_path / "agent"
    root.mkdir()
    agent = AgentProcess(root, GRPC)
    with pytest.raises(AssertionError, match=r"edgekit-agent\[grpc\]"):
        agent.start()
    assert agent.process.wait(timeout=20) == 4


def test_grpc_is_loaded_only_where_it_is_switched_on(start_agent: Callable[..., AgentProcess]) -> None:
    """Without a model repository neither its port nor its library costs anything by default."""
    agent = start_agent(settings=GRPC_LEFT_OPEN)
    assert " grpc=" not in agent.log()
    assert "cygrpc" not in Path(f"/proc/{agent.process.pid}/maps").read_text()


def _empty_repository(tmp_path: Path) -> List[str]:
    (tmp_path / "models").mkdir()
    return ["--model-repository", str(tmp_path / "models")]


def test_a_repository_is_served_over_grpc_unless_that_is_switched_off(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """Who leaves Triton finds gRPC open with the same one command; ``enabled = false`` closes it."""
    arguments = _empty_repository(tmp_path)
    agent = start_agent(settings=GRPC_LEFT_OPEN, arguments=arguments)
    with tritonclient.grpc.InferenceServerClient(grpc_address(agent)) as client:
        assert client.is_server_ready()
    off = start_agent(settings="[grpc]\nenabled = false\n", arguments=arguments)
    assert " grpc=" not in off.log()


def test_a_taken_port_is_no_hindrance_where_nobody_asked_for_grpc(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """A second agent with a repository serves over HTTP, and its log says why there is no gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = f"[grpc]\nport = {taken.getsockname()[1]}\n"
        agent = start_agent(settings=settings, arguments=_empty_repository(tmp_path))
        with tritonclient.http.InferenceServerClient(agent.http) as client:
            assert client.is_server_ready()
        assert agent.stop() == 0
    assert "cannot be listened on" in agent.log()
    assert " grpc=" not in agent.log()
    assert "Traceback" not in agent.log()


def test_without_grpcio_a_repository_is_served_over_http(
    start_agent: Callable[..., AgentProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gRPC is not installed and not asked for, the log names the package and HTTP serves."""
    (tmp_path / "grpc.py").write_text("raise ImportError('no grpc here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    agent = start_agent(settings=GRPC_LEFT_OPEN, arguments=_empty_repository(tmp_path))
    with tritonclient.http.InferenceServerClient(agent.http) as client:
        assert client.is_server_ready()
    assert "edgekit-agent[grpc]" in agent.log()
