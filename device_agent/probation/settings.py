"""What ``[probation]`` in the agent's configuration can say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Tuple


@dataclass(frozen=True)
class ProbationSettings:
    """When a new version has proven itself.

    Attributes:
        duration_s: how long it serves before it is committed; 0 commits at once. What takes longer to show (a
            slow leak, a rare input) needs a longer one.
        min_requests: evidence that there must be; the agent asks golden inputs itself where clients ask less.
        max_error_fraction: of its requests, or what the old version had where that is more.
        max_latency_ratio: of its p99 to the old version's, where the bundle's contract has no latency.
        max_memory_growth_bytes: by how much its process may grow and still be growing.
        shadow_fraction: of the live requests, to be computed by the new version too for ``duration_s`` before
            it serves; 0: none, and the update takes that much less time.
    """

    duration_s: float = 10.0
    min_requests: int = 20
    max_error_fraction: float = 0.01
    max_latency_ratio: float = 2.0
    max_memory_growth_bytes: int = 64 * 1024 * 1024
    shadow_fraction: float = 0.0


def problems(settings: ProbationSettings) -> Iterator[Tuple[str, str]]:
    """What types cannot say: each field that is wrong, and what it should be."""
    if not 0 <= settings.duration_s < float("inf"):
        yield "duration_s", "zero or more"
    if not 1 <= settings.min_requests <= 1000:
        yield "min_requests", "from 1 to 1000"
    if not 0 <= settings.max_error_fraction < 1:
        yield "max_error_fraction", "from 0 to below 1"
    if not 1 < settings.max_latency_ratio < float("inf"):
        yield "max_latency_ratio", "above 1"
    if settings.max_memory_growth_bytes <= 0:
        yield "max_memory_growth_bytes", "above zero"
    if not 0 <= settings.shadow_fraction <= 1:
        yield "shadow_fraction", "from 0 to 1"
    elif settings.shadow_fraction and not settings.duration_s:
        yield "shadow_fraction", "0 where duration_s is 0"
