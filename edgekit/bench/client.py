"""A minimal client of the Open Inference Protocol: numbers in and out, binary, over one connection."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np

from edgekit.tensors import Arrays, numpy_dtype, protocol_dtype

_TIMEOUT_S = 60


class Client:
    """Asks one model, for the outputs that are named, else for all."""

    def __init__(self, host: str, port: int, model: str, outputs: Sequence[str] = ()) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        self._path = f"/v2/models/{model}"
        self._wanted = {"outputs": [{"name": name} for name in outputs]} if outputs else {}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def about(self, part: str = "") -> dict[str, Any]:
        """A document about the model: its metadata, or ``/config``.

        Raises:
            RuntimeError: the server answered with an error.
            OSError, http.client.HTTPException: it did not answer, or with something else than HTTP.
            ValueError: it answered with something else than a JSON object.
        """
        self._connection.request("GET", self._path + part)
        document = json.loads(self._answer()[0])
        if not isinstance(document, dict):
            raise ValueError(f"{self._path}{part} is not a JSON object")
        return document

    def infer(self, inputs: Arrays) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
        """Send one request.

        Returns:
            The outputs, and the time from sending to the whole answer in milliseconds.

        Raises:
            RuntimeError: the server answered with an error.
            OSError, http.client.HTTPException: it did not answer.
        """
        request = {
            "inputs": [_described(name, array) for name, array in inputs.items()],
            **self._wanted,
            "parameters": {"binary_data_output": True},
        }
        head = json.dumps(request).encode()
        body = b"".join([head, *(np.ascontiguousarray(array).tobytes() for array in inputs.values())])
        headers = {"Inference-Header-Content-Length": str(len(head))}
        begin = time.perf_counter()
        self._connection.request("POST", f"{self._path}/infer", body, headers)
        content, answer = self._answer()
        took_ms = (time.perf_counter() - begin) * 1e3
        return _outputs(content, int(answer.headers["Inference-Header-Content-Length"])), took_ms

    def _answer(self) -> tuple[bytes, http.client.HTTPResponse]:
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{answer.status}: {content.decode(errors='replace')}")
        return content, answer


def _described(name: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": protocol_dtype(array.dtype),
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }


def _outputs(content: bytes, json_bytes: int) -> dict[str, np.ndarray[Any, Any]]:
    outputs: dict[str, np.ndarray[Any, Any]] = {}
    position = json_bytes
    for described in json.loads(content[:json_bytes])["outputs"]:
        dtype, shape = numpy_dtype(described["datatype"]), described["shape"]
        values = np.frombuffer(content, dtype, math.prod(shape), offset=position)
        outputs[described["name"]] = values.reshape(shape)
        position += values.nbytes
    return outputs
