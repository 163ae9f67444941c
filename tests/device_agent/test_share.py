"""Fair use of one engine by several models, on a simulated clock."""

from __future__ import annotations

import heapq
from typing import Dict, List, Optional, Tuple

from hypothesis import given, settings
from hypothesis import strategies as st

from device_agent.batching.cores import places
from device_agent.batching.share import EngineShare, Tenant
from device_agent.engines.base import EngineSettings


class Models:
    """Models that always have work, each with runs of one length; how long each had the engine."""

    def __init__(self, places: int, models: List[Tuple[float, float]]) -> None:
        self.share = EngineShare(places)
        self.now_s = 0.0
        self.used_s = [0.0] * len(models)
        self.runs: List[Tuple[int, float]] = []
        self.most_at_once = 0
        self._lengths_s = [length_s for _, length_s in models]
        self._ends: List[Tuple[float, int]] = []
        self.tenants = [
            Tenant(weight, lambda number=number: self._start(number))  # type: ignore[misc]
            for number, (weight, _) in enumerate(models)
        ]

    def _start(self, number: int) -> None:
        length_s = self._lengths_s[number]
        if self.share.acquire(self.tenants[number], length_s):
            self.runs.append((number, self.now_s))
            heapq.heappush(self._ends, (self.now_s + length_s, number))
            self.most_at_once = max(self.most_at_once, len(self._ends))

    def run(self, seconds: float, stopped: Optional[Dict[int, Tuple[float, float]]] = None) -> None:
        """Go on for a while; a model of ``stopped`` has no work between these two points."""
        for number in range(len(self.tenants)):
            self._start(number)
        while self._ends and self._ends[0][0] <= seconds:
            self.now_s, number = heapq.heappop(self._ends)
            self.used_s[number] += self._lengths_s[number]
            tenant = self.tenants[number]
            begin_s, end_s = (stopped or {}).get(number, (seconds, seconds))
            again = not begin_s <= self.now_s < end_s
            self.share.release(tenant, self._lengths_s[number], again=again)
            if again:
                self._start(number)
            for waking, (_, until_s) in (stopped or {}).items():
                idle = self.tenants[waking].running_s is None and self.now_s >= until_s
                if idle and not self.tenants[waking].has_turn:
                    self._start(waking)


# None is a quarter as long as another, which would make it light.
models_strategy = st.lists(st.tuples(st.floats(0.25, 4.0), st.floats(3e-3, 8e-3)), min_size=2, max_size=5)


@settings(max_examples=50, deadline=None)
@given(models_strategy)
def test_busy_models_share_the_engine_by_their_weights(models: List[Tuple[float, float]]) -> None:
    """With runs of like length, nobody is behind its share by more than a few, and the engine never idles."""
    simulation = Models(1, models)
    simulation.run(10.0)
    assert simulation.most_at_once == 1
    assert sum(simulation.used_s) > 9.95
    whole = sum(weight for weight, _ in models)
    for (weight, _), used_s in zip(models, simulation.used_s):
        assert used_s >= 10.0 * weight / whole - 5 * 8e-3 * max(1.0, weight)


def test_a_model_that_was_idle_saves_nothing_up() -> None:
    """Coming back after five seconds, it gets half of what follows and not all of it."""
    simulation = Models(1, [(1.0, 5e-3), (1.0, 5e-3)])
    simulation.run(10.0, stopped={1: (0.0, 5.0)})
    assert 2.3 < simulation.used_s[1] < 2.7


def test_a_light_model_does_not_wait_for_a_heavy_run() -> None:
    """Beside runs of 200 ms, one of 2 ms starts at once; both have their half in the end."""
    simulation = Models(1, [(1.0, 0.2), (1.0, 2e-3)])
    simulation.run(10.0)
    starts_s = [when_s for number, when_s in simulation.runs if number == 1]
    assert simulation.most_at_once == 2
    assert simulation.used_s[1] >= 4.5
    assert starts_s[1] < 0.01


def test_a_light_run_takes_at_most_a_quarter_of_the_other() -> None:
    """A run of exactly a quarter of the one under way may start beside it; a longer one waits its turn."""
    for length_s, starts in ((2e-3, True), (2.1e-3, False)):
        share = EngineShare()
        heavy, light = (Tenant(1.0, lambda: None) for _ in range(2))
        assert share.acquire(heavy, 8e-3)
        assert share.acquire(light, length_s) is starts


def test_two_places_let_two_models_run() -> None:
    """With two places nobody waits for the other."""
    simulation = Models(2, [(1.0, 5e-3), (1.0, 7e-3)])
    simulation.run(1.0)
    assert simulation.most_at_once == 2
    assert min(simulation.used_s) > 0.98


def test_a_model_that_is_gone_holds_up_nobody() -> None:
    """A turn that is not used is passed on."""
    share = EngineShare()
    turns: List[str] = []
    first, second, third = (Tenant(1.0, lambda name=name: turns.append(name)) for name in "abc")
    assert share.acquire(first)
    assert not share.acquire(second)
    assert not share.acquire(third)
    share.release(first, 1.0)
    assert turns == ["b"]
    share.leave(second)
    assert turns == ["b", "c"]
    assert share.acquire(third)


def test_engines_that_use_every_core_run_one_at_a_time() -> None:
    """A run with as many threads as cores finds no core for another beside it."""
    assert places(EngineSettings(threads=0)) == 1
    assert places(EngineSettings(threads=1)) >= 1
