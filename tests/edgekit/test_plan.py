"""Plans: stages that chain, and keys that change exactly when something that matters changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage_testing import dataset, sources, torch_model
from torch import nn

from device_agent.manifest import TensorSpec
from edgekit import plan, profile
from edgekit.errors import BadInput
from edgekit.plan import Plan, code_digest, make_plan
from edgekit.recipe import Recipe, load_recipe
from edgekit.source_code import closure
from edgekit.stages.registry import STAGES, Sources

X86 = profile.load("x86-cpu")


@pytest.fixture(scope="module")
def given_sources() -> Sources:
    """A model and data in memory."""
    return sources(torch_model(lambda: nn.Conv2d(3, 4, 1), image=(3, 4, 4)))


def _plan(given: Sources, device: profile.Profile = X86, metric: str = "cosine", **overrides: Any) -> Plan:
    recipe = load_recipe(None, {key.replace("__", "."): value for key, value in overrides.items()})
    return make_plan(given, device, recipe, metric)


def _keys(made: Plan) -> dict[str, str]:
    return {step.name: step.key for step in made.steps}


def _changed(before: Plan, after: Plan) -> set[str]:
    old, new = _keys(before), _keys(after)
    return {name for name in new if new[name] != old.get(name)}


def test_the_same_request_gives_the_same_plan(given_sources: Sources) -> None:
    """Keys do not depend on the process, and every step has its own."""
    keys = _keys(_plan(given_sources))
    assert keys == _keys(_plan(given_sources))
    assert len(set(keys.values())) == len(keys) == 14


def test_every_step_follows_what_it_needs(given_sources: Sources) -> None:
    """The steps can run in the order they are listed."""
    seen: set[str] = set()
    for step in _plan(given_sources).steps:
        assert set(step.inputs.values()) <= seen
        seen.add(step.name)


def test_a_size_can_be_reached_in_several_cuts(given_sources: Sources) -> None:
    """Each cut starts from what recovered from the one before; together they have all the epochs."""
    made = _plan(given_sources, prune__steps=3, recover__epochs=8, contract__size=0.343)
    steps = {step.name: step for step in made.steps}
    assert [name for name in steps if name.startswith(("prune", "recover"))] == [
        "prune.1", "recover.1", "prune.2", "recover.2", "prune", "recover",
    ]  # fmt: skip
    sizes = [steps[name].config["size"] for name in ("prune.1", "prune.2", "prune")]
    assert sizes == pytest.approx([0.7, 0.49, 0.343])
    assert steps["prune.1"].inputs == {"sensitivity": "sensitivity.1"}
    assert steps["prune.2"].inputs == {"model": "recover.1", "sensitivity": "sensitivity.2"}
    assert steps["sensitivity"].inputs == {"model": "recover.2"}
    assert steps["export.pruned"].inputs == {"model": "recover"}
    epochs = [steps[name].config["recover"]["epochs"] for name in ("recover.1", "recover.2", "recover")]
    assert sum(epochs) == 8


_PRUNED = {"recover", "export.pruned"}
_INT8 = {"quantize.int8", "build.int8", "verify.int8"}
_FP16 = {"quantize.fp16", "build.fp16", "verify.fp16"}
_FP32 = {"build.fp32", "verify.fp32"}


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"recover__epochs": 3}, _PRUNED | _INT8 | _FP16 | _FP32),
        ({"quantize__max_samples": 3}, _INT8),
        ({"measure__runs": 77}, {"verify.int8", "verify.fp16", "verify.fp32"}),
        ({"contract__size": 0.5}, {"prune"} | _PRUNED | _INT8 | _FP16 | _FP32),
        ({"threads": 1}, {"sensitivity", "prune"} | _PRUNED | _INT8 | _FP16 | _FP32),
        ({"seed": 1}, {"sensitivity", "prune"} | _PRUNED | _INT8 | _FP16 | _FP32),
        ({"contract__max_drop": 0.5}, _INT8),
        ({"quantize__methods": []}, _INT8),
        ({"contract__latency": "p95:1ms"}, {"staircase"}),
        ({"search__trials": 1, "release__version": 7}, set()),
        ({"contract__size": 0.35}, set()),
    ],
)
def test_a_setting_touches_the_steps_that_use_it(
    given_sources: Sources, change: dict[str, Any], touched: set[str]
) -> None:
    """What does not depend on a setting is reused when the setting changes; all that does is made anew."""
    assert _changed(_plan(given_sources), _plan(given_sources, **change)) == touched


def test_each_source_touches_the_steps_that_read_it(given_sources: Sources) -> None:
    """Other data or another model is noticed exactly where it is read."""
    base = _plan(given_sources)
    other = replace(dataset(dict(given_sources.model.example(2))), digest="f" * 64)
    touched = {
        name: _changed(base, _plan(replace(given_sources, **{name: other})))
        for name in ("calib", "train", "held_out")
    }
    assert touched["held_out"] == {"verify.int8", "verify.fp16", "verify.fp32"}
    assert "prune" not in touched["train"]
    assert {"recover", "verify.int8"} <= touched["train"]
    assert {"quantize.int8", "verify.int8"} <= touched["calib"]
    assert {"sensitivity", "prune"} <= touched["calib"]
    model = replace(given_sources.model, digest="f" * 64)
    assert _changed(base, _plan(replace(given_sources, model=model))) == set(_keys(base))


def test_the_profile_counts_only_where_it_is_looked_at(given_sources: Sources) -> None:
    """Another alignment prunes again; another description does nothing."""
    base = _plan(given_sources)
    wider = X86.model_copy(update={"alignment": {"fp32": 32, "fp16": 32, "int8": 32}})
    assert "prune" in _changed(base, _plan(given_sources, wider))
    assert "export.original" not in _changed(base, _plan(given_sources, wider))
    assert not _changed(base, _plan(given_sources, X86.model_copy(update={"description": "another"})))
    bounded = _plan(given_sources, contract__latency="p95:1ms")
    alike = _plan(given_sources, X86.model_copy(update={"name": "alike"}), contract__latency="p95:1ms")
    assert "staircase" in _changed(bounded, alike), "a prediction names the profile that it is of"


def test_other_versions_of_a_library_count(given_sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade of ONNX Runtime calibrates and measures again, and does not prune again."""
    base = _plan(given_sources)
    version = plan.importlib.metadata.version
    monkeypatch.setattr(
        plan.importlib.metadata, "version", lambda name: "99" if name == "onnxruntime" else version(name)
    )
    changed = _changed(base, _plan(given_sources))
    assert {"quantize.int8", "build.original", "verify.fp32"} <= changed
    assert not changed & {"prune", "recover", "export.original"}


def test_a_library_that_is_installed_later_counts(
    given_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be built without TensorRT is built once it is there; nothing else is made again."""
    before = _plan(given_sources)
    version = plan.importlib.metadata.version
    monkeypatch.setattr(
        plan.importlib.metadata, "version", lambda name: "10.3.0" if name == "tensorrt" else version(name)
    )
    changed = {name.split(".")[0] for name in _changed(before, _plan(given_sources))}
    assert "build" in changed
    assert not {"export", "prune", "recover", "quantize"} & changed


def test_an_edited_metric_of_one_s_own_measures_again(
    given_sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source of ``module:fn`` is part of the measurement's key."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_metric.py"
    module.write_text("def score(outputs, labels):\n    return 1.0\n")
    base = _plan(given_sources, metric="my_metric:score")
    module.write_text("def score(outputs, labels):\n    return 2.0\n")
    again = _plan(given_sources, metric="my_metric:score")
    assert _changed(base, again) == {"verify.int8", "verify.fp16", "verify.fp32"}


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(config=st.dictionaries(st.text(max_size=4), _json, min_size=1, max_size=5), extra=_json)
def test_keys_ignore_order_and_nothing_else(
    given_sources: Sources, config: dict[str, Any], extra: Any
) -> None:
    """The order in which settings are written does not matter; every value does."""
    builder = plan._Builder(given_sources, X86)
    stage = STAGES["prune"]
    key = builder._key(stage, config, {}, X86)
    assert builder._key(stage, dict(reversed(config.items())), {}, X86) == key
    first = next(iter(config))
    other = {**config, first: extra}
    same = json.dumps(other, sort_keys=True) == json.dumps(config, sort_keys=True)
    assert (builder._key(stage, other, {}, X86) == key) == same
    assert builder._key(stage, {**config, first + "+": 1}, {}, X86) != key


# The code's digest


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of three modules, each importing the next in another way."""
    root = tmp_path / "house_under_test"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "a.py").write_text("from house_under_test import b\n")
    (root / "b.py").write_text("def f():\n    from house_under_test.c import g\n    return g\n")
    (root / "c.py").write_text("import json\ng = 1\n")
    (root / "unrelated.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plan, "_OWN_PACKAGES", ("house_under_test",))
    yield root
    for name in [name for name in sys.modules if name.startswith("house_under_test")]:
        del sys.modules[name]
    code_digest.cache_clear()


@pytest.mark.parametrize(
    ("file", "counts"),
    [("a.py", True), ("b.py", True), ("c.py", True), ("__init__.py", True), ("unrelated.py", False)],
)
def test_code_counts_however_far_down_it_is_imported(package: Path, file: str, counts: bool) -> None:
    """A change anywhere below a stage's module changes its digest, imports inside functions included."""
    code_digest.cache_clear()
    before = code_digest("house_under_test.a")
    (package / file).write_text((package / file).read_text() + "# changed\n")
    code_digest.cache_clear()
    assert (code_digest("house_under_test.a") != before) == counts


@pytest.mark.parametrize("name", list(STAGES))
def test_the_digest_covers_what_a_stage_really_loads(name: str) -> None:
    """Nothing that a stage's module pulls in by name or import is outside its key."""
    stage = STAGES[name]
    covered = set(closure((stage.module, *stage.loads), plan._source))
    expected = {
        "staircase": {"edgekit.measure.staircase", "edgekit.measure.roofline"},
        "sensitivity": {"edgekit.pruning.cutting", "edgekit.stages.examined", "host_trainer.losses"},
        "prune": {"edgekit.surgery", "edgekit.modules", "edgekit.allocation", "edgekit.pruning.cutting"},
        "recover": {"host_trainer.loop", "host_trainer.losses", "host_trainer.batchnorm", "edgekit.surgery"},
        "export": {"edgekit.ort", "edgekit.measure.graph", "edgekit.surgery"},
        "quantize": {
            "calibration",
            "calibration.runner",
            "calibration.observers",
            "calibration.qdq",
            "calibration.fp16",
        },
        "build": {"edgekit.builders.registry", "edgekit.builders.onnxruntime", "edgekit.ort"},
        "verify": {"edgekit.measure.latency", "edgekit.measure.accuracy", "edgekit.ort"},
    }[name]
    assert expected <= covered


# Contradictions


def test_a_size_below_one_needs_modules(given_sources: Sources) -> None:
    """A graph or a program cannot be pruned: a size is refused, and without one it is not tried."""
    for kind in ("onnx", "exported"):
        other = replace(given_sources, model=replace(given_sources.model, kind=kind))
        with pytest.raises(BadInput, match="contradicts the model"):
            _plan(other, contract__size=0.5)
        assert "prune" not in _keys(_plan(other))
        assert _plan(other, contract__size=1).size == 1.0


@pytest.mark.parametrize("shapes", [[(3, 4)], [()], [(-1, 4), (2, 4)], [(-1, 4), (1, 4)]])
def test_a_model_without_a_batch_axis_is_refused(given_sources: Sources, shapes: list[Any]) -> None:
    """A batch frozen at three, a scalar input, or inputs that disagree: refused before any work."""
    inputs = tuple(TensorSpec(f"x{number}", "FP32", shape) for number, shape in enumerate(shapes))
    with pytest.raises(BadInput, match="no batch axis"):
        _plan(replace(given_sources, model=replace(given_sources.model, inputs=inputs)))


def test_a_precision_that_the_device_lacks_is_refused(given_sources: Sources) -> None:
    """``auto`` tries what the profile runs, and only that."""
    device = X86.model_copy(update={"precisions": ("fp32", "fp16")})
    assert list(_plan(given_sources, device).candidates) == ["fp16", "fp32"]
    with pytest.raises(BadInput, match="cannot run int8"):
        _plan(given_sources, device, precision="int8")


def test_stages_that_do_not_chain_are_a_mistake_of_ours(given_sources: Sources) -> None:
    """An artifact of the wrong kind is refused when the plan is made, not when it runs."""
    builder = plan._Builder(given_sources, X86)
    config = {"prune": Recipe().prune.model_dump(), "size": 0.5, "latency_share": None, "seed": 0}
    pruned = builder.add("prune", "prune", config, {})
    with pytest.raises(ValueError, match="does not take"):
        builder.add("build", "build", {"max_batch_size": 1}, {"graph": pruned})
