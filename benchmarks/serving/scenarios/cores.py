"""Two models at once on two cores: each on its own core, or both wherever the system puts them."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from device_agent.server import control
from serving import client, wire
from serving.bench import Bench, Judged, Result, Rounds
from serving.bundles import write_bundle
from serving.peers.ours import OURS, Site, install, launch_of, make_site
from serving.server import Launch, Server, running
from serving.venvs import prepare

_COUNT = 300
_MODELS = ("left", "right")


def cores(bench: Bench) -> Result:
    """The latency of two models under load, pinned and floating, and where the kernel says they ran."""
    available = sorted(os.sched_getaffinity(0) | set(range(os.cpu_count() or 1)))[:2]
    if len(available) < 2:
        return Result(notes=["cores: not measured, since the machine has one core"])
    prepare(OURS.environment)
    pinned = "".join(
        f'[models.{name}]\ncpus = "{core}"\n' for name, core in zip(_MODELS, available, strict=True)
    )
    p50_s, p99_s, sites = Rounds(), Rounds(), {}
    for arrangement, tables in (("pinned", pinned), ("floating", "")):
        sites[arrangement] = _site(bench, arrangement, tables)
    ready, confined = [wire.get("/v2/health/ready")], False
    for number in range(bench.rounds):
        order = list(sites.items())
        for arrangement, site in order if number % 2 else reversed(order):
            log = bench.work / f"cores-{arrangement}.log"
            with running(_everywhere(launch_of(OURS.environment, site), available), log, ready) as server:
                latencies_s = _both(server, bench)
                p50_s.add(arrangement, float(np.quantile(latencies_s, 0.5)))
                p99_s.add(arrangement, float(np.quantile(latencies_s, 0.99)))
                if arrangement == "pinned":
                    confined = _confined(site, dict(zip(_MODELS, available, strict=True)))
    result = Result({"cnn p50 ms, two models": p50_s.medians(1e3), "cnn p99 ms": p99_s.medians(1e3)})
    result.judged = {"threads_where_asked": Judged(float(confined), "==", 1)}
    result.notes = ["cores: the server uses both cores here, and the client shares them"]
    return result


def _site(bench: Bench, arrangement: str, tables: str) -> Site:
    directory: Path = bench.directory(f"cores-{arrangement}")
    site = make_site(directory)
    for name in _MODELS:
        install(OURS.environment, site, write_bundle(directory, bench.models["cnn"], name).directory)
    # Only now: this process, and the installation with it, may use one of the cores alone.
    site.config.write_text(site.config.read_text() + tables)
    return site


def _everywhere(launch: Launch, available: list[int]) -> Launch:
    """A server that may use both cores; the benchmark's servers are otherwise confined to the first."""
    numbers = ",".join(map(str, available))
    return Launch(["taskset", "-c", numbers, *launch.command], launch.port, launch.environment)


def _both(server: Server, bench: Bench) -> list[float]:
    """Latencies of both models, asked at the same time by a client each."""
    latencies_s: list[float] = []

    def ask(name: str) -> None:
        request = wire.oip_infer(name, bench.models["cnn"].row)
        latencies_s.extend(client.ping(server.address, request, bench.count(_COUNT)))

    clients = [threading.Thread(target=ask, args=(name,)) for name in _MODELS]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    return latencies_s


def _confined(site: Site, wanted: Mapping[str, int]) -> bool:
    """Whether the kernel says that every thread of each model may use its one core only."""
    models = control.request(site.control, {"op": "status"}, lambda state: None)
    return all(
        model["engine"]["placed"] is True
        and {thread["cpus"] for thread in model["engine"]["threads"]} == {str(wanted[model["name"]])}
        for model in models
    )
