"""Several graphs packed as one model, from the host to what the device runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from device_agent import engines, selftest
from device_agent.engines.base import EngineSettings
from device_agent.manifest import Resources
from edgekit import bundle, profile
from edgekit.composition import Release, StepFile, pack_composition
from edgekit.errors import BadInput

IMAGE = np.random.default_rng(0).integers(0, 256, (3, 6)).astype(np.uint8)
WEIGHTS = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
RELEASE = Release("detector", 1, main="model", max_batch_size=4)


def _write(path: Path, nodes: list[Any], x: Any, y: Any, weights: dict[str, Any] | None = None) -> Path:
    constants = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(nodes, path.stem, [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def _info(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture(name="steps")
def _steps(tmp_path: Path) -> list[StepFile]:
    before = _write(
        tmp_path / "before.onnx",
        [helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT)],
        _info("image", TensorProto.UINT8, "n", 6),
        _info("pixels", TensorProto.FLOAT, "n", 6),
    )
    model = _write(
        tmp_path / "model.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        _info("x", TensorProto.FLOAT, "n", 6),
        _info("y", TensorProto.FLOAT, "n", 4),
        {"w": WEIGHTS},
    )
    after = _write(
        tmp_path / "after.onnx",
        [helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0)],
        _info("scores", TensorProto.FLOAT, "n", 4),
        _info("label", TensorProto.INT64, "n"),
    )
    return [
        StepFile("after", after),
        StepFile("before", before),
        StepFile("model", model, inputs={"x": "pixels"}, outputs={"y": "scores"}),
    ]


def _pack(steps: list[StepFile], out: Path, **changes: Any) -> bundle.Bundle:
    arguments: dict[str, Any] = {"golden_inputs": {"image": IMAGE}, "outputs": ["label"], **changes}
    return pack_composition(steps, release=RELEASE, profile=profile.load("x86-cpu"), out=out, **arguments)


def test_what_the_host_packs_the_device_runs(tmp_path: Path, steps: list[StepFile]) -> None:
    """Three graphs come back from the archive as one engine with the same answers."""
    packed = _pack(steps, tmp_path / "out")
    with bundle.open_bundle(packed.archive) as opened:
        assert [step.name for step in opened.manifest.composition] == ["before", "model", "after"]
        assert opened.manifest.schema == 2
        engine = engines.open_engine(opened.directory, opened.manifest, EngineSettings(threads=1))
        selftest.check(engine, opened.directory, opened.manifest)
        answer = engine.run({"image": IMAGE})
        engine.close()
    assert list(answer) == ["label"]
    np.testing.assert_array_equal(answer["label"], (IMAGE.astype(np.float32) @ WEIGHTS).argmax(axis=1))


def test_the_same_steps_give_the_same_bundle(tmp_path: Path, steps: list[StepFile]) -> None:
    """A composition's digest depends on its content alone, not on the order in which its steps were named."""
    first, second = _pack(steps, tmp_path / "1"), _pack(steps[::-1], tmp_path / "2")
    assert first.digest == second.digest


def test_a_profiles_cores_travel_in_the_bundle(tmp_path: Path, steps: list[StepFile]) -> None:
    """What a profile says of serving is what the device reads in the manifest."""
    own = tmp_path / "own.toml"
    table = '\n[serving]\nthreads = 2\ncpus = "0-1"\n'
    own.write_text(profile.to_toml(profile.load("x86-cpu")) + table)
    packed = pack_composition(
        steps,
        {"image": IMAGE},
        ["label"],
        release=RELEASE,
        profile=profile.load(own),
        out=tmp_path / "out",
    )
    assert packed.manifest.resources == Resources(threads=2, cpus="0-1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: [*s[:2], replace(s[2], inputs={})], "takes 'x', which no step makes"),
        (lambda s: [*s[:2], replace(s[2], inputs={"z": "pixels"})], "has no input 'z'"),
        (lambda s: [*s[:2], replace(s[2], inputs={"x": "image"})], "does not run on the golden inputs"),
        (lambda s: s[:2], "which no step makes"),
        (lambda s: [*s[:2], replace(s[2], name="other")], "no step 'model'"),
    ],
)
def test_steps_that_do_not_fit_are_refused_on_the_host(
    tmp_path: Path, steps: list[StepFile], change: Any, reason: str
) -> None:
    """What the device would refuse is refused before it is shipped, and nothing is written."""
    with pytest.raises(BadInput) as caught:
        _pack(change(steps), tmp_path / "out")
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_none_is_refused_by_name(tmp_path: Path, steps: list[StepFile]) -> None:
    """A step's file that cannot be read is named."""
    steps[0].graph.write_bytes(b"no graph")
    with pytest.raises(BadInput, match="step 'after' cannot be read"):
        _pack(steps, tmp_path / "out")
