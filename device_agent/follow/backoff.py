"""When to look again: pure, with the chance given as an argument.

Exponential back-off with full jitter (Brooker, "Exponential Backoff And Jitter", 2015): of the ways to wait,
the one that makes many devices, which failed together, come back the least together.
"""

from __future__ import annotations

FIRST_S = 5.0
LONGEST_S = 1800.0
SHORTEST_S = 1.0
_SPREAD = 0.1
_FIRST_LOOK_S = 60.0


def after_failures_s(failures: int, chance: float, asked_s: float = 0.0) -> float:
    """How long to wait after failures in a row.

    Args:
        failures: at least 1.
        chance: from 0 to 1, evenly drawn.
        asked_s: what the registry asked for in ``Retry-After``; the wait is longer than that.

    Returns:
        Seconds: ``asked_s``, and from ``SHORTEST_S`` to ``LONGEST_S`` on top.
    """
    # The exponent is bounded, for after months of failures two to its power would be no float.
    bound_s = min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 16))
    return asked_s + max(SHORTEST_S, bound_s * chance)


def next_look_s(interval_s: float, chance: float) -> float:
    """How long to wait after a look that went well: the interval, give or take a tenth."""
    return interval_s * (1.0 - _SPREAD + 2.0 * _SPREAD * chance)


def first_look_s(interval_s: float, chance: float) -> float:
    """How long to wait at the start: devices that got their power back together shall not ask together."""
    return min(interval_s, _FIRST_LOOK_S) * chance
