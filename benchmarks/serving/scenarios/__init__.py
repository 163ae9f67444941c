"""What is measured, by name. A new scenario is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from serving.bench import Bench, Result
from serving.scenarios.ending import sigterm
from serving.scenarios.footprint import footprint
from serving.scenarios.latency import alone, latency, shared_memory
from serving.scenarios.open_loop import open_loop
from serving.scenarios.priorities import priorities
from serving.scenarios.swaps import swaps
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
}

#: Promised and not measured here, with the reason.
NOT_MEASURED = {
    "1,000 load/unload cycles of a process-isolated model": "the agent runs engines in its own process",
    "soak and fuzzing": "tests, not benchmarks",
}
