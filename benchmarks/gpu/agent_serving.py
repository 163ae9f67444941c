"""Requests a second that the agent answers within a p99, with dynamic batching and without. Python 3.8.

The agent serves a deep network for small images in fp16 over HTTP, so that the engine should be the limit and
not Python's HTTP; the clients (``load.py``, under the system's Python) are a process of their
own that does not wait for answers. A rate counts if in most climbs its p99 is within the
bound and every request was answered. "Without" is the same bundle with max_batch_size 1.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, List

from agent_process import Agent

P99_MS = (10.0, 20.0)
SECONDS = 3.0
CLIMBS = 3  # odd: most of them are never half
_LOAD = Path(__file__).parent / "load.py"
_RATES = (200, 250, 300, 400, 500, 700, 1000, 1500, 2000, 2500, 3000, 4000)


def run(start: Callable[..., Agent], inputs: Dict[str, Any], work: Path, quick: bool) -> Dict[str, Any]:
    """Climb until a rate cannot be held, for each of the two; ``CLIMBS`` times, in turn.

    Args:
        start: makes an agent that serves, from a directory of its own and changes to the manifest.
        inputs: samples of the model.
        work: where the agents' directories are made.
        quick: climb once.
    """
    agents = {"batched": start(work / "batched"), "alone": start(work / "alone", max_batch_size=1)}
    row = {name: array[:1] for name, array in inputs.items()}
    request = work / "request.json"
    request.write_text(json.dumps({name: [str(x.dtype), x.tolist()] for name, x in row.items()}))
    climbs: Dict[str, List[Any]] = {"batched": [], "alone": []}
    try:
        for _ in range(1 if quick else CLIMBS):
            for name in ("alone", "batched"):
                climbs[name].append(_climb(agents[name].http, request))
                print(name, climbs[name][-1], flush=True)
        batches = agents["batched"].metric("edgekit_inference_batch_rows_bucket")
    finally:
        for agent in agents.values():
            agent.stop()
    found: Dict[str, Any] = {"climbs": climbs, "batch_rows": batches, "at_p99": {}}
    for bound in P99_MS:
        most: Dict[str, Any] = {name: _best_of_most(climbs[name], bound) for name in climbs}
        ratio = most["batched"] / most["alone"] if most["alone"] else None
        single = {name: [_best(climb, bound) for climb in climbs[name]] for name in climbs}
        found["at_p99"][f"{bound:g} ms"] = {**most, "ratio": ratio, "climbs": single}
    return found


def _best_of_most(climbs: List[List[Dict[str, Any]]], bound_ms: float) -> float:
    """The highest rate within the bound in most climbs: that of its median p99."""
    held = [rate for climb in climbs for rate in _held(climb, bound_ms)]
    return max((rate for rate in held if 2 * held.count(rate) > len(climbs)), default=0.0)


def _best(climb: List[Dict[str, Any]], bound_ms: float) -> float:
    return max(_held(climb, bound_ms), default=0.0)


def _held(climb: List[Dict[str, Any]], bound_ms: float) -> List[float]:
    return [float(trial["rate"]) for trial in climb if trial["p99_ms"] <= bound_ms and trial["held"]]


def _climb(address: str, request: Path) -> List[Dict[str, Any]]:
    trials = []
    for rate in _RATES:
        trial = _trial(address, request, rate)
        trials.append(trial)
        print(trial, flush=True)
        if trial["p99_ms"] > 4 * max(P99_MS) or not trial["held"]:
            break
    return trials


def _trial(address: str, request: Path, rate: int) -> Dict[str, Any]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
    done = subprocess.run(
        ["python3", str(_LOAD), address, str(request), str(rate), str(SECONDS)],
        env=clean, stdout=subprocess.PIPE, timeout=60, check=True,
    )  # fmt: skip
    trial: Dict[str, Any] = json.loads(done.stdout)
    return trial
