"""Clients that are hostile, broken or unlucky: the agent answers them or drops them, and serves on."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import numpy as np
import pytest

from agent_testing import (
    AgentProcess,
    StandInTransport,
    connect,
    identity,
    install,
    linear_bundle,
    read_response,
    write_bundle,
)
from device_agent.config import Limits
from device_agent.manifest import TensorSpec
from device_agent.server.connection import Connection
from device_agent.server.fields import ProtocolError
from device_agent.server.http import HttpServer
from device_agent.server.interface import ModelInterface
from device_agent.server.protocol import ModelProtocol
from device_agent.server.request import Request

INFER = "/v2/models/model/infer"
SETTINGS = "[limits]\nmax_body_bytes = 4194304\nheader_timeout_s = 60\ndrain_timeout_s = 60\n"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """An agent with two models: ``model`` (linear) and ``text`` (BYTES, gives back what it gets)."""
    root = tmp_path_factory.mktemp("robust")
    running = AgentProcess(root, SETTINGS)
    text = write_bundle(root / "text", identity("BYTES"), {"x": np.array([["a", "b", "c"]])}, name="text")
    install(root / "state", [linear_bundle(root / "linear"), text])
    yield running.start()
    running.kill()


def good_body(rows: int = 1) -> bytes:
    """A valid request to ``model``."""
    data = [0.5] * 8 * rows
    return json.dumps({
        "inputs": [{"name": "x", "shape": [rows, 8], "datatype": "FP32", "data": data}]
    }).encode()  # fmt: skip


def post(body: bytes, headers: bytes = b"", path: str = INFER) -> bytes:
    """A POST with a Content-Length."""
    head = b"POST %s HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n%s\r\n"
    return head % (path.encode(), len(body), headers) + body


def exchange(agent: AgentProcess, data: bytes) -> Tuple[int, Dict[str, str], bytes]:
    """Write bytes and read one response."""
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(data)
        return read_response(stream)


# Framing


def test_a_wish_to_upgrade_is_ignored(agent: AgentProcess) -> None:
    """A client that offers HTTP/2 with its first POST, as Java's does, is served in HTTP/1.1 on and on."""
    wish = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    )
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(good_body()), good_body())
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for data in (
            post(good_body(), wish),
            b"GET /v2/health/live HTTP/1.1\r\nHost: d\r\n" + wish + b"\r\n",
            b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n%s\r\n%s" % (INFER.encode(), wish, chunk),
            post(good_body(), wish) + post(good_body()),
        ):
            sock.sendall(data)
            assert read_response(stream)[0] == 200
        assert read_response(stream)[0] == 200


def test_a_long_body_behind_a_wish_to_upgrade_arrives(agent: AgentProcess) -> None:
    """So is one whose body comes in many pieces."""
    text = "x" * 300_000
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "BYTES", "data": [text, "", "b"]}]
    }).encode()  # fmt: skip
    wish = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    status, _, answer = exchange(agent, post(body, wish, "/v2/models/text/infer"))
    assert status == 200
    assert json.loads(answer)["outputs"][0]["data"] == [text, "", "b"]


@pytest.mark.parametrize(
    ("framing", "status"),
    [
        (b"Transfer-Encoding: gzip, chunked\r\n", 501),
        (b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", 501),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
        (b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"Content-Length: 3\r\nContent-Length: 3\r\n", 400),
        (b"Content-Length: 3, 3\r\n", 400),
        (b"Content-Length: +3\r\n", 400),
        (b"Content-Length: 99999999999999999999\r\n", 400),
        (b"Content-Length: 999999999999999999\r\n", 413),
        (b"Content-Length: 999999999999999999 \r\n", 413),
        (b"Transfer-Encoding: chunked, identity\r\n", 400),
        (b"Transfer-Encoding : chunked\r\n", 400),
    ],
)
def test_a_body_has_one_length_for_everybody(agent: AgentProcess, framing: bytes, status: int) -> None:
    """What a proxy in front could read differently is refused, and nothing behind it is a request."""
    hidden = b"3\r\nabc\r\n0\r\n\r\nGET /v2/health/live HTTP/1.1\r\nHost: d\r\n\r\n"
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(b"POST %s HTTP/1.1\r\nHost: d\r\n%s\r\n%s" % (INFER.encode(), framing, hidden))
        assert read_response(stream)[0] == status
        assert stream.read() == b""


def test_trailers_change_nothing(agent: AgentProcess) -> None:
    """A header behind the body does not say how to read it."""
    body = good_body()
    head = b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    data = b"%x\r\n%s\r\n0\r\nContent-Encoding: gzip\r\n\r\n" % (len(body), body)
    with connect(agent) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(head + data)
            assert read_response(stream)[0] == 200


@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"3;"])
def test_framing_without_end_is_refused(agent: AgentProcess, endless: bytes) -> None:
    """Trailers and chunk extensions have a limit, as the head has."""
    head = b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    assert exchange(agent, head + endless + b"a" * 80_000)[0] == 431


def test_a_body_in_tiny_chunks_is_read(agent: AgentProcess) -> None:
    """The limit on framing is for what is not needed: a body in chunks of one byte is served."""
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in good_body(8) + b" " * 30_000)
    head = b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode()
    assert exchange(agent, head + body + b"0\r\n\r\n")[0] == 200


@pytest.mark.parametrize("length", [b"9" * 5000, b"12, 12", b"-1", b"1e3", b""])
@pytest.mark.parametrize("padding", [b"", b" " * 50_000])
def test_the_length_of_the_json_is_a_number(agent: AgentProcess, length: bytes, padding: bytes) -> None:
    """Anything else in Inference-Header-Content-Length is a 400, also while the body still comes."""
    headers = b"Inference-Header-Content-Length: %s\r\n" % length
    assert exchange(agent, post(good_body() + padding, headers))[0] == 400


def test_contradicting_headers_do_not_win(agent: AgentProcess) -> None:
    """A repeated header is neither the first nor the last: both are read."""
    twice = b"Content-Encoding: gzip\r\nContent-Encoding: identity\r\n"
    assert exchange(agent, post(good_body(), twice))[0] == 501
    lengths = b"Inference-Header-Content-Length: 5\r\nInference-Header-Content-Length: %d\r\n" % len(
        good_body()
    )
    assert exchange(agent, post(good_body(), lengths))[0] == 400


# Clients that do not read, or send too slowly


def test_a_client_that_does_not_read_is_not_read_from(agent: AgentProcess) -> None:
    """Answers that nobody takes do not pile up in the agent: it stops reading that client's requests."""
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "BYTES", "data": ["a" * 200_000, "", ""]}]
    }).encode()  # fmt: skip
    data = post(body, path="/v2/models/text/infer")
    sent = 0
    with connect(agent) as sock:
        sock.setblocking(False)
        while sent < 100 * len(data) and select.select([], [sock], [], 1.0)[1]:
            sent += sock.send(data[sent % len(data) :])
        # What fits into the kernel's buffers on both ways, and a few requests in the agent itself.
        assert sent < 60 * len(data)
        sock.settimeout(20)
        with sock.makefile("rb") as stream:
            for _ in range(sent // len(data)):
                status, _, answer = read_response(stream)
                assert (status, json.loads(answer)["outputs"][0]["data"][0]) == (200, "a" * 200_000)


def driven(limits: Limits) -> Tuple[Connection, StandInTransport, List[Request]]:
    """A connection without a socket whose handler only keeps the requests."""
    handled: List[Request] = []
    connection = Connection(
        HttpServer(lambda request, connection: handled.append(request), limits, lambda status: None)
    )
    transport = StandInTransport()
    connection.connection_made(transport)  # type: ignore[arg-type]  # a double
    return connection, transport, handled


def feed(connection: Connection, data: bytes) -> None:
    """Receive ``data``."""
    buffer = connection.get_buffer(-1)
    buffer[: len(data)] = data
    connection.buffer_updated(len(data))


@pytest.mark.parametrize("behind", [post(b"abc")[:-1], post(b"abc"), b"nonsense\r\n\r\n", b"GET"])
def test_a_slow_second_request_does_not_cost_the_first_its_answer(behind: bytes) -> None:
    """Whatever a client sends while its request is computed, the answer is sent, however long it takes."""

    async def main() -> None:
        connection, transport, handled = driven(Limits())
        feed(connection, post(b"first"))
        feed(connection, behind)
        for seconds in (1e6, 2e6, 3e6):
            connection.close_if_overdue(seconds)
        assert transport.open
        connection.respond(200, [b"done"])
        assert transport.written.endswith(b"\r\n\r\ndone")
        assert [bytes(request.body) for request in handled] == [b"first"]

    asyncio.run(main())


def test_requests_behind_a_refused_one_are_not_read() -> None:
    """After a request that cannot be received there is no telling where the next one starts."""

    async def main() -> None:
        errors: List[int] = []
        connection, transport, handled = driven(Limits(max_body_bytes=10))
        connection._server.count_error = errors.append
        chunks = b"b\r\nhello world\r\n5\r\nagain\r\n0\r\n\r\n"
        refused = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
        feed(connection, post(b"first") + refused + post(b"third"))
        connection.respond(200, [b"done"])
        await asyncio.sleep(0)
        assert [bytes(request.body) for request in handled] == [b"first"]
        assert not transport.open
        assert errors == [413]

    asyncio.run(main())


# Stopping


def test_clients_cannot_keep_the_agent_from_stopping(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """One that sends without an end, and one that reads nothing, are dropped when the agent stops."""
    text = write_bundle(tmp_path / "text", identity("BYTES"), {"x": np.array([["a", "b", "c"]])}, name="text")
    agent = start_agent(text, settings=SETTINGS)
    body = json.dumps({
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "BYTES", "data": ["a" * 3_000_000, "", ""]}]
    }).encode()  # fmt: skip
    with connect(agent) as half, connect(agent) as trickle, connect(agent) as deaf:
        half.sendall(post(good_body())[:-1])
        trickle.sendall(b"GET / HTTP")
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        data, sent = post(body, path="/v2/models/text/infer") * 4, 0
        while sent < len(data) and select.select([], [deaf], [], 0.5)[1]:
            sent += deaf.send(data[sent:])
        assert agent.stop() == 0  # waits for half of the time that a request may take


def test_requests_sent_ahead_are_answered_before_the_end(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """A stop answers all that came, also what waits its turn on one connection, and announces the end."""
    agent = start_agent(linear_bundle(tmp_path / "b"))
    count = 30
    with connect(agent) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(good_body()) * count)
        first = read_response(stream)
        agent.process.terminate()
        answers = [first] + [read_response(stream) for _ in range(count - 1)]
        assert [status for status, _, _ in answers] == [200] * count
        assert stream.read() == b""
    assert agent.process.wait(timeout=30) == 0


# Loading


def test_a_load_is_answered_whatever_is_left_of_the_model(
    start_agent: Callable[..., AgentProcess], tmp_path: Path
) -> None:
    """A model whose files vanished after it was unloaded does not load, and the client is told so."""
    agent = start_agent(linear_bundle(tmp_path / "b"))
    base = "/v2/repository/models/model"
    assert exchange(agent, post(b"{}", path=f"{base}/unload"))[0] == 200
    for path in tmp_path.glob("agent0/state/**/golden_inputs.npz"):
        path.unlink()
    status, _, answer = exchange(agent, post(b"{}", path=f"{base}/load"))
    assert status in (400, 500)
    assert json.loads(answer)["error"]
    assert exchange(agent, post(good_body()))[0] == 404


# Requests


def test_a_request_that_cannot_be_meant_is_refused_in_few_words() -> None:
    """Numbers beyond reason, nesting beyond reason and names beyond reason are a 400 with a short text."""
    interface = ModelInterface(
        "m", "1",
        [TensorSpec("x", "FP32", (-1, -1, -1)), TensorSpec("n", "INT64", (-1,))],
        [TensorSpec("y", "FP32", (-1,))],
        4,
    )  # fmt: skip
    protocol = ModelProtocol(interface)
    deep: Any = 1
    for _ in range(400):
        deep = [deep]

    def request(x: Any = (), n: Any = (), **changes: Any) -> Dict[str, Any]:
        first = {"name": "x", "datatype": "FP32", "shape": [1, 1, 1], "data": [1.0], **dict(x)}
        second = {"name": "n", "datatype": "INT64", "shape": [1], "data": [1], **dict(n)}
        return {"inputs": [first, second], **changes}

    protocol.decode(memoryview(json.dumps(request()).encode()), None)
    huge = int("9" * 4000)
    bad = [
        request(parameters={"timeout": huge}),
        request(parameters={"timeout": -1}),
        request(parameters={"timeout": 1.5}),
        request({"shape": [1, 0, huge], "data": []}),
        request({"shape": [1, 0, 2**62], "data": []}),
        request({"shape": [1, huge, huge]}),
        request({"shape": [1, 2**62, 2**62], "parameters": {"binary_data_size": 4}, "data": None}),
        request({"shape": [1] * 100_000}),
        request({"shape": [1, -1, 1]}),
        request({"shape": [1, True, 1]}),
        request({"shape": deep}),
        request({"datatype": deep}),
        request({"name": deep}),
        request({"name": "z" * 100_000}),
        request({"name": {"a": deep}}),
        request({"data": deep, "shape": [1, 1, 2]}),
        request({"data": [1e300]}),
        request({"data": [huge]}),
        request({"data": ["\ud800"]}),
        request(n={"data": [2**63]}),
        request(n={"data": [1.0]}),
        request({"parameters": {"binary_data_size": huge}}),
        request({"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": huge}}),
        request({"parameters": {"shared_memory_region": "r" * 100_000, "shared_memory_byte_size": 4}}),
        request(id=deep),
        request(outputs=[{"name": "y"}, {"name": "y"}]),
        request(outputs=[{"name": deep}]),
        request(outputs=deep),
        request(inputs=deep),
        {"inputs": [{"name": "x"}] * 1000},
        deep,
    ]
    for document in bad:
        with pytest.raises(ProtocolError) as caught:
            protocol.decode(memoryview(json.dumps(document).encode()), None)
        assert caught.value.status == 400
        assert len(caught.value.message) < 1000
    for text in (b"[" * 100_000, b'{"inputs":' + b"9" * 5000 + b"}", b'{"id":"\xff"}', b"", b"\0", b"nul"):
        with pytest.raises(ProtocolError) as caught:
            protocol.decode(memoryview(text), None)
        assert caught.value.status == 400


def test_a_shared_object_that_shrank_is_refused(agent: AgentProcess) -> None:
    """A client that truncates what it registered gets an error; the agent does not die of it."""
    path = Path(f"/dev/shm/edgekit-test-{os.getpid()}")
    path.write_bytes(np.ones((1, 8), np.float32).tobytes() * 512)
    region = "/v2/systemsharedmemory/region/shrinks"
    place = {"shared_memory_region": "shrinks", "shared_memory_offset": 8192, "shared_memory_byte_size": 32}
    one = {"name": "x", "shape": [1, 8], "datatype": "FP32", "parameters": place}
    ask = post(json.dumps({"inputs": [one]}).encode())
    answer = {"name": "scores", "parameters": {**place, "shared_memory_byte_size": 16}}
    put = post(json.dumps({**json.loads(good_body()), "outputs": [answer]}).encode())
    try:
        wanted = json.dumps({"key": path.name, "offset": 0, "byte_size": 16384}).encode()
        assert exchange(agent, post(wanted, path=f"{region}/register"))[0] == 200
        assert [exchange(agent, data)[0] for data in (ask, put)] == [200, 200]
        os.truncate(path, 4096)
        for data in (ask, put):
            status, _, text = exchange(agent, data)
            assert (status, b"shrunk" in text) == (400, True)
        os.truncate(path, 16384)
        assert [exchange(agent, data)[0] for data in (ask, put)] == [200, 200]
    finally:
        path.unlink()
        exchange(agent, post(b"{}", path=f"{region}/unregister"))
    assert exchange(agent, post(good_body()))[0] == 200


def test_regions_are_bounded(agent: AgentProcess) -> None:
    """A client that registers without end cannot use up the agent's file descriptors."""
    path = Path(f"/dev/shm/edgekit-many-{os.getpid()}")
    path.write_bytes(b"\0" * 4096)
    wanted = json.dumps({"key": path.name, "offset": 0, "byte_size": 4096}).encode()
    try:
        with connect(agent) as sock, sock.makefile("rb") as stream:
            statuses = []
            for number in range(300):
                sock.sendall(post(wanted, path=f"/v2/systemsharedmemory/region/r{number}/register"))
                statuses.append(read_response(stream)[0])
            sock.sendall(post(b"{}", path="/v2/systemsharedmemory/unregister"))
            assert read_response(stream)[0] == 200
        assert statuses == [200] * 256 + [400] * 44
    finally:
        path.unlink()
