"""Picking a candidate: least missed first, then the order of preference, then what is clearly faster."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import profile, search
from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError
from edgekit.measure.device import THIS_MACHINE
from edgekit.plan import PRECISION_ORDER, Plan
from edgekit.recipe import Contract, LatencyBound, Recipe
from edgekit.run import Ran
from edgekit.search import loop, study

HERE = profile.load("x86-cpu").model_copy(update={"architecture": platform.machine()})


_PRUNING = ("allocation", "importance", "alignment", "latency_share", "latency_model", "widths", "kept_whole")


def _artifact(path: Path, **metadata: Any) -> Artifact:
    return Artifact("x", path, "s", "k", (), metadata)


def _latency(p50: float) -> dict[str, Any]:
    return {"p50": p50, "p95": 2 * p50, "p99": 3 * p50, "runs": 10, "batch": 1, "where": "a double"}


def _ran(
    directory: Path,
    figures: dict[str, tuple[float, float]],
    params: int = 40,
    original_ms: float = 10.0,
    noise: float = 0.0,
) -> tuple[Plan, Ran]:
    """A run with made-up figures: precision -> (p50 in ms, metric); the original's metric is 0.9.

    ``noise`` is how far the interval of a speed-up reaches, as a fraction of it.
    """
    (directory / "model.onnx").write_bytes(bytes(25))
    graph = {"macs": 100, "size_bytes": 100}
    artifacts = {
        "export.original": _artifact(directory, params=100, **graph),
        "export.pruned": _artifact(directory, params=params, **graph),
        "prune": _artifact(directory, **dict.fromkeys(_PRUNING)),
    }
    candidates = {}
    for precision in (name for name in PRECISION_ORDER if name in figures):
        p50, metric = figures[precision]
        artifacts[f"build.{precision}"] = _artifact(directory)
        artifacts[f"verify.{precision}"] = _artifact(
            directory,
            metric={
                "original": {"name": "top1", "value": 0.9, "samples": 9},
                "candidate": {"name": "top1", "value": metric, "samples": 9},
            },
            metric_drop_interval={
                "low": 0.8 - metric,
                "high": 1 - metric,
                "method": "a double",
                "confidence": 0.95,
            },
            latency_ms={"original": _latency(original_ms), "candidate": _latency(p50)},
            speedup_interval={
                "low": (1 - noise) * original_ms / p50,
                "high": (1 + noise) * original_ms / p50,
                "method": "a double",
                "confidence": 0.95,
            },
        )
        candidates[precision] = (f"build.{precision}", f"verify.{precision}")
    targets: dict[str, tuple[str, ...]] = dict.fromkeys(candidates, ())
    return Plan((), "build.original", candidates, targets, 0.35, "top1"), Ran(artifacts, (), {})


def _pick(
    directory: Path, figures: dict[str, tuple[float, float]], contract: Contract, **more: Any
) -> search.Outcome:
    plan, ran = _ran(directory, figures, **more)
    return search.pick([search.Tried("first", plan, ran)], contract, HERE, THIS_MACHINE)


_figures = st.fixed_dictionaries(
    {precision: st.tuples(st.floats(0.1, 30), st.floats(0, 1)) for precision in PRECISION_ORDER}
)
_contracts = st.builds(
    Contract,
    size=st.none() | st.floats(0.1, 1),
    max_drop=st.none() | st.floats(0, 1),
    latency=st.none()
    | st.builds(LatencyBound, quantile=st.sampled_from(["p50", "p95"]), ms=st.floats(0.1, 90)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the made-up engines lie."""
    return tmp_path_factory.mktemp("search")


@given(figures=_figures, contract=_contracts)
def test_the_choice_is_never_beaten(
    directory: Path, figures: dict[str, tuple[float, float]], contract: Contract
) -> None:
    """No candidate misses less than the chosen one, and none that misses as little is clearly faster."""
    outcome = _pick(directory, figures, contract)
    chosen = outcome.chosen
    best = min((c.slower, len(c.unmet)) for c in outcome.candidates)
    assert (chosen.slower, len(chosen.unmet)) == best
    for other in outcome.candidates:
        if (other.slower, len(other.unmet)) == best:
            assert other.facts["speedup"] / chosen.facts["speedup"] <= search.CLEARLY_FASTER + 1e-9
            if PRECISION_ORDER.index(other.precision) < PRECISION_ORDER.index(chosen.precision):
                assert other.facts["speedup"] < chosen.facts["speedup"]


@pytest.mark.parametrize(("metric", "max_drop"), [(0.88, 0.02), (0.888, 0.012), (0.8, 0.1)])
def test_a_drop_of_just_what_is_allowed_is_within(directory: Path, metric: float, max_drop: float) -> None:
    """Six of 500 samples are 0.012, whatever the subtraction of two floats makes of them."""
    outcome = _pick(directory, {"int8": (5.0, metric)}, Contract(max_drop=max_drop))
    assert not outcome.unmet
    assert outcome.chosen.facts["metric_drop"] == max_drop


def test_the_original_is_told_as_measured_beside_the_chosen_one(directory: Path) -> None:
    """Where the machine became half as fast between two trials, no ratio is taken across them."""
    tried = [
        search.Tried(name, *_ran(directory, {"int8": (p50, 0.9)}, original_ms=original_ms))
        for name, p50, original_ms in (("first", 8.0, 10.0), ("second", 9.0, 20.0))
    ]
    outcome = search.pick(tried, Contract(), HERE, THIS_MACHINE)
    assert outcome.chosen.facts["trial"] == "second"
    assert outcome.baseline["latency_ms"]["p50"] == 20.0
    assert outcome.baseline["latency_ms"]["p50"] / 9.0 == outcome.chosen.facts["speedup"]


@given(figures=_figures, contract=_contracts)
def test_every_loser_has_a_reason_and_the_chosen_has_none(
    directory: Path, figures: dict[str, tuple[float, float]], contract: Contract
) -> None:
    """The report can say for each candidate why it lost."""
    outcome = _pick(directory, figures, contract)
    assert [c.precision for c in outcome.candidates if c.reason is None] == [outcome.chosen.precision]
    assert all(c.reason for c in outcome.candidates if c.precision != outcome.chosen.precision)


@given(figures=_figures, contract=_contracts)
def test_met_means_every_asked_part_holds(
    directory: Path, figures: dict[str, tuple[float, float]], contract: Contract
) -> None:
    """An empty ``unmet`` is a promise kept: size, drop, latency, and faster than what it replaces."""
    outcome = _pick(directory, figures, contract)
    facts = outcome.chosen.facts
    bound = contract.latency
    held = {
        "size": contract.size is None or facts["params_ratio"] <= contract.size,
        "max_drop": contract.max_drop is None or facts["metric_drop"] <= contract.max_drop,
        "latency": bound is None or facts["latency_ms"][bound.quantile] <= bound.ms,
        "faster_than_original": facts["speedup"] >= 1,
    }
    assert set(outcome.unmet) == {part for part, holds in held.items() if not holds}
    assert all(outcome.unmet.values())


def test_the_smaller_file_wins_a_near_tie(directory: Path) -> None:
    """Noise in a timing does not decide: fp32 must be clearly faster to be taken over INT8."""
    near = {"int8": (5.0, 0.9), "fp16": (5.0, 0.9), "fp32": (4.5, 0.9)}
    assert _pick(directory, near, Contract()).chosen.precision == "int8"
    clear = {**near, "fp32": (4.0, 0.9)}
    assert _pick(directory, clear, Contract()).chosen.precision == "fp32"


def test_accuracy_comes_before_speed(directory: Path) -> None:
    """A fast candidate that drops too much loses to one that keeps the contract."""
    figures = {"int8": (2.0, 0.5), "fp16": (9.0, 0.9), "fp32": (9.5, 0.9)}
    outcome = _pick(directory, figures, Contract(max_drop=0.01))
    assert outcome.chosen.precision == "fp16"
    assert outcome.candidates[0].reason == "misses max_drop"


def test_nothing_slower_than_the_original_is_preferred(directory: Path) -> None:
    """Slower than what it replaces loses to anything faster; if all are slower, the report says so."""
    figures = {"int8": (12.0, 0.9), "fp16": (40.0, 0.9), "fp32": (9.0, 0.9)}
    assert _pick(directory, figures, Contract()).chosen.precision == "fp32"
    slow = {"int8": (12.0, 0.9), "fp16": (40.0, 0.9)}
    assert set(_pick(directory, slow, Contract()).unmet) == {"faster_than_original"}


@pytest.mark.parametrize(("noise", "unmet"), [(0.02, {"faster_than_original"}), (0.05, set())])
def test_noise_of_the_clock_breaks_no_contract(directory: Path, noise: float, unmet: set[str]) -> None:
    """Slower than the original is what is slower for certain: 0.97 of the speed give or take 5 % is not."""
    outcome = _pick(directory, {"int8": (10 / 0.97, 0.9)}, Contract(), noise=noise)
    assert set(outcome.unmet) == unmet
    assert outcome.chosen.slower == bool(unmet)


def test_a_latency_of_another_machine_is_not_met(directory: Path) -> None:
    """A bound is only met by a measurement on the device's kind of machine."""
    plan, ran = _ran(directory, {"int8": (1.0, 0.9)})
    contract = Contract(latency=LatencyBound(quantile="p95", ms=1000))
    for other in (
        HERE.model_copy(update={"architecture": "another"}),
        HERE.model_copy(update={"runtime": SimpleNamespace(name="tensorrt")}),
    ):
        outcome = search.pick([search.Tried("first", plan, ran)], contract, other, THIS_MACHINE)
        assert "not measured" in outcome.unmet["latency"]
    assert search.pick([search.Tried("first", plan, ran)], contract, HERE, THIS_MACHINE).unmet == {}


def test_a_reason_is_true(directory: Path) -> None:
    """A candidate that is neither slower nor unfit lost because it is not clearly faster than the chosen."""
    figures = {"int8": (5.0, 0.9), "fp16": (4.2, 0.9), "fp32": (4.1, 0.9)}
    outcome = _pick(directory, figures, Contract())
    assert outcome.chosen.precision == "fp32"
    assert outcome.candidates[0].reason == "fp32 is clearly faster"
    assert "preferred" not in str(outcome.candidates[1].reason)


def test_few_samples_are_not_sold_as_a_fact(directory: Path) -> None:
    """A drop within the bound is certain only where its whole interval is; the reason for a miss names it."""
    outcome = _pick(directory, {"int8": (5.0, 0.88)}, Contract(max_drop=0.05))
    assert outcome.unmet == {}
    assert search.drop_is_certain(outcome.chosen.facts, Contract(max_drop=0.05)) is False
    assert search.drop_is_certain(outcome.chosen.facts, Contract(max_drop=0.2)) is True
    assert search.drop_is_certain(outcome.chosen.facts, Contract()) is None
    missed = _pick(directory, {"int8": (5.0, 0.88)}, Contract(max_drop=0.01)).unmet["max_drop"]
    assert "-0.0800 to +0.1200 on 9 samples" in missed


def _tried(directory: Path, name: str, figures: dict[str, tuple[float, float]], params: int) -> search.Tried:
    plan, ran = _ran(directory, figures, params)
    return search.Tried(name, plan, ran)


def test_the_best_of_all_trials_is_picked_and_the_binding_part_is_named(directory: Path) -> None:
    """A later trial wins where it misses less; what alone keeps a candidate from the contract binds."""
    contract = Contract(max_drop=0.01, latency=LatencyBound(quantile="p95", ms=10))
    accurate = _tried(directory, "accurate", {"int8": (8.0, 0.9)}, 60)
    fast = _tried(directory, "fast", {"int8": (3.0, 0.7)}, 20)
    both = _tried(directory, "both", {"int8": (4.0, 0.9)}, 40)
    missed = search.pick([accurate, fast], contract, HERE, THIS_MACHINE)
    assert search.binding(missed) == ("latency", "max_drop")
    met = search.pick([accurate, fast, both], contract, HERE, THIS_MACHINE)
    assert met.chosen.facts["trial"] == "both"
    assert search.binding(met) == ()
    assert [c.reason for c in met.candidates] == ["misses latency", "misses max_drop", None]


def test_a_change_of_the_recipe_changes_only_that() -> None:
    """A trial is the recipe with the named settings replaced; the recipe itself stays as it was."""
    recipe = Recipe()
    other = loop.changed(recipe, {"recover.epochs": 3, "prune.allocation": "global"})
    assert (other.recover.epochs, other.prune.allocation) == (3, "global")
    assert recipe.recover.epochs == 8
    undone = {"recover.epochs": 8, "prune.allocation": recipe.prune.allocation}
    assert loop.changed(other, undone) == recipe


SPACE = {"width": [8, 16, 32], "deep": [False, True]}


def test_a_study_tries_the_first_values_first_and_returns_the_best(tmp_path: Path) -> None:
    """So many trials in all, the recipe's own settings first; a second worker finds nothing left to do."""
    seen: list[dict[str, Any]] = []

    def objective(params: dict[str, Any]) -> float:
        seen.append(params)
        return float(params["width"] + params["deep"])

    url = str(tmp_path / "study.db")
    best = study.work(url, "one", 4, SPACE, objective)
    assert len(seen) == 4
    assert seen[0] == {"width": 8, "deep": False}
    assert best == {"width": 8, "deep": False}
    assert study.work(url, "one", 4, SPACE, objective) == best
    assert len(seen) == 4


WORKER = """
import sys, time
from pathlib import Path
from edgekit.search import study
url, home, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def objective(params):
    (home / f"{name}.began").touch()
    if name == "hangs":
        time.sleep(600)
    return float(params["width"])
best = study.work(url, "joint", 3, {"width": [8, 16, 32]}, objective, study.Lease(1, 3))
print(best["width"])
"""


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of a database server of its own, which listens on a socket only."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed")
    owner = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(prefix="edgekit-pg-") as made:
        home, tools = Path(made), binaries[-1].parent
        if owner is not None:
            shutil.chown(home, owner)
        settle = ["-D", f"{home}/data", "--username=edge", "--auth=trust", "--no-sync"]
        run = partial(subprocess.run, check=True, user=owner, cwd=home, stdout=subprocess.DEVNULL)
        run([tools / "initdb", *settle])
        options = f"-k {home} -c listen_addresses='' -c fsync=off"
        run([tools / "pg_ctl", "-D", f"{home}/data", "-l", f"{home}/log", "-w", "-o", options, "start"])
        try:
            yield f"postgresql+pg8000://edge@/postgres?unix_sock={home}/.s.PGSQL.5432"
        finally:
            run([tools / "pg_ctl", "-D", f"{home}/data", "-m", "immediate", "stop"])


@pytest.mark.parametrize("storage", ["file", "postgresql"])
def test_a_dead_worker_s_trial_is_taken_over(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two processes share a search; one is killed in its trial, and the other carries out that trial too."""
    url = str(tmp_path / "study.db") if storage == "file" else request.getfixturevalue("postgresql")

    def worker(name: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", WORKER, url, str(tmp_path), name]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    with worker("hangs") as hangs:
        until(lambda: (tmp_path / "hangs.began").exists())
        with worker("works") as works:
            until(lambda: (tmp_path / "works.began").exists())
            hangs.kill()
            out, _ = works.communicate(timeout=120)
    assert works.returncode == 0
    assert out.strip() == "8"  # the first values, which the killed worker had taken


def test_a_storage_that_cannot_be_used_is_refused_without_its_password() -> None:
    """A wrong address is three lines, and no password is shown."""
    with pytest.raises(EdgekitError) as caught:
        study.work("nosuchdb://user:secret@host/db", "n", 1, SPACE, lambda _: 0.0)
    assert "secret" not in str(caught.value)
    assert "nosuchdb://user@host/db" in caught.value.what


def until(holds: Any) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
