"""Versions that change under load: no request may notice, or only in a pause that is told beforehand."""

from __future__ import annotations

import itertools
import re
import statistics
import threading
import time
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
_PAUSES = 10
_QUICK_PAUSES = 2
_RETRY_S = 2e-3
#: No version fits beside another, and each has a process of its own.
_CROWDED = f"[limits]\nmemory_reserve_bytes = {1 << 60}\n[models.cnn]\nisolate = true\n"


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


def pauses(bench: Bench) -> Result:
    """Change versions of an isolated model that does not fit twice, while a client asks without pause."""
    prepare(OURS.environment)
    directory = bench.directory("pauses")
    site, model = make_site(directory, _CROWDED), bench.models["cnn"]
    digests = [
        install(OURS.environment, site, write_bundle(directory, model, version=number).directory)
        for number in (1, 2)
    ]
    wanted = _QUICK_PAUSES if bench.quick else _PAUSES
    ready = [wire.get("/v2/health/ready")]
    with running(launch_of(OURS.environment, site), directory / "server.log", ready) as server:
        swapper = _Swapper(site.control, digests, wanted)
        answered_s, refused, failed = [time.perf_counter()], 0, 0
        swapper.start()
        while swapper.is_alive():
            status = wire.parse(client.ask(server.address, wire.oip_infer("cnn", model.row))).status
            if status == 200:
                answered_s.append(time.perf_counter())
            elif status == 503:
                refused += 1
                time.sleep(_RETRY_S)
            else:
                failed += 1
        if swapper.failure is not None:
            raise ServerError(f"a swap failed: {swapper.failure}")
    told_s = [float(seconds) for seconds in re.findall(r"pause about ([\d.]+) s", " ".join(swapper.told))]
    gaps_s = sorted(later - earlier for earlier, later in itertools.pairwise(answered_s))[-wanted:]
    result = Result({
        "pauses": {"ours": float(swapper.done)},
        "pause told s, p50": {"ours": statistics.median(told_s)},
        "no answer for s, p50": {"ours": statistics.median(gaps_s)},
        "no answer for s, longest": {"ours": gaps_s[-1]},
        "answered": {"ours": float(len(answered_s) - 1)},
        "asked to come back": {"ours": float(refused)},
    })  # fmt: skip
    result.judged = {
        "pauses_told": Judged(len(told_s), "==", wanted),
        "pauses_failed_requests": Judged(failed, "==", 0),
        "pauses_over_told": Judged(statistics.median(gaps_s) / statistics.median(told_s), "<=", 1.5),
    }
    return result


class _Swapper(threading.Thread):
    """Activates the digests in turn, and keeps what it is told meanwhile."""

    def __init__(self, socket: Path, digests: list[str], count: int) -> None:
        super().__init__(daemon=True)
        self.done = 0
        self.told: list[str] = []
        self.failure: Exception | None = None
        self._socket = socket
        self._digests = digests
        self._count = count

    def run(self) -> None:
        try:
            for number in range(self._count):
                message = {"op": "activate", "digest": self._digests[number % 2]}
                control.request(self._socket, message, self.told.append)
                self.done += 1
        except Exception as error:  # handed to the scenario, which reports it
            self.failure = error
