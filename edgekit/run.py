"""Running a plan: the only file that knows the order of things.

Each step's artifact is looked up by its key before it is made; a run that was interrupted or killed goes
on with the first artifact that is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import Artifact, Store
from edgekit.errors import NotPossible
from edgekit.measure.memory import peak_rss
from edgekit.plan import Plan, Step
from edgekit.profile import Profile
from edgekit.stages.registry import Inputs, Sources, Tick, validate_config


@dataclass(frozen=True)
class StageRecord:
    """What a step cost.

    Attributes:
        name: the step's.
        seconds: wall time; of the look-up, where it was cached.
        cached: whether the artifact was there already.
        peak_rss_bytes: largest resident memory during the step; None where the kernel does not tell.
    """

    name: str
    seconds: float
    cached: bool
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class Ran:
    """A plan that was carried out.

    Attributes:
        artifacts: by step name.
        records: what each step cost.
        impossible: optional steps that this model does not allow -> why. They have no artifact, nor have
            those that follow from them.
    """

    artifacts: Mapping[str, Artifact]
    records: tuple[StageRecord, ...]
    impossible: Mapping[str, str]


class Progress:
    """Told what happens; this one says nothing. ``edgekit.terminal`` has one for people."""

    def begin(self, step: str) -> None:
        """A step begins."""

    def tick(self, done: int, total: int) -> None:
        """The step that began last has done ``done`` of ``total`` units."""

    def end(self, record: StageRecord) -> None:
        """The step that began last has ended."""


def run_plan(plan: Plan, sources: Sources, profile: Profile, store: Store, progress: Progress) -> Ran:
    """Make every artifact of the plan, or find it in the store.

    Raises:
        EdgekitError: from a stage. What earlier steps made stays in the store.
    """
    artifacts: dict[str, Artifact] = {}
    impossible: dict[str, str] = {}
    records = []
    for step in plan.steps:
        if any(name not in artifacts for name in step.inputs.values()):
            continue
        progress.begin(step.name)
        begin = time.perf_counter()
        with peak_rss() as peak:
            artifact = store.get(step.key)
            cached = artifact is not None
            if artifact is None:
                try:
                    artifact = _make(step, artifacts, sources, step.profile or profile, store, progress.tick)
                except NotPossible as error:
                    if not step.optional:
                        raise
                    impossible[step.name] = f"{error.what}: {error.why}"
        if artifact is not None:
            artifacts[step.name] = artifact
        records.append(StageRecord(step.name, time.perf_counter() - begin, cached, peak()))
        progress.end(records[-1])
    return Ran(artifacts, tuple(records), impossible)


def _make(
    step: Step,
    artifacts: Mapping[str, Artifact],
    sources: Sources,
    profile: Profile,
    store: Store,
    tick: Tick,
) -> Artifact:
    inputs = Inputs(
        sources, {role: artifacts[name] for role, name in step.inputs.items()}, tick, store.timings
    )
    stage_run: Callable[..., Mapping[str, object]] = step.stage.load().run

    def make(out: Path) -> Mapping[str, object]:
        return stage_run(inputs, validate_config(step.stage, step.config), profile, out)

    parents = tuple(artifacts[name].key for name in step.inputs.values())
    return store.build(step.key, step.stage.produces, parents, make)
