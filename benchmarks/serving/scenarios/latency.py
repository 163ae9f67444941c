"""One client that waits for each answer: what a server adds to the engine's own time."""

from __future__ import annotations

import mmap
import os
import statistics
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import client, wire
from serving.bench import Bench, Judged, Result, Rounds
from serving.bundles import write_bundle
from serving.models import Model
from serving.peers.base import Peer
from serving.peers.floors import ECHO
from serving.peers.ours import OURS, install, launch_of, make_site
from serving.peers.triton import PLAIN
from serving.server import Server, ServerError, running

_TINY_COUNT = 1500
_CNN_COUNT = 150
_MLP_COUNT = 150


def latency(bench: Bench) -> Result:
    """The median latency of ``tiny``, and what is added to ``cnn``'s bare ``session.run``."""
    tiny, cnn = bench.models["tiny"], bench.models["cnn"]
    tiny_s, added_s = Rounds(), Rounds()
    with bench.bare() as bare, bench.fleet(bench.peers, [tiny, cnn]) as servers:
        for _ in range(bench.rounds):
            bare_s = bare.run("cnn", bench.count(_CNN_COUNT))
            tiny_s.add("bare", bare.run("tiny", bench.count(_TINY_COUNT)))
            for peer, server in servers.items():
                tiny_s.add(peer.name, _p50(server, peer, tiny, bench.count(_TINY_COUNT)))
                if peer is not ECHO:
                    added_s.add(peer.name, _p50(server, peer, cnn, bench.count(_CNN_COUNT)) - bare_s)
    result = Result({"tiny p50 us": tiny_s.medians(1e6), "cnn p50 over bare us": added_s.medians(1e6)})
    result.judged = {
        "tiny_p50_over_tritons_best": Judged(tiny_s.ratio("ours", bench.find("triton"), "least"), "<=", 0.75),
        "cnn_added_us": Judged(added_s.medians(1e6).get("ours"), "<=", 120),
    }
    return result


def shared_memory(bench: Bench) -> Result:
    """What is added to ``cnn``'s bare ``session.run`` if the tensors lie in shared memory."""
    cnn = bench.models["cnn"]
    added_s = Rounds()
    peers = [peer for peer in bench.peers if peer in (OURS, PLAIN)]
    with bench.bare() as bare, bench.fleet(peers, [cnn]) as servers, _region(cnn) as (key, size):
        asked = {server: _shared_request(server, cnn, key, size) for server in servers.values()}
        for _ in range(bench.rounds):
            bare_s = bare.run("cnn", bench.count(_CNN_COUNT))
            for peer, server in servers.items():
                latencies_s = client.ping(server.address, asked[server], bench.count(_CNN_COUNT))
                added_s.add(peer.name, statistics.median(latencies_s) - bare_s)
    result = Result({"cnn p50 over bare us": added_s.medians(1e6)})
    result.judged = {"shared_memory_added_us": Judged(added_s.medians(1e6).get("ours"), "<=", 80)}
    return result


def alone(bench: Bench) -> Result:
    """What batching costs a client that has the server to itself: the same model with and without."""
    site_directory = bench.directory("alone")
    site = make_site(site_directory)
    with bench.start(OURS, [bench.models["tiny"]]):
        pass  # installs the environment, and shows that it serves
    for model in bench.models.values():
        for name, rows in ((model.name, 16), (f"{model.name}-single", 1)):
            install(OURS.environment, site, write_bundle(site_directory, model, name, 1, rows).directory)
    table: dict[str, dict[str, float | None]] = {}
    counts = {"tiny": _TINY_COUNT, "cnn": _CNN_COUNT, "mlp": _MLP_COUNT}
    ready = [wire.get("/v2/health/ready")]
    with running(launch_of(OURS.environment, site), site_directory / "server.log", ready) as server:
        for model in bench.models.values():
            values_s = Rounds()
            for number in range(2 * bench.rounds):
                order = (model.name, f"{model.name}-single")
                for name in order if number % 2 else reversed(order):
                    request = wire.oip_infer(name, model.row)
                    values_s.add(name, statistics.median(
                        client.ping(server.address, request, bench.count(counts[model.name]))
                    ))  # fmt: skip
            ratio = values_s.ratio(model.name, [f"{model.name}-single"], "least")
            table[f"{model.name} p50 us"] = {
                "batching": values_s.medians(1e6)[model.name],
                "none": values_s.medians(1e6)[f"{model.name}-single"],
                "ratio": ratio,
            }
    result = Result(table)
    for model in bench.models.values():
        ratio = table[f"{model.name} p50 us"]["ratio"]
        result.judged[f"batching_alone_{model.name}"] = Judged(ratio, "<=", 1.05)
    return result


def _p50(server: Server, peer: Peer, model: Model, count: int) -> float:
    return statistics.median(client.ping(server.address, peer.request(model), count))


@contextmanager
def _region(model: Model) -> Iterator[tuple[str, int]]:
    """A shared memory object with the model's row, and room for its answer behind it."""
    path = Path("/dev/shm") / f"bench-{uuid.uuid4().hex}"
    answer_at = -(-model.row.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    size = answer_at + mmap.PAGESIZE
    path.write_bytes(model.row.tobytes().ljust(size, b"\0"))
    os.chmod(path, 0o600)
    try:
        yield f"/{path.name}", size
    finally:
        path.unlink()


def _shared_request(server: Server, model: Model, key: str, size: int) -> bytes:
    registered = wire.parse(client.ask(server.address, wire.oip_register("frames", key, size)))
    if registered.status != 200:
        raise ServerError(f"shared memory cannot be registered: {registered.body!r}")
    return wire.oip_infer_shared(model.name, model.row, "frames", size - mmap.PAGESIZE, model.answer.nbytes)
