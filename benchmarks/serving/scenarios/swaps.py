"""Versions that change under load: no request may notice."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from device_agent.server import control
from serving import client, wire
from serving.bench import Bench, Judged, Result, say
from serving.bundles import write_bundle
from serving.closed_loop import ClosedLoop
from serving.models import write_variant
from serving.peers.ours import OURS, install, launch_of, make_site
from serving.server import ServerError, running
from serving.venvs import prepare

_SWAPS = 50
_QUICK_SWAPS = 4
_CLIENTS = 4
_LONGEST_S = 240.0


def swaps(bench: Bench) -> Result:
    """Activate two versions in turn through the control socket while four clients ask without pause."""
    prepare(OURS.environment)
    directory = bench.directory("swaps")
    site = make_site(directory)
    versions = [bench.models["tiny"], write_variant(directory, seed=7)]
    digests = [
        install(OURS.environment, site, write_bundle(directory, model, version=number).directory)
        for number, model in enumerate(versions, start=1)
    ]
    request = wire.oip_infer("tiny", versions[0].row)
    wanted = _QUICK_SWAPS if bench.quick else _SWAPS
    ready = [wire.get("/v2/health/ready")]
    with running(launch_of(OURS.environment, site), directory / "server.log", ready) as server:
        swapper = _Swapper(site.control, digests, wanted)
        with ClosedLoop(server.address, [request] * _CLIENTS) as loop:
            swapper.start()
            outcome = loop.run(_LONGEST_S, lambda: not swapper.is_alive())
            loop.collect()
        swapper.join(_LONGEST_S)
        if swapper.failure is not None:
            raise ServerError(f"a swap failed: {swapper.failure}")
        served = wire.oip_decode(wire.parse(client.ask(server.address, request)))
        if not np.allclose(served, versions[(wanted - 1) % 2].answer, atol=1e-3):
            raise ServerError("after the last swap, another version answers")
    failed = outcome.failed + len(outcome.refused_s) + outcome.lost + outcome.dropped
    say(f"  {swapper.done} swaps under {len(outcome.latencies_s)} requests")
    result = Result({
        "swaps": {"ours": float(swapper.done)},
        "requests meanwhile": {"ours": float(len(outcome.latencies_s))},
        "failed or lost": {"ours": float(failed)},
    })  # fmt: skip
    result.judged = {
        "swaps": Judged(swapper.done, ">=", wanted),
        "swaps_failed_requests": Judged(failed, "==", 0),
    }
    return result


class _Swapper(threading.Thread):
    """Activates the digests in turn."""

    def __init__(self, socket: Path, digests: list[str], count: int) -> None:
        super().__init__(daemon=True)
        self.done = 0
        self.failure: Exception | None = None
        self._socket = socket
        self._digests = digests
        self._count = count

    def run(self) -> None:
        try:
            for number in range(self._count):
                message = {"op": "activate", "digest": self._digests[number % 2]}
                control.request(self._socket, message, lambda state: None)
                self.done += 1
        except Exception as error:  # handed to the scenario, which reports it
            self.failure = error
