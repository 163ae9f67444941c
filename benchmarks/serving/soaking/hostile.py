"""Clients that are broken or mean no good. The agent may refuse or drop them, and must go on."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

from serving import wire
from serving.soaking.good import GoodClient, Sent
from serving.soaking.link import Closed, Link
from serving.soaking.site import HEADER_TIMEOUT_S, MAX_BODY_BYTES
from serving.soaking.tally import Tally

_INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: d\r\n"
_GARBLED = (
    _INFER + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    _INFER + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    _INFER + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    _INFER + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
    _INFER + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
    _INFER + b"Transfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    _INFER + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 70_000,
    _INFER + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    _INFER + b"Content-Length: 99999999999999999999999\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT d:80 HTTP/1.1\r\n\r\nxyz",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
)
_DOCUMENTS = (
    b"{}", b"[]", b"nul", b"[" * 5000, b'{"inputs":' + b"9" * 5000 + b"}", b'{"inputs":[{"name":"x"}]}',
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,16],"data":[NaN]}]}',
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[-1,16],"data":[1]}]}',
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[4611686018427387904,16],"data":[]}]}',
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,16],"parameters":{"binary_data_size":99}}]}',
)  # fmt: skip
_REFUSED = (400, 404, 405, 408, 413, 431, 501)


class HostileClient:
    """One client that does harm where it can."""

    def __init__(self, good: GoodClient, tally: Tally, number: int, seed: int) -> None:
        self._good = good
        self._tally = tally
        self._rng = random.Random(seed)
        self._path = Path(f"/dev/shm/edgekit-hostile-{os.getpid()}-{number}")
        self._region = f"hostile{number}"
        self._ways: tuple[Callable[[Link], Awaitable[None]], ...] = (
            self._vanish_while_sending, self._vanish_while_waiting, self._half_close, self._garble,
            self._garble_json, self._mutate, self._send_too_much, self._drip, self._bomb, self._do_not_read,
            self._say_nothing, self._shrink,
        )  # fmt: skip

    async def visit(self, link: Link) -> None:
        """Do one of these things."""
        way = self._rng.choice(self._ways)
        self._tally.actions[way.__name__.strip("_")] += 1
        await way(link)

    def _request(self) -> Sent:
        sent = self._good.request()
        while sent.shared is not None:
            sent = self._good.request()
        return sent

    async def _vanish_while_sending(self, link: Link) -> None:
        sent = self._request()
        await link.send(sent.data[: self._rng.randrange(len(sent.data))])
        if self._rng.random() < 0.5:
            link.reset()

    async def _vanish_while_waiting(self, link: Link) -> None:
        sent = self._request()
        self._tally.uncertain[sent.model] += 1
        await link.send(sent.data)
        await asyncio.sleep(self._rng.random() * 0.005)
        if self._rng.random() < 0.5:
            link.reset()

    async def _half_close(self, link: Link) -> None:
        sent = self._request()
        self._tally.uncertain[sent.model] += 1
        await link.send(sent.data[: self._rng.choice((len(sent.data), len(sent.data) // 2))])
        link.end()
        await link.receive_all()

    async def _garble(self, link: Link) -> None:
        await self._expect_refusal(link, self._rng.choice(_GARBLED))

    async def _garble_json(self, link: Link) -> None:
        document = self._rng.choice(_DOCUMENTS)
        await self._expect_refusal(link, _INFER + b"Content-Length: %d\r\n\r\n%s" % (len(document), document))

    async def _mutate(self, link: Link) -> None:
        sent = self._request()
        data = bytearray(sent.data)
        for _ in range(self._rng.randint(1, 4)):
            data[self._rng.randrange(len(data))] = self._rng.randrange(256)
        self._tally.uncertain[sent.model] += 1
        self._tally.uncertain["tiny"] += 1  # a changed digit may name it
        await link.send(bytes(data))
        link.end()
        for answer in await link.receive_all():
            self._note(answer, (200, 500, 503, *_REFUSED))

    async def _send_too_much(self, link: Link) -> None:
        if self._rng.random() < 0.5:
            size = MAX_BODY_BYTES + self._rng.choice((1, 1 << 40))
            await self._expect_refusal(link, _INFER + b"Content-Length: %d\r\n\r\n" % size)
            return
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        head = _INFER + b"Transfer-Encoding: chunked\r\n\r\n"
        await self._expect_refusal(link, head + chunk * (MAX_BODY_BYTES // 0x10000 + 2))

    async def _drip(self, link: Link) -> None:
        data = self._request().data
        cut = self._rng.choice((20, len(data) - 1))
        await link.send(data[: cut - 10])
        for byte in data[cut - 10 : cut - 1]:
            await asyncio.sleep(HEADER_TIMEOUT_S / 5)
            try:
                await link.send(bytes([byte]))
            except Closed:
                break
        for answer in await link.receive_all():
            self._note(answer, (408,))

    async def _bomb(self, link: Link) -> None:
        packed = gzip.compress(b" " * (MAX_BODY_BYTES * 8), 9)
        head = _INFER + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
        await self._expect_refusal(link, head + packed)

    async def _do_not_read(self, link: Link) -> None:
        several = [self._request() for _ in range(50)]
        for sent in several:
            self._tally.uncertain[sent.model] += 1
        link.send_blindly(b"".join(sent.data for sent in several))
        await asyncio.sleep(self._rng.random() * 0.3)
        link.reset()

    async def _say_nothing(self, link: Link) -> None:
        await asyncio.sleep(self._rng.random() * 2 * HEADER_TIMEOUT_S)

    async def _shrink(self, link: Link) -> None:
        self._path.write_bytes(b"\0" * 8192)
        base = f"/v2/systemsharedmemory/region/{self._region}"
        wanted = json.dumps({"key": self._path.name, "offset": 0, "byte_size": 8192}).encode()
        place = {
            "shared_memory_region": self._region,
            "shared_memory_offset": 4096,
            "shared_memory_byte_size": 64,
        }
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 16], "parameters": place}
        try:
            await self._expect(link, wire.post(f"{base}/register", wanted, ""), 200)
            os.truncate(self._path, 4096)
            infer = wire.post("/v2/models/tiny/infer", json.dumps({"inputs": [tensor]}).encode(), "")
            await self._expect(link, infer, 400)
            await self._expect(link, wire.post(f"{base}/unregister", b"{}", ""), 200)
        finally:
            self._path.unlink()

    async def _expect(self, link: Link, data: bytes, status: int) -> None:
        await link.send(data)
        self._note(await link.receive(), (status,))

    async def _expect_refusal(self, link: Link, data: bytes) -> None:
        """Send, and read a refusal; a reset may overtake it."""
        try:
            await link.send(data)
            self._note(await link.receive(), _REFUSED)
        except Closed:
            self._tally.actions["refused without a word"] += 1

    def _note(self, answer: wire.Answer, statuses: tuple[int, ...]) -> None:
        self._tally.statuses[answer.status] += 1
        if answer.status not in statuses:
            self._tally.violate(f"{answer.status} where one of {statuses} was due: {answer.body[:200]!r}")
