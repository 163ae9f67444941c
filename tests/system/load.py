"""Clients that never stop asking, and count every answer that they did not get."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

_TIMEOUT_S = 60.0


class Client(Protocol):
    """One client."""

    def ask(self) -> str:
        """Send a request, once; return what went wrong, or nothing."""

    def close(self) -> None:
        """Close the connection."""


class HttpClient:
    """Keeps its connection, and opens a new one where the server said ``Connection: close``."""

    def __init__(self, port: int, model: str, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        self._path = f"/v2/models/{model}/infer"
        self._body = json.dumps(body)

    def ask(self) -> str:
        """See :class:`Client`."""
        try:
            self._connection.request("POST", self._path, self._body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return f"{type(error).__name__}: {error}"
        return "" if answer.status == 200 else f"{answer.status} {content[:200]!r}"

    def close(self) -> None:
        """See :class:`Client`."""
        self._connection.close()


class GrpcClient:
    """Triton's own client, on a channel of its own."""

    def __init__(self, port: int, model: str, body: dict[str, Any]) -> None:
        # Without an option of its own a channel shares the connection of others to the same address.
        own = [("grpc.use_local_subchannel_pool", 1)]
        self._client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}", channel_args=own)
        self._model = model
        (tensor,) = body["inputs"]
        self._input = tritonclient.grpc.InferInput(tensor["name"], tensor["shape"], tensor["datatype"])
        self._input.set_data_from_numpy(np.array(tensor["data"], np.float32).reshape(tensor["shape"]))

    def ask(self) -> str:
        """See :class:`Client`."""
        try:
            self._client.infer(self._model, [self._input], client_timeout=_TIMEOUT_S)
        except InferenceServerException as error:
            return str(error)
        return ""

    def close(self) -> None:
        """See :class:`Client`."""
        self._client.close()


@dataclass
class Outcome:
    """What became of the requests.

    Attributes:
        answered: requests that got the right answer.
        failures: what went wrong, and how often.
        longest_s: the longest that one request took.
    """

    answered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0


@contextmanager
def load(connect: Callable[[], Client], clients: int = 4) -> Iterator[Outcome]:
    """Keep ``clients`` requests in flight to a model for the length of a ``with`` block.

    A request that is refused, cut off, or answered with an error counts as a failure; none is sent again.
    """
    outcome = Outcome()
    guard = threading.Lock()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_ask_on, args=(connect(), stop, outcome, guard)) for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield outcome
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _ask_on(client: Client, stop: threading.Event, outcome: Outcome, guard: threading.Lock) -> None:
    while not stop.is_set():
        began_s = time.monotonic()
        failure = client.ask()
        with guard:
            outcome.longest_s = max(outcome.longest_s, time.monotonic() - began_s)
            if failure:
                outcome.failures[failure] += 1
            else:
                outcome.answered += 1
        if failure:
            time.sleep(0.01)
    client.close()
