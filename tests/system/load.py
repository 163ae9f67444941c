"""Clients that never stop asking, and count every answer that they did not get."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_TIMEOUT_S = 60.0


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
def load(port: int, model: str, body: dict[str, Any], clients: int = 4) -> Iterator[Outcome]:
    """Keep ``clients`` requests in flight to a model for the length of a ``with`` block.

    Each client keeps its connection, and opens a new one where the server said ``Connection: close``. A
    request that is refused, cut off, or answered with an error counts as a failure; none is sent again.
    """
    outcome = Outcome()
    guard = threading.Lock()
    stop = threading.Event()
    threads = [
        threading.Thread(target=_ask, args=(port, model, json.dumps(body), stop, outcome, guard))
        for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    try:
        yield outcome
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _ask(
    port: int, model: str, body: str, stop: threading.Event, outcome: Outcome, guard: threading.Lock
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    while not stop.is_set():
        began_s = time.monotonic()
        failure = ""
        try:
            connection.request(
                "POST", f"/v2/models/{model}/infer", body, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                failure = f"{answer.status} {content[:200]!r}"
        except (OSError, http.client.HTTPException) as error:
            failure = f"{type(error).__name__}: {error}"
            connection.close()
        with guard:
            outcome.longest_s = max(outcome.longest_s, time.monotonic() - began_s)
            if failure:
                outcome.failures[failure] += 1
            else:
                outcome.answered += 1
        if failure:
            time.sleep(0.01)
    connection.close()
