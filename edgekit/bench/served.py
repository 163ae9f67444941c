"""A served bundle under clients that each wait for their answer, over HTTP; every answer is checked."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from threading import Event

from device_agent.manifest import Manifest
from edgekit.bench.client import Client
from edgekit.bench.golden import Case, Golden
from edgekit.errors import BadInput, DeviceRefused, Missing
from edgekit.measure import latency
from edgekit.measure.latency import Latency

#: Clients at the same time; one measures the latency of a lone request.
CLIENTS = (1, 4, 16)
#: Several clients send a quarter of a lone one's requests each, so that a slow model is not asked for ever.
_SHARE = 4


@dataclass(frozen=True)
class Address:
    """Where an agent listens, and how to call it in a report."""

    host: str
    port: int
    where: str


@dataclass(frozen=True)
class Served:
    """What some clients saw.

    Attributes:
        clients: that asked at the same time, each its next request when the last was answered.
        latency_ms: from sending a request to its whole answer.
        requests_per_second: of all clients together.
        answers: that were compared with the golden outputs, all of them within the bundle's tolerances.
        identical: answers that equal the golden outputs bit for bit.
    """

    clients: int
    latency_ms: Latency
    requests_per_second: float
    answers: int
    identical: int


def measure(address: Address, manifest: Manifest, digest: str, golden: Golden, runs: int) -> list[Served]:
    """Ask an agent that serves the bundle, with more and more clients.

    Args:
        address: of the agent.
        manifest: of the bundle.
        digest: of the bundle.
        golden: what is asked, a row a request, and what must be answered.
        runs: requests of a lone client; a tenth of that is sent before the clock starts.

    Raises:
        Missing: no agent answers.
        BadInput: it does not serve this bundle.
        DeviceRefused: a request was refused, or an answer is not the golden one.
    """
    with _errors(address):
        _check_served(address, manifest.name, digest)
        found = [_with_clients(address, manifest, golden, count, runs) for count in CLIENTS]
        _check_served(address, manifest.name, digest)  # an update meanwhile would make the figures another's
    return found


def _check_served(address: Address, name: str, digest: str) -> None:
    with Client(address.host, address.port, name) as client:
        try:
            config = client.about("/config")
        except RuntimeError as error:
            raise BadInput(
                f"the agent at {address.where} does not serve '{name}'",
                str(error),
                "deploy the bundle to it with `edgekit deploy`",
            ) from error
    serves = config.get("parameters", {}).get("digest", {}).get("string_value", "")
    if serves != digest:
        says = f"its digest is {serves[:12]}" if serves else "it names no bundle"
        raise BadInput(
            f"the agent at {address.where} serves another '{name}'",
            f"{says}; the one given is {digest[:12]}",
            "give the bundle that it serves, or deploy this one with `edgekit deploy`",
        )


def _with_clients(address: Address, manifest: Manifest, golden: Golden, count: int, runs: int) -> Served:
    cases, wanted = golden.cases(), [spec.name for spec in manifest.outputs]
    stop = Event()
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count))
        clients = [
            stack.enter_context(Client(address.host, address.port, manifest.name, wanted))
            for _ in range(count)
        ]
        stack.callback(stop.set)  # before the pool waits for its threads
        each = runs if count == 1 else runs // _SHARE
        list(pool.map(lambda client: _ask(client, cases, runs // 10, stop), clients))
        begin = time.perf_counter()
        answers = list(pool.map(lambda client: _ask(client, cases, each, stop), clients))
        seconds = time.perf_counter() - begin
    times_ms = [took_ms for times_ms, _ in answers for took_ms in times_ms]
    return Served(
        count,
        latency.summary(times_ms, 1 if golden.batchable else golden.most_rows, address.where),
        len(times_ms) / seconds,
        len(times_ms),
        sum(identical for _, identical in answers),
    )


def _ask(client: Client, cases: Sequence[Case], runs: int, stop: Event) -> tuple[list[float], int]:
    """Times of the requests in milliseconds, and how many answers were golden bit for bit."""
    times_ms: list[float] = []
    identical = 0
    for case in islice(cycle(cases), runs):
        if stop.is_set():
            break
        outputs, took_ms = client.infer(case.inputs)
        if name := case.difference(outputs):
            raise DeviceRefused(
                f"an answer is not the golden one: output '{name}'",
                "it is farther off than the bundle's tolerance",
                "see what else the agent says: `edgekit-agent status`, and its log",
            )
        times_ms.append(took_ms)
        identical += case.identical(outputs)
    return times_ms, identical


@contextmanager
def _errors(address: Address) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceRefused(
            f"the agent at {address.where} refused a request", str(error), "look at its log"
        ) from error
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Missing(
            f"no agent answers at {address.where}",
            str(error) or type(error).__name__,
            "start it, or correct the address: http://HOST:PORT of its inference port",
        ) from error
