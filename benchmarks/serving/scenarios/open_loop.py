"""Requests that come when they come (Poisson), as cameras and people send them.

At a rate that every server can bear, at 80% of our own capacity, and at 120%, where requests name the time
that they may wait (``timeout``) and a server should refuse what it cannot answer in time. Ours is judged with
an objective in its configuration, for requests that name nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from serving import wire
from serving.bench import Bench, Judged, Result, Rounds, say, settle
from serving.closed_loop import ClosedLoop
from serving.models import Model
from serving.open_loop import poisson, send
from serving.peers.base import Peer
from serving.peers.ours import OURS, OURS_SLO, SLO_MS
from serving.server import Server

_TIMEOUT_US = 40_000  # in the queue; the rest of the SLO is for the run and the way
_SECONDS = 3.0
_CAPACITY_SECONDS = 1.0
_MOST_ROUNDS = 3  # they are long
_GRACE_S = 1.0
_CLIENTS = 16


def open_loop(bench: Bench) -> Result:
    """99th percentiles at common rates, at 80% and at 120% of our capacity for ``cnn``."""
    tiny, cnn = bench.models["tiny"], bench.models["cnn"]
    with bench.fleet(bench.servers(), [tiny, cnn]) as servers:
        tiny_rates = {p.name: _capacity(bench, s, p, tiny) for p, s in servers.items()}
        cnn_rates = {p.name: _capacity(bench, s, p, cnn) for p, s in servers.items()}
        result = Result({"cnn per s, 16 clients": dict(cnn_rates)})
        capacity = cnn_rates["ours"]
        for label, model, rate in (
            ("tiny_common", tiny, 0.5 * min(tiny_rates.values())),
            ("cnn_common", cnn, 0.5 * min(cnn_rates.values())),
            ("cnn_80", cnn, 0.8 * capacity),
        ):
            _below_capacity(bench, servers, model, rate, label, result)
        with bench.fleet([OURS_SLO], [cnn]) as more:
            _overload(bench, {**servers, **more}, cnn, result)
    return result


def _below_capacity(
    bench: Bench, servers: dict[Peer, Server], model: Model, rate: float, label: str, result: Result
) -> None:
    p50_s, p99_s = Rounds(), Rounds()
    say(f"  {label}: {rate:.0f} a second")
    for number in range(min(bench.rounds, _MOST_ROUNDS)):
        arrivals_s = poisson(rate, bench.seconds(_SECONDS), number)
        for peer, server in servers.items():
            outcome = send(server.address, peer.request(model), arrivals_s, _GRACE_S)
            waits_s = outcome.latencies_s + outcome.unanswered_s
            p50_s.add(peer.name, quantile(waits_s, 0.5))
            p99_s.add(peer.name, quantile(waits_s, 0.99))
            settle(server)
    result.table[f"{label} p50 ms at {rate:.0f}/s"] = p50_s.medians(1e3)
    result.table[f"{label} p99 ms at {rate:.0f}/s"] = p99_s.medians(1e3)
    others = [peer.name for peer in servers if not peer.is_floor and not peer.name.startswith("ours")]
    result.judged[f"{label}_p99_over_best_peer"] = Judged(p99_s.ratio("ours", others, "least"), "<", 1.0)


def _overload(bench: Bench, servers: dict[Peer, Server], model: Model, result: Result) -> None:
    """Each round measures our capacity anew, since that is what the load and the goodput are held against."""
    p99_s, refused, refusal_s, goodput = Rounds(), Rounds(), Rounds(), Rounds()
    for number in range(min(bench.rounds, _MOST_ROUNDS)):
        capacity = _capacity(bench, servers[OURS], OURS, model)
        say(f"  cnn_120: {1.2 * capacity:.0f} a second")
        arrivals_s = poisson(1.2 * capacity, bench.seconds(_SECONDS), number)
        for peer, server in servers.items():
            named = peer.speaks_oip and peer is not OURS_SLO
            request = wire.oip_infer(model.name, model.row, _TIMEOUT_US) if named else peer.request(model)
            outcome = send(server.address, request, arrivals_s, _GRACE_S)
            settle(server)
            waits_s = outcome.latencies_s + outcome.unanswered_s
            in_time = sum(wait_s <= SLO_MS / 1e3 for wait_s in outcome.latencies_s)
            p99_s.add(peer.name, quantile(waits_s, 0.99))
            refused.add(peer.name, len(outcome.refused_s) / len(arrivals_s))
            if outcome.refused_s:
                refusal_s.add(peer.name, quantile(outcome.refused_s, 0.5))
            goodput.add(peer.name, in_time / outcome.seconds / capacity)
    result.table["cnn_120 accepted p99 ms"] = p99_s.medians(1e3)
    result.table["cnn_120 refused share"] = refused.medians()
    result.table["cnn_120 refusal p50 ms"] = refusal_s.medians(1e3)
    result.table["cnn_120 goodput of our capacity"] = goodput.medians()
    result.judged["cnn_120_accepted_p99_ms"] = Judged(p99_s.medians(1e3).get(OURS_SLO.name), "<=", SLO_MS)
    result.judged["cnn_120_goodput"] = Judged(goodput.medians().get(OURS_SLO.name), ">=", 0.9)
    result.judged["cnn_120_refusal_p50_ms"] = Judged(refusal_s.medians(1e3).get(OURS_SLO.name), "<=", 10)
    result.notes.append(
        f"120%: the SLO is {SLO_MS:g} ms; requests in the protocol carry timeout={_TIMEOUT_US} us, "
        "those to ours-slo nothing"
    )


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that ``fraction`` of ``values`` do not exceed; infinite if there are none."""
    if not values:
        return math.inf
    return sorted(values)[math.ceil(fraction * len(values)) - 1]


def _capacity(bench: Bench, server: Server, peer: Peer, model: Model) -> float:
    with ClosedLoop(server.address, [peer.request(model)] * _CLIENTS) as loop:
        return loop.run(bench.seconds(_CAPACITY_SECONDS)).rate
