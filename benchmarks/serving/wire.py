"""Requests as bytes, made once and sent many times; and the reading of answers."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer.

    Attributes:
        status: its code.
        headers: by lower-case name.
        body: everything after the head.
    """

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Head:
    """What a client must know of an answer's head.

    Attributes:
        status: the code.
        head_bytes: length of the head with its empty line.
        total_bytes: length of head and body.
        closes: whether the server announces that it closes the connection.
    """

    status: int
    head_bytes: int
    total_bytes: int
    closes: bool


class WireError(Exception):
    """An answer that this client does not understand."""


def post(path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
    """A POST on a kept connection; ``headers`` are further lines, each with its CRLF."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def get(path: str) -> bytes:
    """A GET on a kept connection."""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def parse_head(data: bytes | bytearray) -> Head | None:
    """Read a head; None while it is not whole.

    Raises:
        WireError: the body's length is not announced.
    """
    end = data.find(_HEAD_END)
    if end < 0:
        return None
    status, headers = _head(bytes(data[:end]))
    if "content-length" not in headers:
        raise WireError(f"an answer without Content-Length: {bytes(data[:end])!r}")
    head_bytes = end + len(_HEAD_END)
    total_bytes = head_bytes + int(headers["content-length"])
    return Head(status, head_bytes, total_bytes, headers.get("connection", "").lower() == "close")


def parse(data: bytes) -> Answer:
    """Read a whole answer."""
    end = data.find(_HEAD_END)
    status, headers = _head(data[:end])
    return Answer(status, headers, data[end + len(_HEAD_END) :])


def _head(data: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = data.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split(" ", 2)[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


# The Open Inference Protocol, tensors in binary


def oip_infer(model: str, row: Array, timeout_us: int | None = None, priority: int | None = None) -> bytes:
    """One row for ``model``.

    Args:
        model: its name.
        row: its input.
        timeout_us: bounds the time in the queue, where the server knows that.
        priority: its level, 1 being the highest.
    """
    tensor = {**_tensor(row), "parameters": {"binary_data_size": row.nbytes}}
    parameters: dict[str, Any] = {"binary_data_output": True}
    if timeout_us is not None:
        parameters["timeout"] = timeout_us
    if priority is not None:
        parameters["priority"] = priority
    return _oip(model, {"inputs": [tensor], "parameters": parameters}, row.tobytes())


def oip_infer_shared(model: str, row: Array, region: str, answer_at: int, answer_bytes: int) -> bytes:
    """One row that lies at the start of ``region``, with the answer to be put at ``answer_at``."""
    tensor = {**_tensor(row), "parameters": _place(region, row.nbytes)}
    place = {**_place(region, answer_bytes), "shared_memory_offset": answer_at}
    return _oip(model, {"inputs": [tensor], "outputs": [{"name": "y", "parameters": place}]}, b"")


def oip_register(region: str, key: str, byte_size: int) -> bytes:
    """Register a shared memory object."""
    body = json.dumps({"key": key, "offset": 0, "byte_size": byte_size}).encode()
    return post(f"/v2/systemsharedmemory/region/{region}/register", body, "application/json")


def oip_decode(answer: Answer) -> Array:
    """The FP32 output of a binary answer."""
    json_bytes = int(answer.headers["inference-header-content-length"])
    output = json.loads(answer.body[:json_bytes])["outputs"][0]
    return np.frombuffer(answer.body, dtype="<f4", offset=json_bytes).reshape(output["shape"])


def _oip(model: str, head: dict[str, Any], tail: bytes) -> bytes:
    described = json.dumps(head, separators=(",", ":")).encode()
    length = f"Inference-Header-Content-Length: {len(described)}\r\n"
    return post(f"/v2/models/{model}/infer", described + tail, "application/octet-stream", length)


def _tensor(row: Array) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": list(row.shape)}


def _place(name: str, byte_size: int) -> dict[str, Any]:
    return {"shared_memory_region": name, "shared_memory_byte_size": byte_size}


# Servers without binary tensors: Base64, which is read many times as quickly as numbers in JSON


def base64_text(row: Array) -> str:
    """A tensor as text."""
    return base64.b64encode(row.tobytes()).decode()


def from_base64(text: str, like: Array) -> Array:
    """A tensor from text, in the shape of ``like``."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").reshape(like.shape)
