"""Which plans are tried for a contract, in which order, and when it is enough.

Cheap tests come first. Where a latency is asked, prunings are measured before anything is trained, and the
share of the latency that pruning may leave is lowered until the fastest precision fits: weights do not change
the time. Only then a pruning is recovered and quantized in full. Where that misses the contract, what could
help is tried next. Everything that was made or measured is in the store under its key, so a later trial, or
the next run of the command, repeats nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgekit import profile
from edgekit.artifact import Store
from edgekit.measure import staircase
from edgekit.measure.staircase import LatencyModel
from edgekit.plan import Plan, make_plan, measured_on_target
from edgekit.profile import Profile
from edgekit.recipe import Contract, Recipe
from edgekit.run import Progress, StageRecord, run_plan
from edgekit.search.pick import Outcome, Tried, pick
from edgekit.stages.registry import Sources

#: Enough of a candidate to time it: nothing is trained, and INT8 is calibrated on a few samples.
_PROBE: Mapping[str, Any] = {
    "contract.max_drop": None,
    "prune.steps": 1,
    "recover.epochs": 0,
    "recover.quantization_aware_epochs": 0,
    "quantize.observer": "minmax",
    "quantize.methods": (),
    "quantize.max_samples": 16,
    "measure.max_samples": 32,
}
_PROBES = 6
#: A probe has to be below the bound by this much: a measurement in full is another one.
_MARGIN_FRACTION = 0.05


@dataclass(frozen=True)
class Request:
    """What is searched for, and with what.

    Attributes:
        sources: what to start from, and the device to measure on.
        profile: the device to meet the contract on.
        further: other devices that the same bundle serves.
        recipe: what to do, and the limits of the search.
        contract: what to meet.
        metric: what is measured.
        store: where everything is kept.
        progress: told what happens.
    """

    sources: Sources
    profile: Profile
    further: tuple[Profile, ...]
    recipe: Recipe
    contract: Contract
    metric: str
    store: Store
    progress: Progress


@dataclass(frozen=True)
class Trial:
    """A change of the recipe: dotted keys and their values; and how far below a latency bound to aim."""

    name: str
    changes: Mapping[str, Any]
    margin_fraction: float = _MARGIN_FRACTION


@dataclass(frozen=True)
class Found:
    """What came of a search: the plans that were carried out in full, the best, and what each step cost."""

    tried: tuple[Tried, ...]
    outcome: Outcome
    records: tuple[StageRecord, ...]


FIRST = Trial("as the recipe says", {})


def search(request: Request) -> Found:
    """Try plans until the contract is met, there is nothing more to try, or the recipe's limits are reached.

    Raises:
        EdgekitError: a stage failed.
    """
    worker = Worker(request)
    settings, begin = request.recipe.search, time.monotonic()
    outcome = _pick(worker, FIRST, request)
    for trial in _what_could_help(request.recipe):
        late = settings.budget_s is not None and time.monotonic() - begin > settings.budget_s
        if not outcome.unmet or "size" in outcome.unmet or len(worker.tried) >= settings.trials or late:
            break
        if _could_help(trial, outcome, worker.latency_share):
            outcome = _pick(worker, trial, request)
    return Found(tuple(worker.tried), outcome, tuple(worker.records))


def _pick(worker: Worker, trial: Trial, request: Request) -> Outcome:
    """Carry a trial out, and pick among all candidates so far."""
    worker.carry_out(trial)
    return pick(worker.tried, request.contract, request.profile, request.sources.device)


class Worker:
    """Carries trials out, one after the other.

    Attributes:
        tried: those that were carried out in full.
        records: what each step cost, probes included.
        latency_share: that the last one was pruned to; None: its pruning looked at the size only.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._device = profile.shared(request.profile, request.further)
        self.tried: list[Tried] = []
        self.records: list[StageRecord] = []
        self.latency_share: float | None = None

    def carry_out(self, trial: Trial) -> Tried:
        """Do all that a trial takes, probes first."""
        self.latency_share = self._fitting_share(trial)
        self.tried.append(self._run(trial, self.latency_share))
        return self.tried[-1]

    def _fitting_share(self, trial: Trial) -> float | None:
        """The share of the latency that pruning may leave for the fastest precision to meet the bound.

        None where no latency is asked, or none can be measured, or the narrowest model misses the bound: then
        nothing is gained by a model that is worse in every other respect.
        """
        request, bound = self._request, self._request.contract.latency
        if bound is None or request.sources.model.kind != "torch":
            return None
        latency = self._latency_model(trial)
        if not measured_on_target(request.sources.device, request.profile):
            return bound.ms / latency.full_ms if latency.full_ms > bound.ms else None  # as predicted, in fp32
        share = None
        for number in range(1, _PROBES + 1):
            probe = Trial(f"{trial.name}, probe {number}", {**trial.changes, **_PROBE})
            probed = self._run(probe, share)
            fastest_ms = min(
                probed.measurement(precision).metadata["latency_ms"]["candidate"][bound.quantile]
                for precision in probed.precisions
            )
            left = 1.0
            if probed.plan.pruned:
                layers = probed.ran.artifacts["prune"].metadata["layers"]
                left = latency.share({name: (outputs, inputs) for name, (outputs, inputs) in layers.items()})
            aim_ms = bound.ms * (1 - trial.margin_fraction)
            if fastest_ms <= aim_ms:
                return share
            if share is not None and left > share:
                break  # no more can go
            share = left * min(aim_ms / fastest_ms, 1 - _MARGIN_FRACTION)
        return None

    def _latency_model(self, trial: Trial) -> LatencyModel:
        request = self._request
        plan = self._plan(trial, None)
        alone = replace(plan, steps=tuple(step for step in plan.steps if step.name == "staircase"))
        ran = run_plan(alone, request.sources, self._device, request.store, request.progress)
        self.records += [record for record in ran.records if not record.cached]
        return staircase.from_json(ran.artifacts["staircase"].metadata)

    def _plan(self, trial: Trial, latency_share: float | None) -> Plan:
        request = self._request
        recipe = changed(request.recipe, trial.changes)
        return make_plan(
            request.sources, self._device, recipe, request.metric, request.further, latency_share
        )

    def _run(self, trial: Trial, latency_share: float | None) -> Tried:
        request = self._request
        plan = self._plan(trial, latency_share)
        ran = run_plan(plan, request.sources, self._device, request.store, request.progress)
        of = "" if trial == FIRST else f" ({trial.name})"
        again = {record.name for record in self.records} if of else set()
        self.records += [
            replace(record, name=record.name + of)
            for record in ran.records
            if not (record.cached and record.name in again)
        ]
        return Tried(trial.name, plan, ran)


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with some settings changed; keys are dotted, such as ``recover.epochs``."""
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        new = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: new})
    return recipe


def _what_could_help(recipe: Recipe) -> Iterator[Trial]:
    """Against a latency that is missed by little, then against a loss of the metric, the cheaper first."""
    if recipe.contract.latency is not None:
        yield Trial("further below the latency", {}, 4 * _MARGIN_FRACTION)
    epochs = recipe.recover.epochs
    aware = {"recover.quantization_aware_epochs": max(1, epochs // 4)}
    if not recipe.recover.quantization_aware_epochs:
        yield Trial("quantization-aware recovery", aware)
    yield Trial("twice the recovery", {"recover.epochs": 2 * epochs})
    if recipe.prune.allocation != "global":
        yield Trial("ranked over the whole model", {"prune.allocation": "global"})
    yield Trial("four times the recovery", {"recover.epochs": 4 * epochs, **aware})


def _could_help(trial: Trial, outcome: Outcome, latency_share: float | None) -> bool:
    """Whether a trial aims at what is missed.

    Training through rounding helps where INT8 alone loses what the float model does not.
    """
    if not trial.changes:
        return set(outcome.unmet) == {"latency"} and latency_share is not None
    if set(trial.changes) != {"recover.quantization_aware_epochs"}:
        return "max_drop" in outcome.unmet
    fine = [c.precision for c in outcome.candidates if "max_drop" not in c.unmet]
    rounded = [c for c in outcome.candidates if c.precision == "int8"]
    return bool(rounded) and bool(fine) and all("max_drop" in c.unmet for c in rounded)
