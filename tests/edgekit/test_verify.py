"""Verification: the metric on all held-out samples, both latencies, and golden outputs of the candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from stage_testing import dataset, run_stage, sources
from test_build import RELU, graph_artifact

from edgekit import ort
from edgekit.artifact import Artifact
from edgekit.stages.registry import Sources
from edgekit.stages.verify import GOLDEN_TOLERANCE

NEGATED = [helper.make_node("Neg", ["x"], ["n"]), helper.make_node("Relu", ["n"], ["y"])]


def _engine(
    root: Path, name: str, nodes: list[Any], shape: list[Any], precision: str = "fp32"
) -> tuple[Artifact, Sources]:
    graph, given = graph_artifact(root / f"{name}-graph", nodes, shape, shape)
    made = run_stage("build", {"max_batch_size": 16}, given, root / name, graph=graph)
    return Artifact("engine", made.path, "s", "k", (), {**made.metadata, "precision": precision}), given


def _verify(given: Sources, out: Path, original: Artifact, candidate: Artifact, **more: Any) -> Artifact:
    measure = {"runs": 12, "warmup": 1, **more.pop("measure", {})}
    config = {"measure": measure, "metric": "top1", "metric_source": None, "threads": 2, **more}
    return run_stage("verify", config, given, out, original=original, candidate=candidate)


def _labelled(given: Sources, rows: int) -> Sources:
    logits = np.random.default_rng(4).normal(size=(rows, 5)).astype(np.float32)
    return sources(given.model, dataset({"x": logits}, labels=logits.argmax(axis=1)))


def test_both_are_measured_on_every_sample(tmp_path: Path) -> None:
    """The metric of original and candidate, on all held-out samples, and both latencies from one run."""
    original, given = _engine(tmp_path, "original", RELU, ["n", 5])
    candidate, _ = _engine(tmp_path, "candidate", NEGATED, ["n", 5])
    made = _verify(_labelled(given, 37), tmp_path / "out", original, candidate)
    metric = made.metadata["metric"]
    assert (metric["original"]["name"], metric["original"]["value"]) == ("top1", 1.0)
    assert metric["original"]["samples"] == 37
    assert metric["original"]["interval"]["low"] < 1.0 == metric["original"]["interval"]["high"]
    assert made.metadata["metric_drop_interval"]["method"] == "bonett-price"
    assert metric["candidate"]["samples"] == 37
    assert metric["candidate"]["value"] < 0.5
    for timing in made.metadata["latency_ms"].values():
        assert timing["runs"] == 12
        assert timing["batch"] == 1
        assert timing["where"].startswith("this host")


def test_max_samples_bounds_the_metric(tmp_path: Path) -> None:
    """A large held-out set is cut where the recipe says, and the report says how many were used."""
    engine, given = _engine(tmp_path, "engine", RELU, ["n", 5])
    made = _verify(_labelled(given, 37), tmp_path / "out", engine, engine, measure={"max_samples": 20})
    assert made.metadata["metric"]["candidate"]["samples"] == 20


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_golden_outputs_are_the_candidate_s_own(precision: str, tmp_path: Path) -> None:
    """The device is compared with what the shipped engine gave here, within its precision's tolerance."""
    original, given = _engine(tmp_path, "original", RELU, ["n", 5])
    candidate, _ = _engine(tmp_path, "candidate", NEGATED, ["n", 5], precision)
    made = _verify(_labelled(given, 9), tmp_path / "out", original, candidate)
    with (
        np.load(made.path / "golden_inputs.npz") as inputs,
        np.load(made.path / "golden_outputs.npz") as outputs,
    ):
        assert inputs["x"].shape == (4, 5)
        got = ort.Session(candidate.path / "model.onnx").run({"x": inputs["x"]})
        assert np.array_equal(got["y"], outputs["y"])
        tolerance = made.metadata["tolerances"]["y"]
        assert tolerance["absolute"] == pytest.approx(GOLDEN_TOLERANCE[precision] * outputs["y"].max())


def test_golden_files_are_the_same_every_time(tmp_path: Path) -> None:
    """Timings differ from run to run; what goes into the bundle does not."""
    engine, given = _engine(tmp_path, "engine", RELU, ["n", 5])
    data = _labelled(given, 9)
    assert (
        _verify(data, tmp_path / "a", engine, engine).sha256
        == _verify(data, tmp_path / "b", engine, engine).sha256
    )


def test_a_graph_with_a_fixed_batch_is_measured_at_it(tmp_path: Path) -> None:
    """Models that take one row at a time are measured, and their golden inputs are one row."""
    engine, given = _engine(tmp_path, "engine", RELU, [1, 5])
    made = _verify(_labelled(given, 9), tmp_path / "out", engine, engine)
    assert made.metadata["metric"]["candidate"]["samples"] == 9
    assert made.metadata["latency_ms"]["candidate"]["batch"] == 1
    with np.load(made.path / "golden_inputs.npz") as inputs:
        assert len(inputs["x"]) == 1


def test_outputs_of_different_lengths_are_compared(tmp_path: Path) -> None:
    """Per-token outputs of sentences of different lengths give one metric."""
    engine, given = _engine(tmp_path, "engine", RELU, ["n", "t"])
    rows = [np.ones((length,), np.float32) for length in (3, 5, 2)]
    data = dataset({"x": np.ones((1, 3), np.float32)})
    samples = [{"x": row} for row in rows]

    def read() -> Any:
        from edgekit.data import Sample

        return (Sample(sample, None) for sample in samples)

    ragged = sources(given.model, data.__class__(3, False, "r" * 64, read))
    made = _verify(ragged, tmp_path / "out", engine, engine, metric="cosine")
    score = made.metadata["metric"]["candidate"]
    assert (score["name"], score["value"], score["samples"]) == ("cosine", 1.0, 3)
