"""Engines that a device builds: which, in what kind of process, and what is kept of them."""

from __future__ import annotations

import importlib.util
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional

import pytest

from agent_testing import linear, linear_bundle
from device_agent.building import process
from device_agent.building.cache import MAX_ATTEMPTS, BuiltEngines
from device_agent.building.choice import Wanted, choose
from device_agent.building.process import BuildFailed, BuildStopped, Limits
from device_agent.errors import Missing
from device_agent.manifest import EngineBuild, EngineEntry, Manifest, ShapeRange
from storage_kit import FILES, manifest_for

RECORDING = Path(__file__).parent / "recording"
XAVIER = {"sm": "72", "tensorrt": "8.5.2.2", "cuda": "11.4", "driver": "R35.4.1"}
SHAPES = {"x": ShapeRange((1, 8), (8, 8), (8, 8))}


def _build(precision: str = "fp16", **requires: str) -> EngineBuild:
    return EngineBuild("tensorrt", "model.onnx", precision, requires, SHAPES)


def _manifest(*builds: EngineBuild, **changes: Any) -> Manifest:
    return replace(manifest_for(FILES), schema=4, builds=builds, **changes)


def _chosen(manifest: Manifest, device: Optional[Dict[str, str]] = None) -> Optional[Wanted]:
    def fingerprint(runtime: str) -> Dict[str, str]:
        if runtime != "tensorrt":
            raise Missing("not here", "it is not installed", "install it")
        return device or XAVIER

    return choose(manifest, fingerprint)


# Choosing


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        ({}, True),
        ({"sm": "72"}, True),
        ({"sm": "72", "tensorrt": "8.5"}, True),
        ({"tensorrt": "8.5.2.2"}, True),
        ({"sm": "7"}, False),
        ({"tensorrt": "8.50"}, False),
        ({"tensorrt": "8.6"}, False),
        ({"jetpack": "5"}, False),
    ],
)
def test_a_build_is_for_devices_that_are_what_it_requires(requires: Dict[str, str], fits: bool) -> None:
    """A version may be given in part, whole numbers of it; a key that no device knows fits nowhere."""
    assert (_chosen(_manifest(_build(**requires))) is not None) == fits


def test_the_first_build_that_fits_is_chosen() -> None:
    """Builds stand in order of preference; those of a runtime that is not here are passed over."""
    rtx = replace(_build("fp32"), runtime="tensorrt_rtx")
    wanted = _chosen(_manifest(rtx, _build("int8", sm="87"), _build("int8", sm="72"), _build("fp16")))
    assert wanted is not None
    assert (wanted.build.precision, wanted.build.requires) == ("int8", {"sm": "72"})


def test_nothing_is_built_where_a_prebuilt_engine_fits() -> None:
    """The host's engine comes first, if it is for exactly this device, this graph and this precision."""
    graph = manifest_for(FILES).files[0].sha256
    fitting = EngineEntry(
        "tensorrt", "engines/empty", "fp16", {**XAVIER, "precision": "fp16", "graph": graph}
    )
    assert _chosen(_manifest(_build(), engines=(fitting,))) is None
    for change in ({"sm": "87"}, {"driver": "R36.2"}, {"precision": "int8"}, {"graph": "0" * 64}):
        other = replace(fitting, fingerprint={**fitting.fingerprint, **change})
        assert _chosen(_manifest(_build(), engines=(other,))) is not None, change


def test_engines_differ_by_all_that_they_depend_on() -> None:
    """Another device, driver, precision, graph, workspace or shape is another engine; the rest is not."""
    base = _chosen(_manifest(_build()))
    assert base is not None
    others = [
        *(_chosen(_manifest(_build()), {**XAVIER, key: "9.9"}) for key in XAVIER),
        _chosen(_manifest(_build("int8"))),
        _chosen(_manifest(replace(_build(), graph="golden/inputs.npz"))),
        _chosen(_manifest(replace(_build(), workspace_bytes=1))),
        _chosen(_manifest(replace(_build(), shapes={"x": ShapeRange((1, 8), (1, 8), (1, 8))}))),
    ]
    keys = [wanted.key for wanted in others if wanted is not None]
    assert len({base.key, *keys}) == len(others) + 1
    same = _chosen(_manifest(_build(), version=7, profile="other"))
    assert same is not None
    assert same.key == base.key


# Keeping


def _wanted() -> Wanted:
    wanted = _chosen(_manifest(_build()))
    assert wanted is not None
    return wanted


def _keep(cache: BuiltEngines, wanted: Wanted, data: bytes = b"engine", model: str = "demo") -> Path:
    cache.place(wanted).write_bytes(data)
    return cache.keep(wanted, model, {})


@pytest.mark.parametrize("damage", [b"", b"engin", b"engina", b"engine and more"])
def test_a_damaged_engine_is_never_used(tmp_path: Path, damage: bytes) -> None:
    """An engine that was cut short or changed on disk is found out before TensorRT sees it, and removed."""
    cache, wanted = BuiltEngines(tmp_path / "engines"), _wanted()
    path = _keep(cache, wanted)
    assert cache.find(wanted) == path
    path.write_bytes(damage)
    assert cache.find(wanted) is None
    assert not path.exists()


def test_a_build_that_never_ends_is_given_up(tmp_path: Path) -> None:
    """Builds that were begun and did not end, with the power say, are counted; success forgets them."""
    cache, wanted = BuiltEngines(tmp_path / "engines"), _wanted()
    for _ in range(MAX_ATTEMPTS):
        assert cache.why_given_up(wanted) == ""
        cache.begin(wanted)
    assert "none came to an end" in cache.why_given_up(wanted)
    _keep(cache, wanted)
    assert cache.why_given_up(wanted) == ""


def test_a_build_that_the_agent_ended_does_not_count(tmp_path: Path) -> None:
    """Stopping the agent again and again says nothing of the engine."""
    cache, wanted = BuiltEngines(tmp_path / "engines"), _wanted()
    for _ in range(2 * MAX_ATTEMPTS):
        cache.begin(wanted)
        cache.forget_attempt(wanted)
    assert cache.why_given_up(wanted) == ""


def test_the_newest_engines_of_a_model_are_kept(tmp_path: Path) -> None:
    """A model's engines do not fill the disk, and push out no other model's."""
    cache = BuiltEngines(tmp_path / "engines")
    _keep(cache, _wanted(), model="other")
    for number in range(4):
        wanted = _chosen(_manifest(replace(_build(), workspace_bytes=number + 1)))
        assert wanted is not None
        _keep(cache, wanted)
        os.utime(str(tmp_path / "engines" / f"{wanted.key}.json"), (number, number))
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 3


# The process


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """What a build of the small linear model with the recording double is told."""
    monkeypatch.syspath_prepend(str(RECORDING))
    bundle = linear_bundle(tmp_path / "b")
    return {
        "runtime": "tensorrt",
        "graph": str(bundle.directory / "model.onnx"),
        "precision": "fp16",
        "shapes": {"x": [[1, 8], [8, 8], [8, 8]]},
        "workspace_bytes": 1 << 20,
        "calibration_cache": "",
        "layer_precisions": "",
        "dla_core": None,
        "sm": "72",
        "timing_cache": str(tmp_path / "timing.cache"),
        "engine": str(tmp_path / "m.engine"),
    }


AMPLE = Limits(60.0, lambda: None)


def _run(job: Dict[str, Any], limits: Limits = AMPLE, stop: Any = None) -> Any:
    phases = []
    built = process.run(job, limits, phases.append, stop or threading.Event())
    assert phases[0]["phase"] == "loading tensorrt"
    return built


def test_an_engine_is_built_in_a_process_of_its_own(job: Dict[str, Any]) -> None:
    """The engine and what was measured for it are on disk, and phases were told."""
    assert _run(job)["layers"] == 1
    assert Path(job["engine"]).read_bytes().endswith(linear().SerializeToString())
    assert Path(job["timing_cache"]).read_bytes() == b"timings"


def test_a_build_starts_from_what_the_last_one_measured(job: Dict[str, Any]) -> None:
    """The device's timing cache goes into the next build and comes back with what that added."""
    _run(job)
    _run({**job, "precision": "fp32", "engine": job["engine"] + "2"})
    assert Path(job["timing_cache"]).read_bytes() == b"timings" * 2


@pytest.mark.parametrize(
    ("words", "limits", "reason", "final"),
    [
        ("build-fails", Limits(60.0, lambda: None), "Error Code 10: no implementation", True),
        ("build-dies", Limits(60.0, lambda: None), r"signal 9 \(SIGKILL\)", False),
        ("build-hoards", Limits(60.0, lambda: None, 150_000_000), "it held .* MB", False),
        ("build-hoards", Limits(60.0, lambda: 0), "memory_reserve_bytes", False),
        ("build-seconds=60", Limits(1.0, lambda: None), "more than 1 s", True),
    ],
)
def test_a_build_that_fails_says_why_in_one_line(
    job: Dict[str, Any], monkeypatch: pytest.MonkeyPatch, words: str, limits: Limits, reason: str, final: bool
) -> None:
    """TensorRT refuses, the process is killed, takes all memory, or never ends: nothing is left behind."""
    monkeypatch.setenv("RECORDING_TENSORRT", words)
    with pytest.raises(BuildFailed, match=reason) as failed:
        _run(job, limits)
    assert failed.value.final == final
    assert "\n" not in failed.value.why
    assert not Path(job["engine"]).exists()


def test_a_graph_that_tensorrt_does_not_take_names_the_node(job: Dict[str, Any]) -> None:
    """The parser's own error arrives."""
    Path(job["graph"]).write_bytes(b"not a graph")
    with pytest.raises(BuildFailed, match="node 0"):
        _run(job)


def test_a_stopping_agent_ends_the_build(job: Dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop is answered in well under the time that the build would take, and is no failure."""
    monkeypatch.setenv("RECORDING_TENSORRT", "build-seconds=60")
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(BuildStopped):
        _run(job, stop=stop)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX, which builds without a GPU, is not here",
)
def test_the_process_really_builds_with_tensorrt_rtx(job: Dict[str, Any]) -> None:
    """The same process with a real TensorRT: it reports its progress, and the engine is one."""
    phases = []
    job = {**job, "runtime": "tensorrt_rtx", "sm": "89", "workspace_bytes": 0}
    built = process.run(job, Limits(120.0, lambda: None), phases.append, threading.Event())
    assert built["layers"] >= 1
    assert len(Path(job["engine"]).read_bytes()) > 10_000
    assert any(phase["steps"] for phase in phases)
