"""Ten minutes of everything at once.

python benchmarks/serving/soak.py [--minutes 10] [--seed 1] [--json] [--quick]

Good clients send every kind of request and check every answer bit for bit; hostile ones vanish, lie, drip,
bomb and shrink their memory; versions are swapped and models unloaded meanwhile. At the end nothing may hang,
leak or be miscounted, no 500 may lack its cause in the log, and the agent must stop when it is told to.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

import grpc
from common import document, finish

from serving import client, wire
from serving.server import Server
from serving.soaking.good import GoodClient
from serving.soaking.hostile import HostileClient
from serving.soaking.link import HANG_S, Closed, Hang, Link
from serving.soaking.rpc import RpcClient
from serving.soaking.site import Here, Soaked, Upheaval, address_of, launch, prepare
from serving.soaking.tally import Tally
from serving.soaking.watch import Counters, Held, MemoryWatch, errors_logged, held
from serving.venvs import Environment, agent_requirements
from serving.venvs import prepare as prepare_environment

CLAIM = "the agent serves on, right and bounded, whatever its clients do"
ENVIRONMENT = Environment("agent-grpc", (*agent_requirements(), "grpcio==1.85.3"))
_GOOD_CLIENTS = 8
_HOSTILE_CLIENTS = 8
_RPC_CLIENTS = 3
_SWAP_PAUSE_S = 1.0
_FIRST_CONTACT_S = 1.0
_SETTLE_S = 6.0
_STOP_S = 10.0
_QUICK_S = 20.0
#: The allocator and the caches of a process grow for its first minutes; a short soak sees nothing else.
_LONG_S = 120.0
_GROWTH_FRACTION, _SHORT_GROWTH_FRACTION = 0.05, 0.25
#: What may have come and stayed for good reason: threads of pools that grow when they are first needed.
_SPARE_FILES = 1  # one client's last shared memory has been seen to outlive it; a leak would be one a client
_SPARE_THREADS = 8


def main() -> None:
    """Soak, and print the document."""
    options = _options()
    prepare_environment(ENVIRONMENT)
    seconds = _QUICK_S if options.quick else options.minutes * 60.0
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        result = soak(Path(work), ENVIRONMENT, seconds, options.seed)
    for violation in result["figures"].pop("first_violations"):
        print(f"  violation: {violation}", file=sys.stderr)
    finish(result, options.json)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_S:g} seconds, to see that it works")
    return parser.parse_args()


def soak(work: Path, environment: Environment | Here, seconds: float, seed: int) -> dict[str, Any]:
    """Soak an agent.

    Args:
        work: where its files go.
        environment: whose interpreter runs it.
        seconds: how long.
        seed: of everything that is random.

    Returns:
        The document of a benchmark; its figures have ``first_violations``, in words.
    """
    soaked, tally, log = prepare(work, environment), Tally(), work / "agent.log"
    server = Server(launch(soaked, environment), log, [wire.get("/v2/health/ready")])
    try:
        watch, upheaval = MemoryWatch(server), Upheaval(soaked, server.address, _SWAP_PAUSE_S)
        doors = server.address, address_of("grpc", log)
        asyncio.run(_crowd(soaked, *doors, tally, _FIRST_CONTACT_S, seed))
        time.sleep(_FIRST_CONTACT_S)
        start = held(server)  # with all that is opened once, when it is first needed
        watch.start()
        upheaval.start()
        asyncio.run(_crowd(soaked, *doors, tally, seconds, seed + 1000))
        upheaval.stop()
        watch.stop()
        if upheaval.failure is not None:
            tally.violate(f"a swap or a load failed: {upheaval.failure!r}")
        end = _settled(server, start)
        _compare_counters(Counters(address_of("metrics", log)), tally, soaked)
        stopped_s = _stop(server)
        growth_bound = _GROWTH_FRACTION if seconds >= _LONG_S else _SHORT_GROWTH_FRACTION
        figures = _figures(tally, upheaval, watch, (start, end), errors_logged(log), stopped_s)
        return document("soak", CLAIM, figures, _targets(growth_bound), runs=1)
    finally:
        server.kill()


# Clients


async def _crowd(
    soaked: Soaked, address: client.Address, rpc: client.Address, tally: Tally, seconds: float, seed: int
) -> None:
    end_s = time.monotonic() + seconds
    good = [GoodClient(soaked, tally, number, seed + number) for number in range(_GOOD_CLIENTS)]
    spare = GoodClient(soaked, tally, _GOOD_CLIENTS, seed)  # whose requests the hostile ones abuse
    hostile = [HostileClient(spare, tally, number, seed - number) for number in range(_HOSTILE_CLIENTS)]
    try:
        visits = [one.visit_ahead if number % 4 == 3 else one.visit for number, one in enumerate(good)]
        visits += [one.visit for one in hostile]
        others = [RpcClient(soaked, tally, "{}:{}".format(*rpc), seed + n) for n in range(_RPC_CLIENTS)]
        await asyncio.gather(
            *(_come_again(address, tally, visit, end_s) for visit in visits),
            *(_call_again(one, tally, end_s) for one in others),
        )
        async with Link(address) as link:
            await link.send(wire.post("/v2/systemsharedmemory/unregister", b"{}", ""))
            await link.receive()
    finally:
        for one in (*good, spare):
            one.close()


async def _come_again(address: client.Address, tally: Tally, visit: Any, end_s: float) -> None:
    good = isinstance(visit.__self__, GoodClient)
    while time.monotonic() < end_s:
        try:
            async with Link(address) as link:
                await visit(link)
        except Hang:
            tally.violate(f"{visit.__qualname__}: nothing came for {HANG_S:g} s")
        except Closed:
            if good:
                tally.violate(f"{visit.__qualname__}: closed without an answer")
        except OSError as error:
            tally.violate(f"{visit.__qualname__}: {error!r}")


async def _call_again(one: RpcClient, tally: Tally, end_s: float) -> None:
    while time.monotonic() < end_s:
        try:
            await asyncio.wait_for(one.visit(), HANG_S)
        except asyncio.TimeoutError:
            tally.violate(f"gRPC: nothing came for {HANG_S:g} s")
        except grpc.RpcError as error:
            tally.violate(f"gRPC: {error!r}")


# What is left


def _settled(server: Server, start: Held) -> Held:
    """What the agent holds when all clients are gone; it may take a moment to notice."""
    deadline_s = time.monotonic() + _SETTLE_S
    while (now := held(server)).files > start.files and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return now


def _compare_counters(counters: Counters, tally: Tally, soaked: Soaked) -> None:
    """Every request that was answered is counted, and none twice."""
    for model in soaked.models:
        by_status: Counter[int] = Counter()
        for (name, status), count in tally.answers.items():
            by_status[status] += count if name == model else 0
        unsure = tally.uncertain[model]
        known = by_status[200] + by_status[500] + by_status[503]
        for what, got, least in (
            ("answered", counters.of(model, "total_seconds_count"), by_status[200]),
            ("failed", counters.of(model, "failed_total"), by_status[500]),
            ("came to an end", counters.ended(model), known),
        ):
            if not least <= got <= least + unsure:
                tally.violate(
                    f"{model}: {got} {what} by its counters, {least} to {least + unsure} by its clients"
                )


def _stop(server: Server) -> float:
    """Seconds from SIGTERM to the end, with a client that goes on sending one request for ever."""
    with client.connect(server.address, _STOP_S) as slow:
        slow.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        started_s = time.monotonic()
        server.terminate()
        server.wait(_STOP_S)
        return time.monotonic() - started_s


def _figures(
    tally: Tally,
    upheaval: Upheaval,
    watch: MemoryWatch,
    holdings: tuple[Held, Held],
    logged: tuple[int, int],
    stopped_s: float,
) -> dict[str, Any]:
    start, end = holdings
    causes, tracebacks = logged
    return {
        "requests_answered": sum(tally.answers.values()),
        **{f"answered_{status}": count for status, count in sorted(tally.statuses.items())},
        **{f"clients_{name.replace(' ', '_')}": count for name, count in sorted(tally.actions.items())},
        "swaps": upheaval.swaps,
        "unloads": upheaval.loads,
        "violations": tally.broken,
        "causes_missing": max(0, tally.of_status(500) - causes),
        "tracebacks": tracebacks,
        "memory_mb": round(watch.samples[-1][1] / 1e6, 1) if watch.samples else None,
        "memory_growth_fraction": round(watch.growth_fraction(), 4) if watch.samples else None,
        "files_left": end.files - start.files,
        "sockets_left": end.sockets - start.sockets,
        "threads_left": end.threads - start.threads,
        "stop_s": round(stopped_s, 2),
        "first_violations": tally.violations,
    }


def _targets(growth_bound: float) -> dict[str, tuple[str, float]]:
    return {
        "violations": ("==", 0), "causes_missing": ("==", 0), "tracebacks": ("==", 0),
        "memory_growth_fraction": ("<=", growth_bound), "files_left": ("<=", _SPARE_FILES),
        "sockets_left": ("<=", 0), "threads_left": ("<=", _SPARE_THREADS), "stop_s": ("<=", 3.0),
    }  # fmt: skip


if __name__ == "__main__":
    main()
