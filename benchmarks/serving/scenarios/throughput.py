"""Several clients at once: how many answers a second one core gives."""

from __future__ import annotations

from serving.bench import Bench, Judged, Result, Rounds, say
from serving.client import Outcome
from serving.closed_loop import ClosedLoop
from serving.models import Model
from serving.peers.base import Peer
from serving.peers.floors import ECHO
from serving.server import Server

_SECONDS = 1.5
_PYTHON_PEERS = ("mlserver", "litserve", "bentoml")
_CNN_COUNT = 150


def throughput(bench: Bench) -> Result:
    """``tiny`` with 16 and 4 clients, and ``cnn`` with 16 as a share of the engine's own rate."""
    tiny, cnn = bench.models["tiny"], bench.models["cnn"]
    tiny_16, tiny_4, cnn_16 = Rounds(), Rounds(), Rounds()
    with bench.bare() as bare, bench.fleet(bench.peers, [tiny, cnn]) as servers:
        for number in range(bench.rounds):
            say(f"  round {number + 1} of {bench.rounds}")
            for peer, server in servers.items():
                tiny_16.add(peer.name, _rate(bench, server, peer, tiny, 16))
                tiny_4.add(peer.name, _rate(bench, server, peer, tiny, 4))
            cnn_16.add("bare", 1 / bare.run("cnn", bench.count(_CNN_COUNT)))
            for peer, server in servers.items():
                if peer is not ECHO:
                    cnn_16.add(peer.name, _rate(bench, server, peer, cnn, 16))
    result = Result({
        "tiny per s, 16 clients": tiny_16.medians(),
        "tiny per s, 4 clients": tiny_4.medians(),
        "cnn per s, 16 clients": cnn_16.medians(),
    })  # fmt: skip
    triton, python = bench.find("triton"), _python_peers(bench)
    result.judged = {
        "tiny_16_over_tritons_best": Judged(tiny_16.ratio("ours", triton, "most"), ">", 1.0),
        "tiny_4_over_tritons_best": Judged(tiny_4.ratio("ours", triton, "most"), ">", 1.0),
        "tiny_16_over_best_python_peer": Judged(tiny_16.ratio("ours", python, "most"), ">=", 5.0),
        "cnn_16_share_of_engine": Judged(cnn_16.ratio("ours", ["bare"], "most"), ">=", 0.95),
    }
    return result


def mlp(bench: Bench) -> Result:
    """The model where batching pays, with 4 and 16 clients and one and the same setting of each server."""
    model = bench.models["mlp"]
    with_4, with_16 = Rounds(), Rounds()
    with bench.fleet(bench.servers(), [model]) as servers:
        for number in range(bench.rounds):
            say(f"  round {number + 1} of {bench.rounds}")
            for peer, server in servers.items():
                with_4.add(peer.name, _rate(bench, server, peer, model, 4))
                with_16.add(peer.name, _rate(bench, server, peer, model, 16))
    result = Result({"mlp per s, 4 clients": with_4.medians(), "mlp per s, 16 clients": with_16.medians()})
    triton = bench.find("triton")
    result.judged = {
        "mlp_4_over_tritons_best": Judged(with_4.ratio("ours", triton, "most"), ">", 1.0),
        "mlp_16_over_tritons_best": Judged(with_16.ratio("ours", triton, "most"), ">", 1.0),
    }
    return result


def _rate(bench: Bench, server: Server, peer: Peer, model: Model, clients: int) -> float:
    with ClosedLoop(server.address, [peer.request(model)] * clients) as loop:
        loop.run(bench.seconds(_SECONDS) / 5)  # connections are made and batch sizes learned
        loop.outcome = Outcome()
        outcome = loop.run(bench.seconds(_SECONDS))
    if outcome.failed or outcome.lost or outcome.refused_s:
        say(f"  {peer.name}: {outcome.failed} failed, {outcome.lost} lost, {len(outcome.refused_s)} refused")
    return outcome.rate


def _python_peers(bench: Bench) -> list[str]:
    return [name for prefix in _PYTHON_PEERS for name in bench.find(prefix)]
