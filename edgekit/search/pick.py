"""Reads what was measured, and picks.

The order of preference is fixed, the smallest precision first; a later candidate is taken over an earlier one
only where it is clearly faster. So noise in a timing does not decide between two that are nearly alike,
and the same inputs pick the same candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekit.artifact import Artifact
from edgekit.measure.device import Device
from edgekit.plan import Plan, measured_on_target
from edgekit.profile import Profile
from edgekit.recipe import Contract
from edgekit.run import Ran

#: A larger candidate must be this many times as fast as the smaller one to be taken instead.
CLEARLY_FASTER = 1.2
_DROP_DIGITS = 12


@dataclass(frozen=True)
class Tried:
    """A plan that was carried out in the search for a candidate, and what was different about it."""

    name: str
    plan: Plan
    ran: Ran

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that this model could be made in, in the order of preference."""
        return tuple(
            precision for precision, (_, name) in self.plan.candidates.items() if name in self.ran.artifacts
        )

    def measurement(self, precision: str) -> Artifact:
        """Of the candidate in one of these."""
        return self.ran.artifacts[self.plan.candidates[precision][1]]


@dataclass(frozen=True)
class Candidate:
    """A measured candidate.

    Attributes:
        precision: of its graph.
        engine: its artifact.
        measurement: its artifact.
        targets: artifacts with its engines for further profiles.
        facts: the keys of CLI.md's ``chosen``: parameters, sizes, metric, latency, ratios.
        unmet: the parts of the contract that it misses (``size``, ``max_drop``, ``latency``) -> why.
        slower: whether it is slower than the original on the same runtime, and that is no noise of the clock.
        reason: why it lost, or None for the chosen one.
    """

    precision: str
    engine: Artifact
    measurement: Artifact
    targets: tuple[Artifact, ...]
    facts: Mapping[str, Any]
    unmet: Mapping[str, str]
    slower: bool
    reason: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What was found.

    Attributes:
        baseline: the original's facts, measured in turns with the chosen one.
        candidates: all of them, in the order of preference.
        chosen: one of them.
        unmet: what the chosen one misses -> why; empty: the contract is met.
    """

    baseline: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    unmet: Mapping[str, str]


def pick(tried: Sequence[Tried], contract: Contract, profile: Profile, device: Device) -> Outcome:
    """Choose among the candidates that miss least of the contract.

    A candidate slower than the original is taken only if all are; ``unmet`` says what the chosen one misses.

    Args:
        tried: in the order of preference.
        contract: what was asked.
        profile: the device that it was asked for.
        device: where latencies were measured.
    """
    on_target = measured_on_target(device, profile)
    candidates = [
        _candidate(one, precision, contract, profile, on_target)
        for one in tried
        for precision in one.precisions
    ]
    chosen = _best(candidates)
    judged = tuple(_with_reason(candidate, chosen) for candidate in candidates)
    return Outcome(_baseline(tried[0], chosen), judged, chosen, {**chosen.unmet, **_slower(chosen)})


def binding(outcome: Outcome) -> tuple[str, ...]:
    """The parts of the contract without which some candidate would have met it.

    Where no single part is to blame, all that the best candidate misses.
    """
    if not outcome.unmet:
        return ()
    alone = {next(iter(c.unmet)) for c in outcome.candidates if len(c.unmet) == 1 and not c.slower}
    return tuple(sorted(alone)) or tuple(outcome.unmet)


def _best(candidates: list[Candidate]) -> Candidate:
    """The first in the order of preference, unless a later one that misses no more is clearly faster."""
    best = candidates[0]
    for other in candidates[1:]:
        gain = other.facts["speedup"] / best.facts["speedup"]
        misses, best_misses = _misses(other), _misses(best)
        if misses < best_misses or (misses == best_misses and gain > CLEARLY_FASTER):
            best = other
    return best


def _misses(candidate: Candidate) -> tuple[bool, int]:
    return candidate.slower, len(candidate.unmet)


def _baseline(first: Tried, chosen: Candidate) -> dict[str, Any]:
    """The original as measured in turns with the chosen one: at another time the machine is another."""
    graph = first.ran.artifacts["export.original"].metadata
    measured = chosen.measurement.metadata
    return {
        "params": graph["params"],
        "macs": graph["macs"],
        "size_bytes": graph["size_bytes"],
        "metric": measured["metric"]["original"],
        "latency_ms": measured["latency_ms"]["original"],
    }


def _candidate(
    tried: Tried, precision: str, contract: Contract, profile: Profile, on_target: bool
) -> Candidate:
    engine = tried.ran.artifacts[tried.plan.candidates[precision][0]]
    measurement = tried.measurement(precision)
    original = tried.ran.artifacts["export.original"].metadata
    graph = tried.ran.artifacts.get("export.pruned", tried.ran.artifacts["export.original"]).metadata
    quantized = tried.ran.artifacts.get(f"quantize.{precision}")
    latency = measurement.metadata["latency_ms"]["candidate"]
    original_latency = measurement.metadata["latency_ms"]["original"]
    metric = measurement.metadata["metric"]["candidate"]
    size_bytes = (engine.path / "model.onnx").stat().st_size
    facts = {
        "params": graph["params"],
        "macs": graph["macs"],
        "size_bytes": size_bytes,
        "metric": metric,
        "latency_ms": latency,
        "params_ratio": graph["params"] / original["params"],
        "size_ratio": size_bytes / original["size_bytes"],
        "metric_drop": _drop(measurement.metadata["metric"]["original"]["value"], metric["value"]),
        "metric_drop_interval": measurement.metadata["metric_drop_interval"],
        "speedup": original_latency["p50"] / latency["p50"],
        "speedup_interval": measurement.metadata["speedup_interval"],
        "precision": precision,
        "trial": tried.name,
        "pruning": _pruning(tried.ran),
        "calibrator": quantized.metadata["calibrator"] if quantized else None,
        "calibration": quantized.metadata.get("calibration") if quantized else None,
        "layers_kept_high_precision": _kept(quantized),
    }
    missed = unmet(facts, contract, profile, on_target)
    targets = tuple(tried.ran.artifacts[name] for name in tried.plan.targets[precision])
    slower = facts["speedup_interval"]["high"] < 1
    return Candidate(precision, engine, measurement, targets, facts, missed, slower)


def _drop(original: float, candidate: float) -> float:
    """The loss without the last digits of a subtraction: 0.9 - 0.88 is no more than 0.02."""
    return round(original - candidate, _DROP_DIGITS)


def unmet(facts: Mapping[str, Any], contract: Contract, profile: Profile, on_target: bool) -> dict[str, str]:
    """The parts of the contract that a candidate misses, with the reason.

    A latency that was not measured on the device's kind of machine counts as missed: a promise that nobody
    checked is not kept.
    """
    missed = {}
    if contract.size is not None and facts["params_ratio"] > contract.size:
        missed["size"] = f"{facts['params_ratio']:.3f} of the parameters remain; {contract.size:g} was asked"
    if contract.max_drop is not None and facts["metric_drop"] > contract.max_drop:
        name = facts["metric"]["name"]
        missed["max_drop"] = (
            f"{name} drops by {facts['metric_drop']:.4f}{_give_or_take(facts)}; at most "
            f"{contract.max_drop:g} was asked"
        )
    bound = contract.latency
    if bound is not None and not on_target:
        missed["latency"] = f"not measured: no {profile.name} was reached"
    elif bound is not None and facts["latency_ms"][bound.quantile] > bound.ms:
        measured_ms = facts["latency_ms"][bound.quantile]
        missed["latency"] = f"{bound.quantile} is {measured_ms:.2f} ms; at most {bound.ms:g} ms was asked"
    return missed


def _give_or_take(facts: Mapping[str, Any]) -> str:
    interval = facts["metric_drop_interval"]
    if interval is None:
        return ""
    return f" ({interval['low']:+.4f} to {interval['high']:+.4f} on {facts['metric']['samples']} samples)"


def drop_is_certain(facts: Mapping[str, Any], contract: Contract) -> bool | None:
    """Whether the whole interval of the drop is within the bound; None: no bound, or no interval."""
    interval = facts["metric_drop_interval"]
    if contract.max_drop is None or interval is None:
        return None
    return bool(interval["high"] <= contract.max_drop)


def _slower(candidate: Candidate) -> dict[str, str]:
    if not candidate.slower:
        return {}
    return {"faster_than_original": f"it runs at {_speed(candidate)} times the original's speed"}


def _speed(candidate: Candidate) -> str:
    interval = candidate.facts["speedup_interval"]
    return f"{candidate.facts['speedup']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def _pruning(ran: Ran) -> dict[str, Any] | None:
    if "prune" not in ran.artifacts:
        return None
    metadata = ran.artifacts["prune"].metadata
    keys = ("allocation", "importance", "alignment", "latency_share", "latency_model", "widths", "kept_whole")
    return {key: metadata[key] for key in keys}


def _kept(quantized: Artifact | None) -> dict[str, str]:
    if quantized is None:
        return {}
    kept: dict[str, str] = quantized.metadata["kept_high_precision"]
    return kept


def _with_reason(candidate: Candidate, chosen: Candidate) -> Candidate:
    if candidate is chosen:
        return candidate
    if candidate.slower:
        reason = f"slower than the original: {_speed(candidate)} times its speed"
    elif candidate.unmet:
        reason = "misses " + ", ".join(candidate.unmet)
    elif candidate.precision == chosen.precision:
        reason = f"no better than {chosen.facts['trial']}"
    elif chosen.facts["speedup"] > CLEARLY_FASTER * candidate.facts["speedup"]:
        reason = f"{chosen.precision} is clearly faster"
    else:
        reason = f"not clearly faster than {chosen.precision}"
    return replace(candidate, reason=reason)
