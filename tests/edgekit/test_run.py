"""Running a plan: in order, each step once, what is there is reused, and it is told what happens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from stage_testing import dataset, noise, sources, torch_model
from torch import nn

from edgekit import profile
from edgekit.artifact import open_store
from edgekit.errors import BadInput
from edgekit.plan import Plan, make_plan
from edgekit.recipe import load_recipe
from edgekit.run import Progress, Ran, StageRecord, run_plan
from edgekit.stages.registry import Sources


class Listener(Progress):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def begin(self, step: str) -> None:
        self.heard.append(("begin", step))

    def tick(self, done: int, total: int) -> None:
        self.heard.append(("tick", (done, total)))

    def end(self, record: StageRecord) -> None:
        self.heard.append(("end", record.name))


@pytest.fixture(scope="module")
def given() -> Sources:
    """A model of one convolution."""
    model = torch_model(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 2)), image=(3, 4, 4)
    )
    return sources(model, dataset(noise({"image": (3, 4, 4)}, 12)))


def _plan(given: Sources, **overrides: Any) -> Plan:
    recipe = load_recipe(None, {"measure.runs": 10, "measure.warmup": 1, "contract.size": 1.0, **overrides})
    return make_plan(given, profile.load("x86-cpu"), recipe, "cosine")


def _run(plan: Plan, given: Sources, workdir: Path, listener: Progress | None = None) -> Ran:
    with open_store(workdir) as store:
        return run_plan(plan, given, profile.load("x86-cpu"), store, listener or Progress())


def test_steps_run_in_order_and_are_recorded(given: Sources, tmp_path: Path) -> None:
    """Every step begins and ends once, in the plan's order, with its time and, where known, its memory."""
    plan = _plan(given, precision="int8")
    listener = Listener()
    ran = _run(plan, given, tmp_path, listener)
    names = [step.name for step in plan.steps]
    told = [what for what in listener.heard if what[0] != "tick"]
    assert told == [(word, name) for name in names for word in ("begin", "end")]
    assert [record.name for record in ran.records] == names
    for record in ran.records:
        assert record.seconds >= 0
        assert not record.cached
        assert record.peak_rss_bytes is None or record.peak_rss_bytes > 1_000_000
    assert all(0 < done <= total for word, (done, total) in
               [heard for heard in listener.heard if heard[0] == "tick"] if word)  # fmt: skip


def test_what_is_there_is_reused(given: Sources, tmp_path: Path) -> None:
    """A second run makes nothing and gives the same artifacts; another precision makes only its own steps."""
    first = _run(_plan(given, precision="fp32"), given, tmp_path)
    again = _run(_plan(given, precision="fp32"), given, tmp_path)
    assert again.artifacts == first.artifacts
    assert all(record.cached for record in again.records)
    more = _run(_plan(given, precision="int8"), given, tmp_path)
    assert [r.name for r in more.records if not r.cached] == ["quantize.int8", "build.int8", "verify.int8"]


def test_artifacts_know_their_parents(given: Sources, tmp_path: Path) -> None:
    """Each artifact names the keys that it was made from."""
    plan = _plan(given, precision="fp32")
    ran = _run(plan, given, tmp_path)
    for step in plan.steps:
        artifact = ran.artifacts[step.name]
        assert artifact.key == step.key
        assert artifact.parents == tuple(ran.artifacts[name].key for name in step.inputs.values())
        assert re.fullmatch(r"[0-9a-f]{64}", artifact.sha256)


def test_what_was_finished_before_an_error_stays(given: Sources, tmp_path: Path) -> None:
    """A stage that fails does not cost the stages before it."""
    bad = noise({"image": (3, 4, 4)}, 12)
    bad["image"][7] = float("nan")
    broken = Sources(given.model, dataset(bad), given.train, given.held_out)
    plan = _plan(broken, precision="int8")
    with pytest.raises(BadInput):
        _run(plan, broken, tmp_path)
    with open_store(tmp_path) as store:
        there = [step.name for step in plan.steps if store.get(step.key)]
    assert there == ["export.original", "build.original"]
