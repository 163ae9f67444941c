"""What a server takes: memory, time to start, and processor time for each request."""

from __future__ import annotations

import time

from serving import client
from serving.bench import Bench, Judged, Result, Rounds, say
from serving.open_loop import poisson, send
from serving.peers.base import Peer
from serving.server import Server, ServerError
from serving.venvs import EnvironmentFailed

_BUSY_COUNT = 2000
_PACED_RATE = 200.0
_PACED_SECONDS = 2.5
_WARM_COUNT = 100


def footprint(bench: Bench) -> Result:
    """Memory and start with ``cnn``; processor time with ``tiny``, one client and at a steady pace."""
    figures = {name: Rounds() for name in ("pss", "start", "busy", "paced")}
    for number in range(bench.rounds):
        say(f"  round {number + 1} of {bench.rounds}")
        for peer in bench.products():
            try:
                _take(bench, peer, figures)
            except (ServerError, EnvironmentFailed) as error:
                bench.leave_out(peer, error)
    result = Result({
        "PSS with cnn MB": figures["pss"].medians(1e-6),
        "exec to first answer s": figures["start"].medians(),
        "CPU ms per tiny request, one client": figures["busy"].medians(1e3),
        f"CPU ms per tiny request, {_PACED_RATE:g}/s": figures["paced"].medians(1e3),
    })  # fmt: skip
    result.judged = {
        "pss_mb": Judged(figures["pss"].medians(1e-6).get("ours"), "<=", 130),
        "first_answer_s": Judged(figures["start"].medians().get("ours"), "<=", 0.5),
        "cpu_ms_per_tiny_request": Judged(figures["busy"].medians(1e3).get("ours"), "<=", 0.12),
    }
    return result


def _take(bench: Bench, peer: Peer, figures: dict[str, Rounds]) -> None:
    cnn, tiny = bench.models["cnn"], bench.models["tiny"]
    with bench.start(peer, [cnn]) as server:
        figures["start"].add(peer.name, server.first_answer_s)
        client.ping(server.address, peer.request(cnn), bench.count(_WARM_COUNT))
        figures["pss"].add(peer.name, server.pss_bytes())
    with bench.start(peer, [tiny]) as server:
        request = peer.request(tiny)
        client.ping(server.address, request, _WARM_COUNT)
        figures["busy"].add(peer.name, _busy(server, request, bench.count(_BUSY_COUNT)))
        figures["paced"].add(peer.name, _paced(server, request, bench.seconds(_PACED_SECONDS)))


def _busy(server: Server, request: bytes, count: int) -> float:
    before_s = server.cpu_s()
    client.ping(server.address, request, count)
    return (server.cpu_s() - before_s) / count


def _paced(server: Server, request: bytes, seconds: float) -> float:
    """Waking up costs too, so requests with pauses between them cost more than a stream of them."""
    arrivals_s = poisson(_PACED_RATE, seconds, 0)
    time.sleep(0.2)
    before_s = server.cpu_s()
    send(server.address, request, arrivals_s, 1.0)
    return (server.cpu_s() - before_s) / len(arrivals_s)
