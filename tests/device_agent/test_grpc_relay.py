"""gRPC on a socket that systemd opened: clients of Triton's own, while agents end and start."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from activation_kit import listen
from agent_testing import AgentProcess
from device_agent.config import Limits
from device_agent.server.frames import GOAWAY, Frames
from device_agent.server.grpc_relay import GrpcRelay

Activated = Callable[..., AgentProcess]
CLIENTS = 8


def address_of(listener: socket.socket) -> str:
    """Where clients connect."""
    host, port = listener.getsockname()
    return f"{host}:{port}"


def request(seed: int) -> Any:
    """An inference with inputs of its own."""
    value = tritonclient.grpc.InferInput("x", [1, 8], "FP32")
    value.set_data_from_numpy(np.full((1, 8), seed, np.float32))
    return [value]


# Clients


def test_a_new_start_of_the_agent_loses_no_call(activated: Activated) -> None:
    """While one agent ends and the next one starts, busy clients on open channels get every answer."""
    with listen() as listener:
        agent = activated({"grpc": listener}).start()
        assert f"grpc={address_of(listener)}" in agent.log()
        over = threading.Event()
        answered = [0] * CLIENTS
        problems: List[str] = []

        def ask(number: int) -> None:
            with tritonclient.grpc.InferenceServerClient(address_of(listener)) as client:
                first = client.infer("model", request(number)).as_numpy("y")
                while not over.is_set():
                    try:
                        found = client.infer("model", request(number)).as_numpy("y")
                        np.testing.assert_array_equal(found, first)
                        answered[number] += 1
                    except (InferenceServerException, AssertionError) as error:
                        problems.append(str(error))

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for each in clients:
            each.start()
        for _ in range(3):
            before = list(answered)
            wait_until(lambda before=before: all(n > b + 20 for n, b in zip(answered, before)))
            assert agent.stop() == 0
            agent.start()
        over.set()
        for each in clients:
            each.join(60)
        assert problems == []


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_calls_and_streams_end_as_elsewhere(activated: Activated) -> None:
    """Large messages pass both ways, and a stream that stays open ends with a status when the agent stops."""
    with listen() as listener:
        agent = activated({"grpc": listener}).start()
        with grpc.insecure_channel(address_of(listener)) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            large = service_pb2.ModelInferRequest(model_name="model")
            large.inputs.add(name="x", datatype="FP32", shape=[200_000, 8])
            large.raw_input_contents.append(bytes(200_000 * 8 * 4))
            with pytest.raises(grpc.RpcError, match="batch"):
                stub.ModelInfer(large, timeout=60)
            streamed = stub.ModelStreamInfer(_small_and_open(), timeout=60)
            assert next(streamed).infer_response.id == "first"
            assert agent.stop() == 0
            with pytest.raises(grpc.RpcError, match="the agent is stopping"):
                next(streamed)


def _small_and_open() -> Any:
    small = service_pb2.ModelInferRequest(model_name="model", id="first")
    small.inputs.add(name="x", datatype="FP32", shape=[1, 8])
    small.raw_input_contents.append(bytes(32))
    yield small
    threading.Event().wait(20)  # the client keeps its side of the stream open


def test_clients_that_send_nothing_or_nonsense_are_let_go(activated: Activated) -> None:
    """Neither keeps the agent from stopping, and others are served beside them."""
    with listen() as listener:
        agent = activated(
            {"grpc": listener}, "[limits]\nheader_timeout_s = 1.0\nmax_connections = 4\n"
        ).start()
        silent, wrong = (socket.create_connection(listener.getsockname(), timeout=20) for _ in range(2))
        with silent, wrong, tritonclient.grpc.InferenceServerClient(address_of(listener)) as client:
            wrong.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while wrong.recv(4096):
                pass
            assert client.is_model_ready("model")
            while silent.recv(4096):
                pass  # closed after header_timeout_s
            crowd = [socket.create_connection(listener.getsockname(), timeout=20) for _ in range(4)]
            assert crowd[-1].recv(1) == b""  # one more than are allowed
            assert client.is_model_ready("model")
            for each in crowd:
                each.close()
        assert agent.stop() == 0
        assert "Traceback" not in agent.log()


def test_nothing_is_left_behind(
    activated: Activated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The private socket lies in a directory that only the agent may enter, and goes with it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with listen() as listener:
        agent = activated({"grpc": listener}).start()
        (private,) = (tmp_path / "tmp").glob("edgekit-grpc-*")
        assert private.stat().st_mode & 0o777 == 0o700
        assert agent.stop() == 0
    assert not private.exists()


class Settings(asyncio.Protocol):
    """A double of gRPC's side, which says no more than its first frame: the relay looks at no other."""

    def connection_made(self, transport: Any) -> None:
        """Send the settings that come first."""
        transport.write(b"\0\0\0\x04\0" + bytes(4))


@pytest.mark.parametrize("turns", range(8))
def test_who_connects_as_the_agent_ends_is_told_or_waits(turns: int) -> None:
    """At whatever turn of the loop it is accepted: a client reads that it should go, or is not accepted."""

    async def received() -> bytes:
        loop = asyncio.get_running_loop()
        relay = GrpcRelay(Limits())
        server = await loop.create_unix_server(Settings, relay.address[len("unix:") :])
        with listen() as listener, socket.create_connection(listener.getsockname(), timeout=1) as client:
            await relay.serve(listener.dup())
            for _ in range(turns):
                await asyncio.sleep(0)
            await relay.let_go(1.0)
            reading = loop.run_in_executor(None, read_until, client, GOAWAY)
            listener.settimeout(0.2)
            try:
                listener.accept()[0].close()  # as the next agent would: it was not accepted before
                return GOAWAY
            except socket.timeout:
                return await reading
            finally:
                await reading
                await relay.close()
                server.close()

    assert GOAWAY in asyncio.run(received())


def read_until(client: socket.socket, end: bytes) -> bytes:
    """What comes, up to ``end``, the end of the connection, or its timeout."""
    data = b""
    with contextlib.suppress(OSError):
        while end not in data:
            more = client.recv(4096)
            if not more:
                break
            data += more
    return data


# Frames


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """A frame of HTTP/2 on stream 1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + (1).to_bytes(4, "big") + payload


#: What one side sends: data, settings, and blocks of header fields in one to three frames.
pieces = st.one_of(
    st.binary(max_size=30).map(lambda data: [frame(0, 1, data)]),
    st.just([frame(4, 1, b"")]),
    st.lists(st.binary(max_size=10), min_size=1, max_size=3).map(
        lambda parts: [
            frame(1 if number == 0 else 9, 4 if number == len(parts) - 1 else 0, part)
            for number, part in enumerate(parts)
        ]
    ),
)


@given(st.lists(pieces, min_size=1, max_size=6), st.lists(st.integers(1, 40), min_size=1))
def test_a_frame_fits_wherever_it_is_said_to(groups: List[List[bytes]], cuts: List[int]) -> None:
    """However the bytes arrive, every place lies after a whole frame, and never inside a block of headers."""
    places, end = set(), 0
    for group in groups:
        end += len(b"".join(group))
        places.add(end)
    stream = b"".join(map(b"".join, groups))
    frames, position, turn = Frames(), 0, 0
    assert not frames.between
    while position < len(stream):
        part = stream[position : position + cuts[turn % len(cuts)]]
        found = frames.advance(part)
        inside = [place - position for place in sorted(places) if position < place <= position + len(part)]
        assert found == (inside[0] if inside else None)
        position += len(part)
        assert frames.between == (position in places)
        turn += 1


def test_the_frame_is_what_the_standard_says() -> None:
    """GOAWAY on the connection itself, the highest stream there can be, no error."""
    kinds: Dict[str, Tuple[int, int]] = {"length": (0, 3), "type": (3, 4), "stream": (5, 9), "last": (9, 13)}
    values = {key: int.from_bytes(GOAWAY[a:b], "big") for key, (a, b) in kinds.items()}
    assert values == {"length": 8, "type": 7, "stream": 0, "last": 2**31 - 1}
    assert GOAWAY[13:] == bytes(4)
