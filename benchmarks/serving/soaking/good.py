"""Clients that keep to the protocol: every way of sending a tensor, every answer checked bit for bit."""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving import wire
from serving.models import Array
from serving.soaking.link import Closed, Link
from serving.soaking.site import Soaked
from serving.soaking.tally import Tally

_MAX_REQUESTS = 30
_SHARED_BYTES = 1 << 17
_ANSWER_AT = 1 << 16


@dataclass(frozen=True)
class Sent:
    """A request, and what must come of it.

    Attributes:
        model: whom it is for.
        data: the whole request.
        ident: what the answer must echo.
        statuses: what may be answered.
        shared: where the answer is put instead of sent; None: it is sent.
    """

    model: str
    data: bytes
    ident: str
    statuses: tuple[int, ...]
    shared: memoryview | None = None


class GoodClient:
    """One well-behaved client, with a shared memory object of its own."""

    def __init__(self, soaked: Soaked, tally: Tally, number: int, seed: int) -> None:
        self._soaked = soaked
        self._tally = tally
        self._rng = random.Random(seed)
        self._region = f"soak{number}"
        self._path = Path(f"/dev/shm/edgekit-soak-{os.getpid()}-{number}")
        self._path.write_bytes(b"\0" * _SHARED_BYTES)
        self._memory = memoryview(np.memmap(self._path, dtype=np.uint8, mode="r+"))
        self._registered = False
        self._count = 0

    async def visit(self, link: Link) -> None:
        """Send some requests, one after the other, and check what comes."""
        if not self._registered or self._rng.random() < 0.1:
            await self._register(link)
        for _ in range(self._rng.randint(1, _MAX_REQUESTS)):
            sent = self.request()
            await self._send(link, sent.data)
            self._tally.actions["good"] += 1
            self.check(sent, await self._receive(link, sent))

    async def visit_ahead(self, link: Link) -> None:
        """Send several requests at once; they are answered in order."""
        several = [self.request() for _ in range(self._rng.randint(2, _MAX_REQUESTS))]
        places = [sent for sent in several if sent.shared is None]  # the others would share one place
        await self._send(link, b"".join(sent.data for sent in places))
        for sent in places:
            self._tally.actions["ahead"] += 1
            self.check(sent, await self._receive(link, sent))

    def close(self) -> None:
        """Remove the shared memory object."""
        self._path.unlink()

    async def _receive(self, link: Link, sent: Sent) -> wire.Answer:
        try:
            return await link.receive()
        except Closed:
            self._tally.uncertain[sent.model] += 1
            raise

    async def _send(self, link: Link, data: bytes) -> None:
        if data and self._rng.random() < 0.1:  # cut anywhere
            cut = self._rng.randrange(len(data))
            await link.send(data[:cut])
            data = data[cut:]
        await link.send(data)

    async def _register(self, link: Link) -> None:
        if self._registered:
            await self._ask(link, f"{self._region}/unregister", {})
        wanted = {"key": self._path.name, "offset": 0, "byte_size": _SHARED_BYTES}
        await self._ask(link, f"{self._region}/register", wanted)
        self._registered = True

    async def _ask(self, link: Link, what: str, body: dict[str, Any]) -> None:
        path = f"/v2/systemsharedmemory/region/{what}"
        await link.send(wire.post(path, json.dumps(body).encode(), "application/json"))
        status = (await link.receive()).status
        if status != 200:
            self._tally.violate(f"{what} was answered with {status}")

    # Requests

    def request(self) -> Sent:
        """A random request to a random model."""
        rng = self._rng
        model = rng.choices(("tiny", "cnn", "spare", "fragile"), (60, 10, 20, 10))[0]
        row = self._soaked.models[model].row
        self._count += 1
        ident = f"{self._region}-{self._count}"
        statuses: tuple[int, ...] = (200, 404) if model == "spare" else (200,)
        if model == "fragile" and rng.random() < 0.3:
            row, statuses = np.full_like(row, 1e6), (500,)
        parameters: dict[str, Any] = {"binary_data_output": rng.random() < 0.5}
        if rng.random() < 0.2:
            parameters["timeout"] = rng.randint(1, 20_000)
            statuses = (*statuses, 503)
        way = rng.choice(("json", "binary", "binary", "gzip", "deflate", "chunked", "shared"))
        if way == "shared":
            return self._shared(model, row, ident, statuses, parameters)
        head, tail = _body(row, ident, parameters, binary=way != "json")
        return Sent(model, _encoded(model, head, tail, way), ident, statuses)

    def _shared(
        self, model: str, row: Array, ident: str, statuses: tuple[int, ...], parameters: dict[str, Any]
    ) -> Sent:
        answer = self._soaked.answers[model, "1"]
        self._memory[: row.nbytes] = row.tobytes()
        self._memory[_ANSWER_AT : _ANSWER_AT + answer.nbytes] = bytes(answer.nbytes)
        place = {"shared_memory_region": self._region, "shared_memory_byte_size": row.nbytes}
        out = {**place, "shared_memory_offset": _ANSWER_AT, "shared_memory_byte_size": answer.nbytes}
        document = {
            "id": ident,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": list(row.shape), "parameters": place}],
            "outputs": [{"name": "y", "parameters": out}],
            "parameters": parameters,
        }
        data = _encoded(model, json.dumps(document).encode(), b"", "json")
        return Sent(model, data, ident, statuses, self._memory[_ANSWER_AT : _ANSWER_AT + answer.nbytes])

    # Answers

    def check(self, sent: Sent, answer: wire.Answer) -> None:
        """Hold an answer against its request."""
        self._tally.answered(sent.model, answer.status)
        if answer.status not in sent.statuses:
            self._tally.violate(f"{sent.ident} to {sent.model}: {answer.status} {answer.body[:200]!r}")
        if answer.status != 200:
            return
        size = answer.headers.get("inference-header-content-length")
        document = json.loads(answer.body[: int(size)] if size else answer.body)
        expected = self._soaked.answers[sent.model, document["model_version"]]
        if document.get("id") != sent.ident or _values(sent, answer, document) != expected.tobytes():
            self._tally.violate(f"{sent.ident} to {sent.model}: another answer than ONNX Runtime's")


def _body(row: Array, ident: str, parameters: dict[str, Any], binary: bool) -> tuple[bytes, bytes]:
    tensor: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": list(row.shape)}
    if binary:
        tensor["parameters"] = {"binary_data_size": row.nbytes}
    else:
        tensor["data"] = row.ravel().tolist()
    document = {"id": ident, "inputs": [tensor], "parameters": parameters}
    return json.dumps(document).encode(), row.tobytes() if binary else b""


def _encoded(model: str, head: bytes, tail: bytes, way: str) -> bytes:
    path, headers = f"/v2/models/{model}/infer", f"Inference-Header-Content-Length: {len(head)}\r\n"
    if way in ("gzip", "deflate"):
        packed = gzip.compress(head + tail, 1) if way == "gzip" else zlib.compress(head + tail, 1)
        return wire.post(path, packed, "", f"{headers}Content-Encoding: {way}\r\n")
    if way != "chunked":
        return wire.post(path, head + tail, "", headers if tail else "")
    whole = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (head, tail))
    start = f"POST {path} HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n{headers}\r\n"
    return start.encode() + whole + b"0\r\n\r\n"


def _values(sent: Sent, answer: wire.Answer, document: dict[str, Any]) -> bytes:
    if sent.shared is not None:
        return bytes(sent.shared)
    output = document["outputs"][0]
    if "data" in output:
        return np.array(output["data"], np.float32).tobytes()
    return answer.body[int(answer.headers["inference-header-content-length"]) :]
