"""Allocation: within the bounds, giving away what costs least, and nothing in vain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgekit import allocation
from edgekit.allocation import Curve

_curves = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.floats(0, 10), min_size=1, max_size=5).map(
        lambda losses: allocation.curve(
            8 * len(losses), [8 * n for n in range(1, len(losses) + 1)],
            [(8 * (len(losses) - n), loss) for n, loss in enumerate(sorted(losses)) if n],
        )
    ),
    min_size=1,
)  # fmt: skip


def _share(curves: Mapping[str, Curve], widths: Mapping[str, int]) -> float:
    return sum(widths.values()) / sum(found.width for found in curves.values())


@given(curves=_curves, size=st.floats(0.05, 1))
def test_the_bound_holds_or_nothing_more_can_go(curves: Mapping[str, Curve], size: float) -> None:
    """Every width is one of those allowed; the size is met, or every group is at its narrowest."""
    widths = allocation.allocate(curves, lambda w: [_share(curves, w) / size])
    assert all(widths[name] in found.widths for name, found in curves.items())
    narrowest = {name: found.widths[-1] for name, found in curves.items()}
    assert _share(curves, widths) <= size + 1e-9 or widths == narrowest


@given(curves=_curves, size=st.floats(0.3, 1))
def test_nothing_is_given_away_in_vain(curves: Mapping[str, Curve], size: float) -> None:
    """Where the bound holds, no group could be one step wider within it."""

    def uses(widths: Mapping[str, int]) -> list[float]:
        return [_share(curves, widths) / size]

    widths = allocation.allocate(curves, uses)
    if uses(widths)[0] > 1:
        return
    for name, found in curves.items():
        step = found.widths.index(widths[name])
        if step:
            assert uses({**widths, name: found.widths[step - 1]})[0] > 1


def test_the_insensitive_group_gives_and_a_second_bound_counts() -> None:
    """Width goes where the loss is small; a bound on latency takes it from the group that costs the time."""
    allowed = list(range(8, 65, 8))
    curves = {
        "dear": allocation.curve(64, allowed, [(32, 5.0), (8, 20.0)]),
        "cheap": allocation.curve(64, allowed, [(32, 0.1), (8, 0.2)]),
    }
    by_size = allocation.allocate(curves, lambda w: [_share(curves, w) / 0.6])
    assert by_size == {"dear": 64, "cheap": 8}
    slow = allocation.allocate(curves, lambda w: [_share(curves, w) / 0.6, w["dear"] / 64 / 0.5])
    assert slow["dear"] == 32
    assert slow["cheap"] == 40


@given(
    points=st.lists(st.tuples(st.integers(1, 63), st.floats(0, 100)), max_size=6, unique_by=lambda p: p[0])
)
def test_a_curve_is_convex_and_never_says_that_less_is_better(points: list[tuple[int, float]]) -> None:
    """From the whole width on, losses rise, and faster and faster; measured noise makes no dent."""
    found = allocation.curve(64, list(range(1, 64)), points)
    assert found.losses[0] == 0
    steps = [b - a for a, b in pairwise(found.losses)]
    assert all(step >= -1e-9 for step in steps)
    assert all(b >= a - 1e-6 for a, b in pairwise(steps))
