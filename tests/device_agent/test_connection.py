"""A connection without a socket: every way in which bytes can be cut, and every kind of nonsense."""

from __future__ import annotations

import asyncio
from typing import Any, Callable, List, Tuple

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_testing import StandInTransport
from device_agent.config import Limits
from device_agent.server.connection import Connection
from device_agent.server.http import HttpServer
from device_agent.server.request import Request

LIMITS = Limits(max_body_bytes=100_000)
LARGE = Limits(max_body_bytes=200_000)


def echo(request: Request, connection: Connection) -> None:
    """Answer with the body."""
    connection.respond(200, [bytes(request.body)])


def echo_later(request: Request, connection: Connection) -> None:
    """Answer with the body in a later turn of the loop."""
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: loop.call_soon(connection.respond, 200, [bytes(request.body)]))


def exchange(
    data: bytes, cuts: List[int], handler: Callable[[Request, Connection], None], limits: Limits = LIMITS
) -> StandInTransport:
    """Feed ``data``, cut at the given places, and return what came of it."""

    async def main() -> StandInTransport:
        transport = StandInTransport()
        connection = Connection(HttpServer(handler, limits, lambda status: None))
        connection.connection_made(transport)  # type: ignore[arg-type]  # a double
        edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
        for start, stop in zip(edges, edges[1:]):
            position = start
            while position < stop and transport.open:
                while transport.open and not transport.reading:
                    await asyncio.sleep(0)
                buffer = connection.get_buffer(-1)
                count = min(len(buffer), stop - position)
                buffer[:count] = data[position : position + count]
                connection.buffer_updated(count)
                position += count
        for _ in range(400):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        return transport

    return asyncio.run(main())


def responses(written: bytes) -> List[Tuple[int, bytes]]:
    """Status and body of each response."""
    parsed = []
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        if head == b"HTTP/1.1 100 Continue":  # announces a response, and is none
            written = rest
            continue
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        parsed.append((int(head.split()[1]), rest[:length]))
        written = rest[length:]
    return parsed


def with_length(body: bytes) -> bytes:
    """A request whose body has a Content-Length."""
    return b"POST /x HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def chunked(body: bytes) -> bytes:
    """A request whose body comes in chunks."""
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (body[:half], body[half:]) if p)
    return b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def repeated(seed: bytes, size: int) -> bytes:
    """A body larger than what is read at once."""
    return (seed * (size // len(seed) + 1))[:size]


bodies = st.one_of(
    st.binary(max_size=50),
    st.builds(repeated, st.binary(min_size=4, max_size=4), st.integers(10_000, 60_000)),
)
handlers = st.sampled_from([echo, echo_later])


@settings(deadline=None)
@given(
    st.lists(st.tuples(bodies, st.sampled_from([with_length, chunked])), min_size=1, max_size=5),
    st.lists(st.integers(0, 400_000), max_size=12),
    handlers,
)
def test_requests_are_read_however_they_are_cut(plan: Any, cuts: List[int], handler: Any) -> None:
    """Every request of a connection is answered once, in order, with its own body."""
    data = b"".join(encode(body) for body, encode in plan)
    transport = exchange(data, cuts, handler)
    assert responses(transport.written) == [(200, body) for body, _ in plan]
    assert transport.open


def echo_all(request: Request, connection: Connection) -> None:
    """Answer with what the head said, and the body."""
    said = repr((request.method, request.target, sorted(request.headers.items())))
    connection.respond(200, [said.encode(), bytes(request.body)])


def frame(extra: bytes, seed: bytes, size: int) -> bytes:
    """A request whose head is one of a few."""
    head = b"POST /%d HTTP/1.1\r\nContent-Length: %d\r\n%s\r\n" % (size, size, extra)
    return head + repeated(seed, size)


extras = st.sampled_from([b"", b"Inference-Header-Content-Length: 3\r\n", b"Expect: 100-continue\r\n"])
frames = st.builds(frame, extras, st.binary(min_size=1, max_size=4), st.sampled_from([0, 7, 20_000, 140_000]))


@settings(deadline=None)
@given(st.lists(frames, min_size=1, max_size=8), st.lists(st.integers(0, 1_200_000), max_size=12))
def test_a_head_that_comes_again_means_what_it_meant_before(sent: List[bytes], cuts: List[int]) -> None:
    """Requests that share a connection get the answers that they get on connections of their own."""
    together = exchange(b"".join(sent), cuts, echo_all, LARGE)
    apart = [exchange(one, [], echo_all, LARGE).written for one in sent]
    assert responses(together.written) == responses(b"".join(apart))
    assert together.open


@settings(deadline=None, max_examples=300)
@given(
    st.lists(bodies.map(with_length), max_size=3),
    st.one_of(st.binary(min_size=1, max_size=80), st.just(b"")),
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), max_size=3),
    st.lists(st.integers(0, 200_000), max_size=5),
    handlers,
)
def test_nonsense_is_answered_or_closed_and_never_raises(
    good: List[bytes], nonsense: bytes, changes: Any, cuts: List[int], handler: Any
) -> None:
    """Whatever bytes come, each answer is a valid response with a status that fits."""
    data = bytearray(b"".join(good) + nonsense)
    for position, value in changes:
        if data:
            data[position % len(data)] = value
    transport = exchange(bytes(data), cuts, handler)
    statuses = [status for status, _ in responses(transport.written)]
    assert set(statuses) <= {200, 400, 413, 431}
    assert all(status == 200 for status in statuses[:-1])


def test_a_body_may_hold_what_looks_like_a_response() -> None:
    """A body comes back whole, also where it holds the line that announces a response."""
    body = b"HTTP/1.1 100 Continue\r\n\r\n"
    request = with_length(body).replace(b"Host: d", b"Host: d\r\nExpect: 100-continue")
    transport = exchange(request + with_length(body), [len(request) - len(body)], echo)
    assert responses(transport.written) == [(200, body), (200, body)]


def test_an_answer_to_a_client_that_left_goes_nowhere() -> None:
    """A disconnect cancels the request in progress once, and a late answer is dropped."""
    cancelled: List[bool] = []
    kept: List[Connection] = []

    def handler(request: Request, connection: Connection) -> None:
        connection.on_cancel = lambda: cancelled.append(True)
        kept.append(connection)

    transport = exchange(with_length(b"abc"), [], handler)
    assert cancelled == [True]
    kept[0].respond(200, [b"late"])
    assert transport.written == b""


def test_nothing_is_owed_behind_answers_that_nobody_reads() -> None:
    """What a client sent ahead keeps a stopping agent only while that client reads its answers."""

    async def main() -> None:
        held: List[Connection] = []
        server = HttpServer(lambda request, connection: held.append(connection), LIMITS, lambda status: None)
        connection = Connection(server)
        connection.connection_made(StandInTransport())  # type: ignore[arg-type]  # a double
        data = with_length(b"first") + with_length(b"second")
        connection.get_buffer(-1)[: len(data)] = data
        connection.buffer_updated(len(data))
        assert connection.owes_answer
        connection.pause_writing()
        assert connection.owes_answer  # the first runs
        connection.respond(200, [b"large"])
        assert not connection.owes_answer
        connection.resume_writing()
        assert len(held) == 2
        assert connection.owes_answer

    asyncio.run(main())
