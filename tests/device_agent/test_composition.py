from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from agent_testing import AgentProcess, TestBundle, linear, make_model, session_of, write_bundle
from device_agent import engines, manifest, selftest
from device_agent.composition.plan import PlanError, last_uses, order
from device_agent.engines.base import EngineError, EngineSettings
from device_agent.engines.onnxruntime import OnnxRuntimeEngine
from device_agent.errors import ManifestError, Refused
from device_agent.manifest import FileEntry, Step, TensorSpec

SETTINGS = EngineSettings(threads=1)
X = np.linspace(0, 255, 16).reshape(2, 8).astype(np.uint8)


def _step(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Step:
    return Step(name, f"{name}.onnx", {x: x for x in inputs}, {x: x for x in outputs})


# The plan


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_steps_run_after_those_whose_tensors_they_take(arity: List[int], random: Any) -> None:
    """Whatever order the steps are written in, each runs when all that it takes is there."""
    steps = []
    for number, count in enumerate(arity):
        known = ["x"] + [f"t{i}" for i in range(number)]
        takes = random.sample(known, min(count, len(known)))
        steps.append(_step(f"s{number}", takes, [f"t{number}"]))
    random.shuffle(steps)
    ordered = order(steps, ["x"], [f"t{len(arity) - 1}"])
    assert sorted(step.name for step in ordered) == sorted(step.name for step in steps)
    there = {"x"}
    for step, gone in zip(ordered, last_uses(ordered, ["x"])):
        assert set(step.inputs.values()) <= there
        there |= set(step.outputs.values())
        there -= set(gone)
    assert there == {"x"}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([_step("a", ["y"], ["z"]), _step("b", ["z"], ["y"])], "wait for each other: a, b"),
        ([_step("a", ["x"], ["y"]), _step("b", ["x"], ["y"])], "'y' has 2 origins"),
        ([_step("a", ["x"], ["x"])], "'x' has 2 origins"),
        ([_step("a", ["w"], ["y"])], "takes 'w', which no step makes"),
        ([_step("a", ["x"], ["w"])], "no step makes the output 'y'"),
        ([_step("a", ["x"], ["y"]), _step("a", ["x"], ["z"])], "2 steps are named 'a'"),
        ([_step("a", ["x"], ["y"]), _step("b", ["x"], [])], "step 'b' makes nothing"),
        ([_step(f"s{i}", ["x"], [f"t{i}"]) for i in range(65)], "the limit is 64"),
    ],
)
def test_steps_that_make_no_model_are_refused(steps: List[Step], reason: str) -> None:
    """A cycle, a tensor that is made twice or never, and a missing output are found before anything runs."""
    with pytest.raises(PlanError, match=reason):
        order(steps, ["x"], ["y"])


# A bundle of three graphs: bytes to numbers, a linear model, the best class


def _graphs() -> Dict[str, Any]:
    scale = helper.make_node("Constant", [], ["scale"], value_float=255.0)
    before = make_model(
        [
            scale,
            helper.make_node("Cast", ["raw"], ["f"], to=1),
            helper.make_node("Div", ["f", "scale"], ["scaled"]),
        ],
        [TensorSpec("raw", "UINT8", (-1, 8))],
        [TensorSpec("scaled", "FP32", (-1, 8))],
    )
    after = make_model(
        [helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0)],
        [TensorSpec("scores", "FP32", (-1, 4))],
        [TensorSpec("best", "INT64", (-1,))],
    )
    return {"before": before, "model": linear(), "after": after}


STEPS = (
    Step("after", "after.onnx", {"scores": "scores"}, {"best": "label"}),
    Step("before", "before.onnx", {"raw": "image"}, {"scaled": "pixels"}),
    Step("model", "model.onnx", {"x": "pixels"}, {"scores": "scores"}),
)


def _expected(x: Any) -> Tuple[Any, Any]:
    scores = session_of(linear()).run(None, {"x": (x.astype(np.float32) / np.float32(255))})[0]
    return scores.argmax(axis=1), scores


def composed_bundle(directory: Path, **changes: Any) -> TestBundle:
    """An unpacked bundle of three steps; ``image`` in, ``label`` and ``scores`` out."""
    label, scores = _expected(X)
    plain = write_bundle(directory, linear(), {"image": X}, {"label": label, "scores": scores})
    files = list(plain.manifest.files)
    for name, graph in _graphs().items():
        if name != "model":
            data = graph.SerializeToString()
            (directory / f"{name}.onnx").write_bytes(data)
            files.append(FileEntry(f"{name}.onnx", hashlib.sha256(data).hexdigest(), len(data)))
    tolerance = plain.manifest.golden.tolerances["scores"]
    composed = replace(
        plain.manifest,
        **{
            "schema": 2,
            "files": tuple(files),
            "inputs": (TensorSpec("image", "UINT8", (-1, 8)),),
            "outputs": (TensorSpec("label", "INT64", (-1,)), TensorSpec("scores", "FP32", (-1, 4))),
            "golden": replace(plain.manifest.golden, tolerances={"label": tolerance, "scores": tolerance}),
            "composition": STEPS,
            **changes,
        },
    )
    data = manifest.dumps(composed)
    (directory / "manifest.json").write_bytes(data)
    return TestBundle(directory, composed, manifest.digest(data))


@pytest.mark.parametrize("isolate", [False, True])
def test_a_composition_answers_as_its_steps_one_after_the_other(tmp_path: Path, isolate: bool) -> None:
    """The chain is one engine with the manifest's tensors, in this process or in one of its own."""
    bundle = composed_bundle(tmp_path / "b")
    engine = engines.open_engine(bundle.directory, bundle.manifest, replace(SETTINGS, isolate=isolate))
    assert [spec.name for spec in engine.inputs] == ["image"]
    assert [spec.name for spec in engine.outputs] == ["label", "scores"]
    selftest.check(engine, bundle.directory, bundle.manifest)
    for rows in (1, 5):
        x = np.random.default_rng(rows).integers(0, 256, (rows, 8)).astype(np.uint8)
        outputs = engine.run({"image": x})
        label, scores = _expected(x)
        np.testing.assert_array_equal(outputs["label"], label)
        np.testing.assert_array_equal(outputs["scores"], scores)
    engine.close()


def test_a_tensor_goes_from_step_to_step_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one step returns is, at the same address, what the next one gets; so is the client's input."""
    bundle = composed_bundle(tmp_path / "b")
    engine = engines.open_engine(bundle.directory, bundle.manifest, SETTINGS)
    given, made = [], []
    real = OnnxRuntimeEngine.run

    def run(self: Any, inputs: Any) -> Any:
        given.append({name: array.ctypes.data for name, array in inputs.items()})
        outputs = real(self, inputs)
        made.append({name: array.ctypes.data for name, array in outputs.items()})
        return outputs

    monkeypatch.setattr(OnnxRuntimeEngine, "run", run)
    outputs = engine.run({"image": X})
    assert given[0]["raw"] == X.ctypes.data
    assert given[1]["x"] == made[0]["scaled"]
    assert given[2]["scores"] == made[1]["scores"] == outputs["scores"].ctypes.data
    assert not outputs["scores"].flags.owndata  # a view on what the runtime made


def test_a_composition_serves_like_any_model(
    tmp_path: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    """Clients see one model: its metadata, and batched answers of the whole chain."""
    import tritonclient.http as triton

    agent = start_agent(composed_bundle(tmp_path / "b"))
    with triton.InferenceServerClient(agent.http, concurrency=4) as client:
        metadata = client.get_model_metadata("model")
        assert [t["name"] for t in metadata["inputs"] + metadata["outputs"]] == ["image", "label", "scores"]
        pending = []
        for row in X:
            image = triton.InferInput("image", [1, 8], "UINT8")
            image.set_data_from_numpy(row[None])
            pending.append((row[None], client.async_infer("model", [image])))
        for row, answer in pending:
            assert answer.get_result().as_numpy("label").tolist() == _expected(row)[0].tolist()
    assert agent.stop() == 0


def _change(name: str, **changes: Any) -> Tuple[Step, ...]:
    return tuple(replace(step, **changes) if step.name == name else step for step in STEPS)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (_change("model", inputs={"x": "image"}), "'image' is UINT8, step 'model' takes FP32"),
        (_change("after", inputs={"scores": "pixels"}), r"'pixels' has shape \[-1, 8\]"),
        (_change("model", inputs={}), "is not given its input 'x'"),
        (_change("model", inputs={"x": "pixels", "z": "pixels"}), "has no input 'z'"),
        (_change("before", outputs={"scaled": "pixels", "z": "z"}), "has no output 'z'"),
    ],
)
def test_graphs_that_do_not_fit_are_refused_when_they_are_loaded(
    tmp_path: Path, steps: Tuple[Step, ...], reason: str
) -> None:
    """A type, a shape or a name that differs between two steps is named, and nothing is served."""
    bundle = composed_bundle(tmp_path / "b")
    with pytest.raises(Refused, match="do not fit together") as caught:
        engines.open_engine(bundle.directory, replace(bundle.manifest, composition=steps), SETTINGS)
    assert re.search(reason, caught.value.why)


def test_an_input_that_no_step_takes_is_refused_by_name(tmp_path: Path) -> None:
    """What clients would have to send for nothing has no type that a graph knows, so nothing is served."""
    bundle = composed_bundle(tmp_path / "b")
    inputs = (*bundle.manifest.inputs, TensorSpec("spare", "FP32", (-1, 8)))
    with pytest.raises(Refused, match="do not fit together") as caught:
        engines.open_engine(bundle.directory, replace(bundle.manifest, inputs=inputs), SETTINGS)
    assert "no step takes 'spare'" in caught.value.why


def test_an_error_names_the_step(tmp_path: Path) -> None:
    """A run that fails says in which step."""
    bundle = composed_bundle(tmp_path / "b")
    engine = engines.open_engine(bundle.directory, bundle.manifest, SETTINGS)
    with pytest.raises(EngineError, match="step 'before'"):
        engine.run({"image": np.zeros((1, 8), np.float32)})
    engine.close()


# The manifest


def test_a_manifest_without_steps_is_written_as_before(tmp_path: Path) -> None:
    """Agents that know no compositions read every bundle that has none; the schema tells them of others."""
    plain = composed_bundle(tmp_path / "b", composition=(), schema=1).manifest
    assert "composition" not in json.loads(manifest.dumps(plain))
    assert manifest.schema_of(plain) == 1
    composed = composed_bundle(tmp_path / "c").manifest
    assert manifest.schema_of(composed) == 2
    assert manifest.loads(manifest.dumps(composed)) == composed
    with pytest.raises(ManifestError, match="schema 1 has no 'composition'"):
        manifest.dumps(replace(composed, schema=1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"composition": (*STEPS, _step("more", ["x"], ["y"]))}, "not among the files"),
        ({"composition": _change("after", inputs={"scores": "label"})}, "wait for each other"),
        ({"graph": "golden_inputs.npz"}, "the graph is not that of a step"),
    ],
)
def test_a_manifest_whose_steps_cannot_run_is_refused(
    tmp_path: Path, changes: Dict[str, Any], reason: str
) -> None:
    """What can be said without loading a graph is said when the manifest is read."""
    with pytest.raises(ManifestError, match=reason):
        composed_bundle(tmp_path / "b", **changes)
