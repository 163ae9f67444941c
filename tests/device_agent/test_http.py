"""The serving port, on real sockets: an agent process, Triton's client, and bytes written by hand."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import select
import socket
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest
import tritonclient.http
import tritonclient.http.aio
import tritonclient.utils.shared_memory as shm
from onnx import helper
from tritonclient.utils import InferenceServerException

from agent_testing import (
    AgentProcess,
    connect,
    identity,
    install,
    linear,
    linear_bundle,
    make_model,
    read_response,
    session_of,
    write_bundle,
)
from device_agent.manifest import TensorSpec

MAX_BODY_BYTES = 4 * 1024 * 1024
SETTINGS = f"[limits]\nmax_body_bytes = {MAX_BODY_BYTES}\nheader_timeout_s = 0.6\nidle_timeout_s = 30\n"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with three models: ``model`` (linear), ``text`` (BYTES) and ``half`` (FP16)."""
    root = tmp_path_factory.mktemp("http")
    bundles = [
        linear_bundle(root / "linear"),
        write_bundle(root / "text", identity("BYTES"), {"x": np.array([["a", "b", "c"]])}, name="text"),
        write_bundle(root / "half", identity("FP16"), {"x": np.ones((1, 3), np.float16)}, name="half"),
    ]
    running = AgentProcess(root, SETTINGS)
    install(root / "state", bundles)
    yield running.start()
    running.kill()


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Any]:
    """Triton's own HTTP client, unmodified."""
    with tritonclient.http.InferenceServerClient(agent.http) as connected:
        yield connected


def tensor(name: str, array: np.ndarray, dtype: str, binary: bool = True) -> Any:
    """An input of Triton's client."""
    value = tritonclient.http.InferInput(name, list(array.shape), dtype)
    value.set_data_from_numpy(array, binary_data=binary)
    return value


def send_raw(agent: AgentProcess, data: bytes) -> Tuple[int, Dict[str, str], bytes]:
    """Write bytes, read one response, and expect the connection to be closed after it."""
    with connect(agent) as sock:
        sock.sendall(data)
        with sock.makefile("rb") as stream:
            response = read_response(stream)
            assert stream.read() == b""
            return response


def request(
    agent: AgentProcess, path: str, body: Any = None, method: str = "", headers: Any = ()
) -> Tuple[int, Any]:
    """Status and JSON document of one exchange."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    call = urllib.request.Request(f"http://{agent.http}{path}", data, dict(headers), method=method or None)
    try:
        with urllib.request.urlopen(call, timeout=20) as response:
            text, status = response.read(), response.status
    except urllib.error.HTTPError as error:
        with error:
            text, status = error.read(), error.code
    return status, json.loads(text) if text else None


def infer_body(rows: int = 1, **changes: Any) -> Dict[str, Any]:
    """A valid request to ``model`` in JSON."""
    data = np.arange(8 * rows, dtype=np.float64).tolist()
    return {"inputs": [{"name": "x", "shape": [rows, 8], "datatype": "FP32", "data": data}], **changes}


# Triton's client


def test_triton_client_gets_what_onnx_runtime_gives(client: Any) -> None:
    """At every batch size, binary and JSON, the answer is bit for bit that of the session itself."""
    session = session_of(linear())
    rng = np.random.default_rng(3)
    for rows in (1, 2, 3, 8):
        x = rng.standard_normal((rows, 8)).astype(np.float32)
        direct = session.run(None, {"x": x})[0]
        for binary_in in (True, False):
            for binary_out in (True, False):
                wish = tritonclient.http.InferRequestedOutput("scores", binary_data=binary_out)
                result = client.infer("model", [tensor("x", x, "FP32", binary_in)], outputs=[wish])
                np.testing.assert_array_equal(result.as_numpy("scores"), direct)


def test_triton_client_reads_every_document(client: Any) -> None:
    """Health, metadata, config, statistics and the repository index are as the client expects them."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert not client.is_model_ready("model", "2")
    assert not client.is_model_ready("nothing")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("model")["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 8]}
    ]
    assert client.get_model_config("model", "1")["max_batch_size"] == 8
    entries = {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}
    assert entries == {"model": "READY", "text": "READY", "half": "READY"}


def test_statistics_count_rows_requests_and_runs(client: Any) -> None:
    """inference_count counts rows, success.count requests, execution_count runs of the engine."""
    before = client.get_inference_statistics("half")["model_stats"][0]
    for rows in (1, 4):
        client.infer("half", [tensor("x", np.ones((rows, 3), np.float16), "FP16")])
    after = client.get_inference_statistics("half", "1")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 2
    success = [stats["inference_stats"]["success"] for stats in (before, after)]
    assert success[1]["count"] - success[0]["count"] == 2
    assert success[1]["ns"] > success[0]["ns"]
    assert after["last_inference"] > 1_600_000_000_000
    assert {"model", "text"} < {m["name"] for m in client.get_inference_statistics()["model_stats"]}


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(client: Any, algorithm: str) -> None:
    """The client's own compression options work."""
    x = np.ones((2, 8), np.float32)
    result = client.infer(
        "model",
        [tensor("x", x, "FP32")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("scores"), session_of(linear()).run(None, {"x": x})[0])


@pytest.mark.parametrize("binary", [True, False])
def test_text_goes_both_ways(client: Any, binary: bool) -> None:
    """BYTES tensors carry UTF-8 in binary and in JSON."""
    x = np.array([["a", "gr\u00fc\u00df dich", "b'x'"]], dtype=object)
    encoded = np.array([[item.encode() for item in x[0]]], dtype=object)
    wish = tritonclient.http.InferRequestedOutput("y", binary_data=binary)
    result = client.infer("text", [tensor("x", encoded, "BYTES", binary)], outputs=[wish]).as_numpy("y")
    assert [item if isinstance(item, str) else item.decode() for item in result[0]] == x[0].tolist()


def test_ids_are_echoed(client: Any) -> None:
    """Any string comes back as the request's id."""
    x = tensor("x", np.zeros((1, 8), np.float32), "FP32")
    assert (
        client.infer("model", [x], request_id="caf\u00e9-\u2603").get_response()["id"] == "caf\u00e9-\u2603"
    )
    assert "id" not in client.infer("model", [x]).get_response()


def test_triton_client_reports_our_errors(client: Any) -> None:
    """An error's message reaches the client's user."""
    wrong = tensor("x", np.zeros((1, 9), np.float32), "FP32")
    with pytest.raises(InferenceServerException, match=r"\[1, 9\]"):
        client.infer("model", [wrong])
    with pytest.raises(InferenceServerException, match="'nothing' is not found"):
        client.infer("nothing", [wrong])
    half = tensor("x", np.zeros((1, 3), np.float16), "FP16")
    wish = tritonclient.http.InferRequestedOutput("y", binary_data=False)
    with pytest.raises(InferenceServerException, match="no JSON form"):
        client.infer("half", [half], outputs=[wish])
    not_utf8 = tensor("x", np.array([[b"\xff", b"", b""]], dtype=object), "BYTES")
    with pytest.raises(InferenceServerException, match="not UTF-8"):
        client.infer("text", [not_utf8])


def test_a_model_can_be_unloaded_and_loaded_again(client: Any) -> None:
    """Unloaded, it stays in the index and answers 'not ready'; loaded again, it serves."""
    x = tensor("x", np.ones((1, 3), np.float16), "FP16")
    client.unload_model("half")
    assert not client.is_model_ready("half")
    states = {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}
    assert states["half"] == "UNAVAILABLE"
    with pytest.raises(InferenceServerException):
        client.infer("half", [x])
    client.load_model("half")
    client.load_model("half")
    assert client.infer("half", [x]).as_numpy("y").tolist() == [[1, 1, 1]]
    client.unload_model("nothing")
    with pytest.raises(InferenceServerException, match="not installed"):
        client.load_model("nothing")


def test_the_asynchronous_client_works_too(agent: AgentProcess) -> None:
    """Many requests at once over tritonclient.http.aio each get their own answer."""
    session = session_of(linear())

    async def one(client: Any, value: float) -> None:
        x = np.full((1, 8), value, np.float32)
        result = await client.infer("model", [tensor("x", x, "FP32")])
        direct = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(result.as_numpy("scores"), direct, rtol=1e-5, atol=1e-6)

    async def main() -> None:
        async with tritonclient.http.aio.InferenceServerClient(agent.http) as client:
            await asyncio.gather(*(one(client, float(i)) for i in range(40)))

    asyncio.run(main())


# Shared memory


@pytest.fixture
def region() -> Iterator[Any]:
    """A shared memory object of 4,096 bytes, made by Triton's own helper."""
    handle = shm.create_shared_memory_region("frames", f"edgekit-test-{os.getpid()}", 4096)
    yield handle
    shm.destroy_shared_memory_region(handle)


def test_tensors_may_pass_through_shared_memory(client: Any, region: Any) -> None:
    """Inputs are read from, and outputs written to, a region of another process."""
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    client.register_system_shared_memory("frames", f"edgekit-test-{os.getpid()}", 4096)
    status = client.get_system_shared_memory_status()
    assert [(entry["name"], entry["byte_size"]) for entry in status] == [("frames", 4096)]
    with pytest.raises(InferenceServerException, match="already"):
        client.register_system_shared_memory("frames", "other", 4096)
    for value in (1.0, -2.0):
        x = np.full((2, 8), value, np.float32)
        shm.set_shared_memory_region(region, [x], offset=64)
        sent = tritonclient.http.InferInput("x", [2, 8], "FP32")
        sent.set_shared_memory("frames", x.nbytes, offset=64)
        wish = tritonclient.http.InferRequestedOutput("scores")
        wish.set_shared_memory("frames", 32, offset=1024)
        result = client.infer("model", [sent], outputs=[wish])
        assert "parameters" not in result.get_output("scores")  # which perf_analyzer would not understand
        got = shm.get_contents_as_numpy(region, np.float32, [2, 4], offset=1024)
        np.testing.assert_array_equal(got, session_of(linear()).run(None, {"x": x})[0])
    client.unregister_system_shared_memory("frames")
    client.unregister_system_shared_memory("frames")
    with pytest.raises(InferenceServerException, match="not registered"):
        client.infer("model", [sent])


def test_shared_memory_is_held_to_its_bounds(client: Any, region: Any) -> None:
    """Nothing outside a region is read or written, and only shared memory objects can be registered."""
    key = f"edgekit-test-{os.getpid()}"
    for bad_key, size in ((key, 4097), ("none", 16), ("../../etc/passwd", 16), ("..", 16)):
        with pytest.raises(InferenceServerException):
            client.register_system_shared_memory("bad", bad_key, size)
    client.register_system_shared_memory("part", key, 64, offset=32)
    sent = tritonclient.http.InferInput("x", [2, 8], "FP32")
    for size, offset in ((64, 4), (32, 0)):
        sent.set_shared_memory("part", size, offset=offset)
        with pytest.raises(InferenceServerException):
            client.infer("model", [sent])
    sent.set_data_from_numpy(np.ones((2, 8), np.float32))
    wish = tritonclient.http.InferRequestedOutput("scores")
    wish.set_shared_memory("part", 16)
    with pytest.raises(InferenceServerException, match="32 bytes"):
        client.infer("model", [sent], outputs=[wish])
    client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException, match="no CUDA"):
        client.register_cuda_shared_memory("gpu", b"handle", 0, 16)


def test_half_a_character_names_no_shared_memory(agent: AgentProcess) -> None:
    """JSON can carry what is in no object's name: it is refused as any other key that cannot be one."""
    for key in ("\ud800", "\udc80"):
        body = {"key": key, "offset": 0, "byte_size": 16}
        status, document = request(agent, "/v2/systemsharedmemory/region/half/register", body)
        assert status == 400
        assert "cannot be the key" in document["error"]


# JSON by hand


def test_plain_json_is_enough(agent: AgentProcess) -> None:
    """A client without any library gets a JSON answer, whatever Content-Type it claims."""
    direct = session_of(linear()).run(None, {"x": np.arange(8, dtype=np.float32)[None]})[0]
    for content_type in ("application/json", "application/octet-stream", "text/plain"):
        status, document = request(
            agent, "/v2/models/model/infer", infer_body(), headers={"Content-Type": content_type}
        )
        assert status == 200
        (output,) = document["outputs"]
        assert output["shape"] == [1, 4]
        assert np.array(output["data"], np.float32).tolist() == direct[0].tolist()


@pytest.mark.parametrize(
    ("path", "body", "method", "status"),
    [
        ("/v2/models/none", None, "", 404),
        ("/v2/models/model/versions/7", None, "", 404),
        ("/v2/models/model/versions/7/infer", infer_body(), "", 404),
        ("/nothing", None, "", 404),
        ("/v2/models/model/infer", None, "GET", 405),
        ("/v2/models/model", b"{}", "POST", 405),
        ("/v2/repository/index", None, "GET", 405),
        ("/v2/models/model/infer", b"not json", "", 400),
        ("/v2/models/model/infer", infer_body(9), "", 400),
        ("/v2/repository/index", b"[]", "", 400),
    ],
)
def test_errors_have_a_status_and_a_reason(
    agent: AgentProcess, path: str, body: Any, method: str, status: int
) -> None:
    """Every error is JSON with the key 'error'."""
    got, document = request(agent, path, body, method)
    assert got == status
    assert document["error"]


def test_an_unknown_content_encoding_is_501(agent: AgentProcess) -> None:
    """A coding that is not offered is told apart from a damaged one."""
    path = "/v2/models/model/infer"
    assert request(agent, path, b"x", headers={"Content-Encoding": "br"})[0] == 501
    assert request(agent, path, b"x", headers={"Content-Encoding": "gzip"})[0] == 400


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v2/repository/index", {"ready": True}, (200, "READY")),
        ("/v2/systemsharedmemory/region/r/register", {"key": "nowhere", "byte_size": 4}, (400, "nowhere")),
        ("/v2/repository/models/nothing/load", {"parameters": {}}, (400, "not installed")),
    ],
)
def test_every_body_may_be_compressed_and_is_bounded(
    agent: AgentProcess, path: str, body: Any, answer: Tuple[int, str]
) -> None:
    """What holds for inference holds for each path: both codings are read, others are 501, bombs are 413."""
    plain = json.dumps(body).encode()
    for coding, packed in (("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain))):
        status, document = request(agent, path, packed, headers={"Content-Encoding": coding})
        assert (status, answer[1] in str(document)) == (answer[0], True)
        assert request(agent, path, plain)[0] == status
    bomb = gzip.compress(plain + b" " * MAX_BODY_BYTES)
    status, document = request(agent, path, bomb, headers={"Content-Encoding": "gzip"})
    assert (status, "when decompressed" in document["error"]) == (413, True)
    for coding, expected in (("br", 501), ("gzip", 400)):
        status, document = request(agent, path, plain, headers={"Content-Encoding": coding})
        assert (status, "Content-Encoding" in document["error"]) == (expected, True)


# Sockets


INFER = json.dumps(infer_body()).encode()
HEAD = b"POST /v2/models/model/infer HTTP/1.1\r\nHost: device\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(INFER) + INFER


def test_a_connection_serves_many_requests(agent: AgentProcess) -> None:
    """HTTP/1.1 connections stay open, in whatever pieces the bytes come."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for step in (1, 7, 100, len(WHOLE)):
            for start in range(0, len(WHOLE), step):
                sock.sendall(WHOLE[start : start + step])
            assert read_response(stream)[0] == 200


def test_requests_sent_ahead_are_answered_in_order(agent: AgentProcess) -> None:
    """Pipelined requests get their answers one after the other."""
    count = 50
    bodies = [json.dumps(infer_body(id=str(i))).encode() for i in range(count)]
    data = b"".join(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies)
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(data)
            ids = [json.loads(read_response(stream)[2])["id"] for _ in range(count)]
            assert ids == [str(i) for i in range(count)]


def test_nonsense_after_good_requests_does_not_cost_their_answers(agent: AgentProcess) -> None:
    """What came whole before a broken request is answered, and then the connection ends."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(WHOLE + WHOLE + b"nonsense\r\n\r\n")
        assert [read_response(stream)[0] for _ in range(2)] == [200, 200]
        assert stream.read() == b""


def test_head_has_no_body(agent: AgentProcess) -> None:
    """HEAD is answered without a body, so that the next answer on the connection is not misread."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(b"HEAD /v2 HTTP/1.1\r\n\r\n")
        status, headers, body = read_response(stream)
        assert (status, headers["content-length"], body) == (405, "0", b"")
        sock.sendall(WHOLE)
        assert read_response(stream)[0] == 200


def test_a_client_that_sends_too_much_still_reads_why(agent: AgentProcess) -> None:
    """The 413 arrives even while the client is busy sending."""
    body = b"x" * (MAX_BODY_BYTES + 1)
    status, document = request(agent, "/v2/models/model/infer", body)
    assert status == 413
    assert str(MAX_BODY_BYTES) in document["error"]


def test_chunked_bodies_are_read(agent: AgentProcess) -> None:
    """Transfer-Encoding: chunked works as Content-Length does."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (INFER[:3], INFER[3:100], INFER[100:]))
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            assert read_response(stream)[0] == 200


def test_a_client_that_asks_first_is_told_to_go_on(agent: AgentProcess) -> None:
    """Expect: 100-continue gets its interim answer, and then the real one."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(INFER))
        assert stream.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert stream.readline() == b"\r\n"
        sock.sendall(INFER)
        assert read_response(stream)[0] == 200


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_connection_close_is_honoured(agent: AgentProcess, version: bytes) -> None:
    """A client that will not come back finds the connection closed after its answer."""
    closing = b"" if version == b"1.0" else b"Connection: close\r\n"
    status, headers, _ = send_raw(agent, b"GET /v2 HTTP/" + version + b"\r\n" + closing + b"\r\n")
    assert (status, headers["connection"]) == (200, "close")


def test_http_1_0_clients_may_keep_the_connection(agent: AgentProcess) -> None:
    """With Connection: keep-alive, an HTTP/1.0 client is told that it may send more."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            status, headers, _ = read_response(stream)
            assert (status, headers["connection"]) == (200, "keep-alive")


@pytest.mark.parametrize("offset", range(4))
def test_large_bodies_arrive_whole(agent: AgentProcess, tmp_path: Path, offset: int) -> None:
    """A body of megabytes, sent in uneven pieces and with its tensor at any offset, is read bit for bit."""
    texts = [f"{i:07d}" * 9000 for i in range(3)]
    raw = b"".join(len(t).to_bytes(4, "little") + t.encode() for t in texts)
    head = json.dumps({
        "id": "i" * offset,
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(raw)}}],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(
                b"POST /v2/models/text/infer HTTP/1.1\r\nInference-Header-Content-Length: %d\r\n"
                b"Content-Length: %d\r\n\r\n" % (len(head), len(head) + len(raw)) + head
            )
            for start in range(0, len(raw), 50_001):
                sock.sendall(raw[start : start + 50_001])
            status, headers, body = read_response(stream)
            assert status == 200
            assert body[int(headers["inference-header-content-length"]) :] == raw


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (HEAD + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), 413),
        (HEAD + b"X: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_not_a_request_is_answered_and_closed(agent: AgentProcess, data: bytes, status: int) -> None:
    """Broken or oversize requests get a status before the connection ends; others go on unharmed."""
    got, headers, body = send_raw(agent, data)
    assert got == status
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]
    assert request(agent, "/v2/health/live")[0] == 200


def test_a_chunked_body_cannot_exceed_the_limit(agent: AgentProcess) -> None:
    """Without a Content-Length, the limit holds for what actually arrives."""
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(MAX_BODY_BYTES // 0x10000 + 2):
                sock.sendall(chunk)
            assert read_response(stream)[0] == 413
        except (BrokenPipeError, ConnectionResetError):
            return  # the agent closed while the rest was on its way


@pytest.mark.parametrize("data", [b"", b"POST /v2/mod", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{"])
def test_slow_clients_are_closed(agent: AgentProcess, data: bytes) -> None:
    """A connection that never finishes its request does not stay open."""
    with connect(agent) as sock:
        sock.sendall(data)
        answer = sock.recv(10_000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408")


def test_clients_that_vanish_harm_nobody(agent: AgentProcess, client: Any) -> None:
    """Connections cut at any byte leave the agent serving and its queue empty."""
    for cut in range(0, len(WHOLE) + 1, 11):
        with connect(agent) as sock:
            sock.sendall(WHOLE[:cut])
    for _ in range(20):
        with connect(agent) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not close
            sock.sendall(WHOLE)
    x = tensor("x", np.ones((1, 8), np.float32), "FP32")
    assert client.infer("model", [x]).as_numpy("scores").shape == (1, 4)
    assert "Traceback" not in agent.log()


# The other port


def test_prometheus_can_scrape(agent: AgentProcess, client: Any) -> None:
    """/metrics has the histograms by model and digest, and / is a page for people."""
    client.infer("model", [tensor("x", np.ones((1, 8), np.float32), "FP32")])
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=10) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        text = response.read().decode()
    for name in ("queue_seconds", "compute_seconds", "total_seconds", "batch_rows"):
        assert f"# TYPE edgekit_inference_{name} histogram" in text
    assert 'edgekit_queue_depth{digest="' in text
    with urllib.request.urlopen(f"http://{agent.metrics}/", timeout=10) as response:
        assert b"<td>text</td>" in response.read()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://{agent.metrics}/other", timeout=10)
    assert caught.value.code == 404
    caught.value.close()


# Load


def slow_model(loops: int) -> Any:
    """``y`` is ``x`` after a chain of matrix products that takes some milliseconds."""
    from onnx import numpy_helper

    weights = numpy_helper.from_array((np.eye(512) * 1.0).astype(np.float32), "w")
    names = ["x", *[f"h{i}" for i in range(loops - 1)], "y"]
    nodes = [helper.make_node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(loops)]
    spec = [TensorSpec("x", "FP32", (-1, 512)), TensorSpec("y", "FP32", (-1, 512))]
    return make_model(nodes, spec[:1], spec[1:], [weights])


def slow_request(**parameters: int) -> bytes:
    """A whole request to :func:`slow_model`."""
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 512], "datatype": "FP32", "data": [1.0] * 512}],
        "parameters": parameters,
    }).encode()  # fmt: skip
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_what_cannot_meet_the_objective_is_refused(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """Where a single run takes longer than ``slo_ms``, the client is told at once and nothing is computed."""
    golden = {"x": np.ones((1, 512), np.float32)}
    agent = start_agent(
        write_bundle(tmp_path / "b", slow_model(400), golden), settings="[models.model]\nslo_ms = 0.5\n"
    )
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(slow_request())
        status, headers, text = read_response(stream)
    assert (status, headers["retry-after"]) == (503, "1")
    assert b"cannot be answered in time" in text
    status, stats = request(agent, "/v2/models/model/stats")
    assert stats["model_stats"][0]["execution_count"] == 0


def test_a_higher_priority_is_served_first(start_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """A request of level 1 overtakes those of level 2 that wait; the config shows the levels."""
    golden = {"x": np.ones((1, 512), np.float32)}
    agent = start_agent(
        write_bundle(tmp_path / "b", slow_model(400), golden, max_batch_size=1),
        settings="[models.model.batching]\npriority_levels = 2\ndefault_priority_level = 2\n",
    )
    _, document = request(agent, "/v2/models/model/config")
    assert document["dynamic_batching"]["priority_levels"] == 2
    sockets = {connect(agent): level for level in [0] * 12 + [1]}
    for sock, level in sockets.items():
        sock.sendall(slow_request(priority=level))
    order = []
    while len(order) < len(sockets):
        readable, _, _ = select.select([sock for sock in sockets if sock not in order], [], [], 20)
        order += readable
    for sock in sockets:
        sock.close()
    assert [sockets[sock] for sock in order].index(1) < 9


def test_a_full_queue_is_503_with_advice(start_agent: Callable[..., AgentProcess], tmp_path: Path) -> None:
    """More than the queue holds is refused at once with Retry-After; all others are answered."""
    bundle = write_bundle(
        tmp_path / "b", slow_model(400), {"x": np.ones((1, 512), np.float32)}, max_batch_size=1
    )
    agent = start_agent(bundle, settings="[limits]\nmax_queue_size = 3\n")
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 512], "datatype": "FP32", "data": [1.0] * 512}]
    }).encode()  # fmt: skip
    data = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    sockets: List[socket.socket] = [connect(agent) for _ in range(24)]
    for sock in sockets:
        sock.sendall(data)
    statuses = []
    for sock in sockets:
        with sock, sock.makefile("rb") as stream:
            status, headers, _ = read_response(stream)
            statuses.append(status)
            assert (headers.get("retry-after") == "1") == (status == 503)
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 4


def test_clients_that_give_up_free_their_place(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """Requests of disconnected clients leave the queue without being computed."""
    bundle = write_bundle(
        tmp_path / "b", slow_model(400), {"x": np.ones((1, 512), np.float32)}, max_batch_size=1
    )
    agent = start_agent(bundle)
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 512], "datatype": "FP32", "data": [1.0] * 512}]
    }).encode()  # fmt: skip
    data = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    leaving = [connect(agent) for _ in range(40)]
    for sock in leaving:
        sock.sendall(data)
    for sock in leaving:
        sock.close()
    assert request(agent, "/v2/models/model/infer", body)[0] == 200
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        _, stats = request(agent, "/v2/models/model/stats")
        if stats["model_stats"][0]["inference_stats"]["queue"]["count"]:
            break
    assert stats["model_stats"][0]["execution_count"] < 40
