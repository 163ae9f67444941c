"""What is measured, by name. A new scenario is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from serving.bench import Bench, Result
from serving.scenarios.cores import cores
from serving.scenarios.ending import sigterm
from serving.scenarios.footprint import footprint
from serving.scenarios.isolation import isolation, reloads
from serving.scenarios.latency import alone, latency, shared_memory
from serving.scenarios.open_loop import open_loop
from serving.scenarios.priorities import priorities
from serving.scenarios.swaps import pauses, swaps
from serving.scenarios.throughput import mlp, throughput

SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    "latency": latency,
    "shared_memory": shared_memory,
    "alone": alone,
    "throughput": throughput,
    "mlp": mlp,
    "open_loop": open_loop,
    "priorities": priorities,
    "sigterm": sigterm,
    "footprint": footprint,
    "swaps": swaps,
    "pauses": pauses,
    "isolation": isolation,
    "reloads": reloads,
    "cores": cores,
}

#: Promised and not measured here, with the reason.
NOT_MEASURED = {
    "soak and fuzzing": "tests, not benchmarks",
}
