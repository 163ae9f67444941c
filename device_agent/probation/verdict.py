"""Is a version healthy? The health gate's rules, pure: evidence in, a reason against the version out.

A few requests prove little: of twenty, one slow answer is no p99 of a thousand. A share is therefore held
against its limit by the binomial distribution: the limit counts as missed where so many bad requests would
come by chance less than once in a thousand times. So a version that fails everything is told after two
requests, and one hiccup costs no version.

Traffic can make any version slow. Where latency speaks against a version, golden rows must confirm it: the
agent asks them of the new version and of the old one in turn, under the same conditions, and compares how
long the engines themselves take.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Optional, Sequence, Tuple

from device_agent.manifest import Contract
from device_agent.probation.settings import ProbationSettings

#: Golden rows that settle whether a version or its traffic is slow.
CONFIRMING_RUNS = 20

_CHANCE = 1e-3
_FEWEST_RUNS = 3  # that can raise a doubt
# What two runs of the same version may differ by, as caches are cold after a pause; nobody notices so little.
_SLACK_S = 1e-3
_FEWEST_FOR_QUANTILE = 50
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_PARTS = 4  # of a probation, to tell growth that goes on from growth that has ended


@dataclass(frozen=True)
class Evidence:
    """What was seen of a version on probation.

    Attributes:
        total_s: from arrival to answer of every request, golden rows included; infinite: turned away.
        failed: requests that failed on the server's side.
        run_s: times of golden rows in the engine alone.
        old_run_s: those of the old version, asked in turn with them; empty: it is not loaded any more.
        wrong: how a golden row's output was wrong; empty: it never was.
        crash: how the engine's process ended; empty: it did not.
        memory_bytes: the size of its process, at even intervals.
    """

    total_s: Sequence[float] = ()
    failed: int = 0
    run_s: Sequence[float] = ()
    old_run_s: Sequence[float] = ()
    wrong: str = ""
    crash: str = ""
    memory_bytes: Sequence[int] = ()

    @property
    def requests(self) -> int:
        """All of them."""
        return len(self.total_s) + self.failed


@dataclass(frozen=True)
class Mirrored:
    """What was seen of a version that computed copies of requests before it served, and golden rows.

    Attributes:
        failed: those that failed.
        failure: how the first did.
        run_s: engine times of the others.
        pairs_s: engine times of the old and of the new version for the same inputs, each in a run of its own.
        wrong, crash: as in :class:`Evidence`.
    """

    failed: int = 0
    failure: str = ""
    run_s: Sequence[float] = ()
    pairs_s: Sequence[Tuple[float, float]] = ()
    wrong: str = ""
    crash: str = ""

    @property
    def requests(self) -> int:
        """All of them."""
        return len(self.run_s) + self.failed


@dataclass(frozen=True)
class Reference:
    """What the version before was like.

    Attributes:
        total_s: of its latest requests; infinite: turned away.
        error_fraction: of its requests that failed on the server's side.
        run_s: how long it takes for one row, learned; None: there is no version before.
    """

    total_s: Sequence[float] = ()
    error_fraction: float = 0.0
    run_s: Optional[float] = None

    def quantile_s(self, quantile: float) -> Optional[float]:
        """Of its latest requests; None: there were too few."""
        if len(self.total_s) < _FEWEST_FOR_QUANTILE:
            return None
        ordered = sorted(self.total_s)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


@dataclass(frozen=True)
class _Bound:
    """A limit on a quantile of the latency.

    Attributes:
        quantile, limit_s: what may take how long.
        origin: where it comes from.
        ratio: of that limit to the old version's own; None: it is the bundle's promise.
    """

    quantile: float
    limit_s: float
    origin: str
    ratio: Optional[float]


def against(
    evidence: Evidence, reference: Reference, contract: Contract, settings: ProbationSettings
) -> Optional[str]:
    """Why a version may not stay; None: nothing speaks against it."""
    if evidence.wrong:
        return evidence.wrong
    if evidence.crash:
        return f"its engine's process ended: {evidence.crash}"
    allowed = max(settings.max_error_fraction, reference.error_fraction)
    if exceeds_share(evidence.failed, evidence.requests, allowed):
        return f"{evidence.failed} of {evidence.requests} requests failed; allowed are {allowed:.2%}"
    return _slow(evidence, reference, contract, settings) or _leaking(evidence, settings)


def against_mirrored(mirrored: Mirrored, contract: Contract, settings: ProbationSettings) -> Optional[str]:
    """Why a version may not even be tried, by what it did with requests that the old version answered.

    Clients wait for none of these answers, so it is engine times that are held against the contract. A
    contract that the old version misses too is no measure; then, and without one, the old version is.
    """
    if mirrored.wrong:
        return mirrored.wrong
    if mirrored.crash:
        return f"its engine's process ended: {mirrored.crash}"
    if exceeds_share(mirrored.failed, mirrored.requests, settings.max_error_fraction):
        first = f"; the first: {mirrored.failure}" if mirrored.failure else ""
        return (
            f"{mirrored.failed} of {mirrored.requests} requests failed that the old version answered; "
            f"allowed are {settings.max_error_fraction:.2%}{first}"
        )
    if len(mirrored.run_s) < min(CONFIRMING_RUNS, settings.min_requests):
        return None
    old_run_s = [old_s for old_s, _ in mirrored.pairs_s]
    if contract.latency_ms is not None:
        quantile = _QUANTILES.get(contract.latency_quantile or "", 0.99)
        origin = f"the contract's {contract.latency_quantile}"
        bound = _Bound(quantile, contract.latency_ms / 1e3, origin, None)
        if not _exceeds(old_run_s, bound):
            return _past(mirrored.run_s, bound) if _exceeds(mirrored.run_s, bound) else None
    return _slower(mirrored.pairs_s, settings)


def _past(run_s: Sequence[float], bound: _Bound) -> str:
    bad = sum(seconds > bound.limit_s for seconds in run_s)
    limit_ms = bound.limit_s * 1e3
    return f"{bad} of {len(run_s)} requests took the engine more than {limit_ms:.3g} ms ({bound.origin})"


def _slower(pairs_s: Sequence[Tuple[float, float]], settings: ProbationSettings) -> Optional[str]:
    if len(pairs_s) < min(CONFIRMING_RUNS, settings.min_requests):
        return None
    old_s, new_s = (median(times) for times in zip(*pairs_s))
    if new_s <= settings.max_latency_ratio * (old_s + _SLACK_S):
        return None
    return (
        f"the same requests take the engine {new_s * 1e3:.3g} ms, {new_s / old_s:.1f} times the old "
        f"version's time; allowed are {settings.max_latency_ratio:g}"
    )


def needs_confirmation(
    evidence: Evidence, reference: Reference, contract: Contract, settings: ProbationSettings
) -> bool:
    """Whether latency speaks against a version and too few golden rows were asked to tell why."""
    if len(evidence.run_s) >= CONFIRMING_RUNS:
        return False
    bound = _bound(reference, contract, settings)
    doubtful = (
        len(evidence.run_s) >= _FEWEST_RUNS and _ratio(evidence, reference) > settings.max_latency_ratio
    )
    return doubtful or (bound is not None and _exceeds(evidence.total_s, bound))


def exceeds_share(bad: int, of: int, allowed: float) -> bool:
    """Whether so many ``bad`` come by chance less than once in a thousand times at the share ``allowed``."""
    if bad <= allowed * of:
        return False
    term = (1.0 - allowed) ** of
    fewer = 0.0
    for count in range(bad):
        fewer += term
        term *= (of - count) / (count + 1) * allowed / (1.0 - allowed)
    return 1.0 - fewer < _CHANCE


def _slow(
    evidence: Evidence, reference: Reference, contract: Contract, settings: ProbationSettings
) -> Optional[str]:
    if len(evidence.run_s) < min(CONFIRMING_RUNS, settings.min_requests):
        return None
    own_s, ratio = median(evidence.run_s), _ratio(evidence, reference)
    bound = _bound(reference, contract, settings)
    if bound is not None and _exceeds(evidence.total_s, bound) and _is_to_blame(evidence, bound, ratio):
        bad = sum(seconds > bound.limit_s for seconds in evidence.total_s)
        return (
            f"{bad} of {len(evidence.total_s)} requests took more than {bound.limit_s * 1e3:.3g} ms "
            f"({bound.origin}); a golden row takes the engine {own_s * 1e3:.3g} ms"
        )
    if contract.latency_ms is None and ratio > settings.max_latency_ratio:
        return (
            f"a golden row takes the engine {own_s * 1e3:.3g} ms, {ratio:.1f} times the old version's time; "
            f"allowed are {settings.max_latency_ratio:g}"
        )
    return None


def _ratio(evidence: Evidence, reference: Reference) -> float:
    """How many times as long as in the old version a golden row takes; 0: there is none to compare with."""
    if evidence.old_run_s:
        own_s, old_s = median(evidence.run_s), median(evidence.old_run_s)
        return own_s / old_s if own_s - old_s > _SLACK_S else min(own_s / old_s, 1.0)
    if reference.run_s is None or not evidence.run_s:
        return 0.0
    return median(evidence.run_s) / (reference.run_s + _SLACK_S)


def _bound(reference: Reference, contract: Contract, settings: ProbationSettings) -> Optional[_Bound]:
    """The contract's, unless the old version misses that too under this traffic; else the old version's."""
    quantile = _QUANTILES.get(contract.latency_quantile or "", 0.99)
    old_s = reference.quantile_s(quantile)
    if contract.latency_ms is not None and (old_s is None or old_s <= contract.latency_ms / 1e3):
        origin = f"the contract's {contract.latency_quantile}"
        return _Bound(quantile, contract.latency_ms / 1e3, origin, None)
    if old_s is None or old_s == float("inf"):
        return None
    ratio = settings.max_latency_ratio
    return _Bound(quantile, old_s * ratio, f"{ratio:g} times the old version's", ratio)


def _exceeds(seconds: Sequence[float], bound: _Bound) -> bool:
    return exceeds_share(sum(s > bound.limit_s for s in seconds), len(seconds), 1.0 - bound.quantile)


def _is_to_blame(evidence: Evidence, bound: _Bound, ratio: float) -> bool:
    """Whether golden rows say that the version is slow, and not its traffic."""
    if bound.ratio is None:
        return _exceeds(evidence.run_s, bound)
    # Half of the way to the ratio that is not allowed, since waiting adds to both versions' time alike.
    return ratio == 0.0 or ratio > (1.0 + bound.ratio) / 2.0


def _leaking(evidence: Evidence, settings: ProbationSettings) -> Optional[str]:
    """Growth beyond the limit that goes on; buffers that were allocated once are none."""
    if len(evidence.memory_bytes) < 2 * _PARTS:
        return None
    first, _, third, last = (median(part) for part in _in_parts(evidence.memory_bytes))
    grown, lately = last - first, last - third
    if grown <= settings.max_memory_growth_bytes or lately < grown / (2 * _PARTS):
        return None
    return (
        f"its process grew by {grown / 1e6:.0f} MB and goes on; "
        f"allowed are {settings.max_memory_growth_bytes / 1e6:.0f} MB"
    )


def _in_parts(samples: Sequence[int]) -> Tuple[Sequence[int], ...]:
    size = len(samples) // _PARTS
    return tuple(samples[i * size : (i + 1) * size] for i in range(_PARTS))
