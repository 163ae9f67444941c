"""The agent beside Triton, MLServer, LitServe and BentoML: same models, same client, one core each.

python benchmarks/serving/run.py [--json] [--quick] [--peers triton,mlserver] [--only latency] [--rounds N]

The servers are pinned to one core and the client to another; every measurement is repeated in rounds that
go through all servers in turn, and what is judged is a ratio inside a round or a median over the rounds.
Each peer is installed into an environment of its own under .bench/ when it is first needed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from common import document, finish

from serving import venvs
from serving.bench import Bench, Judged, Result, say
from serving.models import write_models
from serving.peers import ALWAYS, DEFAULT_GROUPS, GROUPS
from serving.peers.base import Peer
from serving.scenarios import NOT_MEASURED, SCENARIOS
from serving.server import CLIENT_CORE, ServerError, on_core
from serving.table import render

CLAIM = (
    "the agent adds less to the engine's own time than its peers, and refuses early rather than answers late"
)
_ROUNDS = 5
_ENDING = (signal.SIGINT, signal.SIGTERM)
_CONDITIONS = (
    "one thread for ONNX Runtime everywhere; the servers on core 0, the client on core 1",
    "Triton runs the session in its Python backend; its wheel has no other",
    "servers without binary tensors get Base64, which they read sooner than numbers in JSON",
    "MLServer, LitServe and BentoML batch mlp alone, where it pays; ours and Triton have one setting for all",
)


def main() -> None:
    """Run the scenarios that were asked for."""
    options = _options()
    for number in _ENDING:
        signal.signal(number, _end)
    rounds = options.rounds or (1 if options.quick else _ROUNDS)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary, on_core(CLIENT_CORE):
        work = Path(temporary)
        bench = Bench(work, write_models(work), _peers(options.peers), rounds, options.quick)
        results = {}
        for name in options.only:
            say(name)
            results[name] = _run(name, bench)
            if not options.json:
                print(render(name, results[name].table), flush=True)
    result = _document(bench, results)
    if not options.json:
        result = {**result, "figures": {k: result["figures"][k] for k in result["targets"]}}
    finish(result, options.json)


def _end(number: int, frame: FrameType | None) -> None:
    """Leave through the ``with`` blocks, which stops the servers; a second Ctrl-C cannot cut that short."""
    for ending in _ENDING:
        signal.signal(ending, signal.SIG_IGN)
    sys.exit(128 + number)


def _run(name: str, bench: Bench) -> Result:
    """Run a scenario; one that breaks is a target missed, and the others still run."""
    try:
        return SCENARIOS[name](bench)
    except (ServerError, venvs.EnvironmentFailed, OSError, RuntimeError) as error:
        say(f"  {name} broke: {error}")
        return Result(judged={f"{name}_ran": Judged(0, "==", 1)}, notes=[f"{name} broke: {error}"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the document only")
    parser.add_argument("--quick", action="store_true", help="ours and the floors, one short round")
    parser.add_argument(
        "--peers", type=_names(GROUPS), metavar="NAMES", help=f"some of {', '.join(GROUPS)}, by comma"
    )
    parser.add_argument(
        "--only", type=_names(SCENARIOS), default=list(SCENARIOS), metavar="NAMES",
        help=f"some of {', '.join(SCENARIOS)}, by comma",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, choices=range(1, 21), metavar="N", help="1 to 20; default 5")
    options = parser.parse_args()
    if options.peers is None:
        options.peers = [] if options.quick else list(DEFAULT_GROUPS)
    return options


def _names(known: Mapping[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse


def _peers(groups: Sequence[str]) -> list[Peer]:
    return [*ALWAYS, *(peer for group in groups for peer in GROUPS[group])]


def _document(bench: Bench, results: Mapping[str, Result]) -> dict[str, Any]:
    judged: dict[str, Judged] = {}
    for result in results.values():
        judged |= result.judged
    possible = {key: figure for key, figure in judged.items() if figure.value is not None}
    figures: dict[str, Any] = {key: figure.value for key, figure in possible.items()}
    figures["tables"] = {name: result.table for name, result in results.items()}
    figures["notes"] = [*_CONDITIONS, *(note for result in results.values() for note in result.notes)]
    figures["absent"] = bench.absent
    figures["not_judged"] = {key: "no peer to compare with" for key in judged if key not in possible}
    figures["not_measured"] = NOT_MEASURED
    figures["peer_versions"] = _versions(bench)
    targets = {key: (figure.comparison, figure.bound) for key, figure in possible.items()}
    return document("serving", CLAIM, figures, targets, bench.rounds)


def _versions(bench: Bench) -> dict[str, str]:
    """The releases of the peers that are installed."""
    return {
        peer.name: f"{peer.package} {venvs.version(peer.environment, peer.package)}"
        for peer in bench.peers
        if peer.environment.python.exists()
    }


if __name__ == "__main__":
    main()
