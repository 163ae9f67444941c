"""A minimal client of the Open Inference Protocol: one tensor in, one out, binary, over one connection."""

from __future__ import annotations

import http.client
import json
import math
import time
from types import TracebackType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Client:
    """Sends FP32 tensors to one model, and reads one output: the one that is named, else the first."""

    def __init__(
        self, host: str, port: int, model: str, input_name: str, output_name: str | None = None
    ) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=30)
        self._path = f"/v2/models/{model}/infer"
        self._input = input_name
        self._wanted = {} if output_name is None else {"outputs": [{"name": output_name}]}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def infer(self, tensor: Array) -> tuple[Array, float]:
        """Send one request.

        Returns:
            The output, and the time from sending to the whole answer in milliseconds.

        Raises:
            RuntimeError: the server answered with an error.
        """
        described = {
            "name": self._input,
            "datatype": "FP32",
            "shape": list(tensor.shape),
            "parameters": {"binary_data_size": tensor.nbytes},
        }
        request = {"inputs": [described], **self._wanted, "parameters": {"binary_data_output": True}}
        head = json.dumps(request).encode()
        body = head + np.ascontiguousarray(tensor, dtype="<f4").tobytes()
        begin = time.perf_counter()
        self._connection.request(
            "POST", self._path, body, {"Inference-Header-Content-Length": str(len(head))}
        )
        answer = self._connection.getresponse()
        content = answer.read()
        took_ms = (time.perf_counter() - begin) * 1e3
        if answer.status != http.client.OK:
            raise RuntimeError(f"{answer.status}: {content.decode(errors='replace')}")
        length = int(answer.headers["Inference-Header-Content-Length"])
        output = json.loads(content[:length])["outputs"][0]
        count = math.prod(output["shape"])
        values = np.frombuffer(content, "<f4", count, offset=length).reshape(output["shape"])
        return values, took_ms
