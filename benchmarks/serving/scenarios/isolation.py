"""An engine in a process of its own: what it costs, and whether unloading gives everything back."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from serving import client, wire
from serving.bench import Bench, Judged, Result, Rounds, say
from serving.bundles import write_bundle
from serving.peers.ours import OURS, Site, install, launch_of, make_site
from serving.server import Server, ServerError, running
from serving.venvs import prepare

_COUNTS = {"tiny": 1500, "cnn": 150}
_APART = "-apart"
_CYCLES = 1000
_QUICK_CYCLES = 20
_FIRST_CYCLES = 10  # until the allocator and the caches have what they keep
_READY_TIMEOUT_S = 30.0


def isolation(bench: Bench) -> Result:
    """The latency of the same model in the agent's process and in one of its own, in turn."""
    prepare(OURS.environment)
    directory = bench.directory("isolation")
    tables = "".join(f"[models.{name}{_APART}]\nisolate = true\n" for name in _COUNTS)
    site = _site(directory, tables)
    for name in _COUNTS:
        for served in (name, name + _APART):
            install(OURS.environment, site, write_bundle(directory, bench.models[name], served).directory)
    values_s = Rounds()
    ready = [wire.get("/v2/health/ready")]
    with running(launch_of(OURS.environment, site), directory / "server.log", ready) as server:
        for number in range(2 * bench.rounds):
            for name, count in _COUNTS.items():
                order = (name, name + _APART)
                for served in order if number % 2 else reversed(order):
                    request = wire.oip_infer(served, bench.models[name].row)
                    taken_s = client.ping(server.address, request, bench.count(count))
                    values_s.add(served, statistics.median(taken_s))
    medians = values_s.medians(1e6)
    result = Result()
    for name in _COUNTS:
        result.table[f"{name} p50 us"] = {"in process": medians[name], "isolated": medians[name + _APART]}
    return result


def reloads(bench: Bench) -> Result:
    """Load and unload an isolated model again and again: the memory of the agent and all it started."""
    prepare(OURS.environment)
    directory = bench.directory("reloads")
    site = _site(directory, "[models.cnn]\nisolate = true\n")
    install(OURS.environment, site, write_bundle(directory, bench.models["cnn"]).directory)
    cycles = _QUICK_CYCLES if bench.quick else _CYCLES
    ready = [wire.get("/v2/health/ready")]
    with running(launch_of(OURS.environment, site), directory / "server.log", ready) as server:
        for _ in range(_FIRST_CYCLES):
            _cycle(server)
        before_bytes = server.held_bytes()
        for number in range(cycles):
            _cycle(server)
            if number % 100 == 99:
                say(f"  {number + 1} cycles: {server.held_bytes() / 1e6:.1f} MB")
        after_bytes = server.held_bytes()
        processes = len(server.processes())
    ratio = after_bytes / before_bytes
    result = Result({
        "memory MB, without files": {
            "after 10 cycles": before_bytes / 1e6, f"after {cycles} more": after_bytes / 1e6,
        },
        "processes": {"ours": float(processes)},
    })  # fmt: skip
    result.judged = {
        "reloads": Judged(cycles, ">=", cycles),
        "reloads_memory_over_start": Judged(ratio, "<=", 1.05),
        "reloads_processes": Judged(processes, "==", 2),
    }
    return result


def _site(directory: Path, tables: str) -> Site:
    site = make_site(directory)
    site.config.write_text(site.config.read_text() + tables)
    return site


def _cycle(server: Server) -> None:
    _ask(server, wire.post("/v2/repository/models/cnn/unload", b"{}", "application/json"))
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while len(server.processes()) > 1:  # its process is gone only when its memory is
        if time.monotonic() > deadline_s:
            raise ServerError("an unloaded model's process does not end")
        time.sleep(0.001)
    _ask(server, wire.post("/v2/repository/models/cnn/load", b"{}", "application/json"))


def _ask(server: Server, request: bytes) -> None:
    answer = wire.parse(client.ask(server.address, request))
    if answer.status != 200:
        raise ServerError(f"the agent answered {answer.status} to a load or unload")
