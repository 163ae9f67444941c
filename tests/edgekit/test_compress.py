"""``edgekit compress``: the whole road by the real command, what it reuses, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import Compressed
from host_testing import HERE, RECIPE, Forker, TinyModel, assert_three_lines
from onnx import TensorProto, helper, numpy_helper

from calibration.session import exact_session
from calibration.tensorrt_cache import read_cache
from device_agent.manifest import read
from edgekit import bundle, compress
from edgekit.artifact import open_store

SCHEMA = json.loads((HERE / "report.schema.json").read_text())


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def cached(document: dict[str, Any]) -> dict[str, bool]:
    """Stage -> whether it was reused."""
    return {stage["name"]: stage["cached"] for stage in document["stages"]}


# The result


def test_the_document_follows_the_promised_schema(compressed: Compressed) -> None:
    """``--json`` prints one document with every key that the command line promises, and nothing else."""
    jsonschema.validate(compressed.document, SCHEMA)
    assert compressed.result.error_lines() == []


def test_the_schema_notices_a_broken_promise(compressed: Compressed) -> None:
    """A document without a promised key, or with percent instead of fractions, does not pass."""
    for spoil in (
        lambda d: d["chosen"].pop("speedup"),
        lambda d: d["chosen"].update(params_ratio=35.0),
        lambda d: d["contract"].update(met=False),
        lambda d: d["engines"][0].update(built=False, why=None),
    ):
        document = json.loads(compressed.result.out)
        spoil(document)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, SCHEMA)


def test_the_model_shrinks_to_the_contract_and_still_works(compressed: Compressed) -> None:
    """Without a word about size, a third of the parameters remain, and the classifier still classifies."""
    chosen = compressed.document["chosen"]
    assert chosen["params_ratio"] <= 0.35
    assert chosen["size_ratio"] < 0.2
    assert chosen["macs"] < compressed.document["baseline"]["macs"]
    assert chosen["metric"]["value"] > 0.85
    assert compressed.document["contract"] == {
        "size": 0.35, "max_drop": None, "latency": None, "met": True, "unmet": [], "why": {},
        "max_drop_certain": None, "binding": [],
    }  # fmt: skip


def test_the_ratios_are_those_of_the_figures(compressed: Compressed) -> None:
    """Every ratio in the report can be computed from the two columns beside it."""
    was, now = compressed.document["baseline"], compressed.document["chosen"]
    assert now["params_ratio"] == now["params"] / was["params"]
    assert now["size_ratio"] == now["size_bytes"] / was["size_bytes"]
    assert now["metric_drop"] == pytest.approx(was["metric"]["value"] - now["metric"]["value"], abs=1e-12)
    assert now["speedup"] == was["latency_ms"]["p50"] / now["latency_ms"]["p50"]


def test_what_was_measured_is_what_is_in_the_bundle(compressed: Compressed, tiny: TinyModel) -> None:
    """The graph in the bundle has the reported size and, run by hand on the held-out data, the accuracy."""
    graph = Path(compressed.document["bundle"]["path"]) / "model.onnx"
    chosen = compressed.document["chosen"]
    assert graph.stat().st_size == chosen["size_bytes"]
    session = exact_session(str(graph), onnxruntime.SessionOptions())
    with np.load(tiny.eval) as data:
        logits = session.run(None, {"image": data["image"]})[0]
        right = logits.argmax(1) == data["labels"]
    assert chosen["metric"]["samples"] == 200
    assert abs(right.mean() - chosen["metric"]["value"]) < 0.05
    assert {node.op_type for node in onnx.load(graph).graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


def test_both_forms_of_the_bundle_open_and_name_one_digest(compressed: Compressed) -> None:
    """Directory and single file hold the same bundle, whose golden outputs the graph reproduces."""
    for form in (compressed.document["bundle"]["path"], compressed.document["bundle"]["file"]):
        with bundle.open_bundle(Path(form)) as opened:
            assert opened.digest == compressed.document["bundle"]["digest"]
            golden = opened.manifest.golden
            session = exact_session(
                str(opened.directory / opened.manifest.graph), onnxruntime.SessionOptions()
            )
            with np.load(opened.directory / golden.inputs) as inputs:
                got = session.run(None, dict(inputs))
            with np.load(opened.directory / golden.outputs) as outputs:
                for spec, value in zip(opened.manifest.outputs, got, strict=True):
                    assert np.array_equal(outputs[spec.name], value)


def test_the_bundle_says_nothing_of_the_machine_or_the_day(compressed: Compressed, tiny: TinyModel) -> None:
    """No timing, no path of this machine is in the manifest, so another machine can make the same bundle."""
    manifest = (Path(compressed.document["bundle"]["path"]) / "manifest.json").read_text()
    assert "p50" not in manifest
    assert str(tiny.home) not in manifest


def test_the_reports_are_beside_the_bundle(compressed: Compressed) -> None:
    """``report.json`` is what was printed, ``report.html`` shows it, and nothing unfinished lies around."""
    assert json.loads((compressed.out / "report.json").read_text()) == compressed.document
    assert compressed.document["bundle"]["digest"] in (compressed.out / "report.html").read_text()
    assert sorted(p.name for p in compressed.out.iterdir()) == [
        "build", "build.edgekit", "report.html", "report.json",
    ]  # fmt: skip


# Reuse


def test_a_second_run_reuses_everything_and_says_so(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """The same command again runs no stage, says "reused" for each, and gives the same bundle."""
    again = forked.run(*tiny.compress_argv(compressed.workdir, tmp_path), cwd=tiny.home)
    assert again.code == 0, again.err
    assert all(cached(again.json()).values())
    assert again.err.count("reused") == len(again.json()["stages"])
    assert again.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]
    assert (tmp_path / "build.edgekit").read_bytes() == compressed.archive.read_bytes()


def test_all_precisions_are_tried_and_the_losers_say_why(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """``--precision auto`` measures three candidates, keeps one, and gives a reason for each other."""
    result = forked.run(*tiny.compress_argv(compressed.workdir, tmp_path, precision="auto"), cwd=tiny.home)
    assert result.code == 0, result.err
    document = result.json()
    jsonschema.validate(document, SCHEMA)
    assert [c["precision"] for c in document["candidates"]] == ["int8", "fp16", "fp32"]
    assert [c["reason"] is None for c in document["candidates"]].count(True) == 1
    reused = cached(document)
    assert {name for name in reused if not reused[name]} == {
        "quantize.fp16", "build.fp16", "verify.fp16", "build.fp32", "verify.fp32",
    }  # fmt: skip


def dry_run(forked: Forker, tiny: TinyModel, workdir: Path, out: Path, **options: object) -> dict[str, bool]:
    """Stage -> whether ``--dry-run`` says that it is there."""
    result = forked.run(*tiny.compress_argv(workdir, out, "--dry-run", **options), cwd=tiny.home)
    assert result.code == 0, result.err
    return {step["name"]: step["cached"] for step in result.json()}


def test_a_changed_line_of_the_recipe_reuses_the_stages_before_it(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Another observer calibrates again, and neither prunes nor trains nor exports again."""
    changed = tmp_path / "recipe.toml"
    changed.write_text(RECIPE.replace("[quantize]\n", '[quantize]\nobserver = "percentile"\n'))
    steps = dry_run(forked, tiny, compressed.workdir, tmp_path / "out", recipe=changed)
    assert {name for name, there in steps.items() if not there} == {
        "quantize.int8", "build.int8", "verify.int8",
    }  # fmt: skip


def test_a_changed_seed_trains_again(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Another seed is another result; only the export of the unchanged model is the same."""
    steps = dry_run(forked, tiny, compressed.workdir, tmp_path / "out", seed=7)
    assert {name for name, there in steps.items() if there} == {"export.original", "build.original"}


def test_changed_weights_change_everything(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Weights that differ in one bit are another model; nothing is reused."""
    data = bytearray(tiny.weights.read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    steps = dry_run(forked, tiny, compressed.workdir, tmp_path / "out", weights=tmp_path / "w.safetensors")
    assert not any(steps.values())


def test_a_dry_run_runs_and_writes_nothing(tiny: TinyModel, forked: Forker, tmp_path: Path) -> None:
    """``--dry-run`` prints the steps, makes neither working nor output directory, and leaves an empty one."""
    steps = dry_run(forked, tiny, tmp_path / "work", tmp_path / "out")
    assert list(steps) == [
        "export.original", "sensitivity", "prune", "recover", "export.pruned", "build.original",
        "quantize.int8", "build.int8", "verify.int8",
    ]  # fmt: skip
    (tmp_path / "work").mkdir()
    dry_run(forked, tiny, tmp_path / "work", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["work"]


def test_a_dry_run_does_not_disturb_a_run(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """While another run holds the working directory, its unfinished work is left alone."""
    with open_store(compressed.workdir) as store:
        unfinished = store.root / "tmp" / "unfinished"
        unfinished.mkdir()
        assert all(dry_run(forked, tiny, compressed.workdir, tmp_path / "out").values())
        assert unfinished.exists()


def test_two_runs_on_one_working_directory_do_not_mix(
    tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """The second run is refused at once, and told what to do."""
    with open_store(tmp_path / "work"):
        second = forked.run(*tiny.compress_argv(tmp_path / "work", tmp_path / "out"), cwd=tiny.home)
    text = assert_three_lines(second, 2)
    assert "is in use" in text
    assert "--workdir" in text


def test_a_damaged_artifact_is_made_again(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """A flipped bit in a stored file is noticed; that stage runs again, and the bundle is the same."""
    workdir = tmp_path / "work"
    shutil.copytree(compressed.workdir, workdir)
    victim = next(workdir.glob("artifacts/*/data/scales.json"))
    victim.write_bytes(victim.read_bytes().replace(b"1", b"2", 1))
    again = forked.run(*tiny.compress_argv(workdir, tmp_path / "out"), cwd=tiny.home)
    assert again.code == 0, again.err
    assert list(cached(again.json()).values()).count(False) == 1
    assert again.json()["bundle"]["digest"] == compressed.document["bundle"]["digest"]


# The contract


def test_an_unmet_contract_exits_3_and_writes_everything(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """A latency that nothing reaches: exit 3, three lines why, and the best candidate with its report."""
    argv = tiny.compress_argv(compressed.workdir, tmp_path, latency="p95:0.0001ms", max_drop=0.9)
    result = forked.run(*argv, cwd=tiny.home)
    assert "p95 is" in assert_three_lines(result, 3)
    document = result.json()
    jsonschema.validate(document, SCHEMA)
    assert document["contract"]["unmet"] == document["contract"]["binding"] == ["latency"]
    assert bundle.inspect(tmp_path / "build.edgekit")["contract"]["met"] is False
    assert {"report.json", "report.html"} <= {path.name for path in tmp_path.iterdir()}


def test_a_latency_nobody_measured_is_not_met(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """A bound for another kind of machine is unmet, says that it was not measured here, and why."""
    argv = tiny.compress_argv(compressed.workdir, tmp_path, profile="arm64-cpu", latency="p95:1000ms")
    result = forked.run(*argv, cwd=tiny.home)
    assert "not measured" in assert_three_lines(result, 3)
    assert "latency_ms" in result.json()["why"]


DRAWER = "x86-cpu,jetson-agx-xavier,jetson-agx-orin,rtx-4000-ada"


def test_one_run_serves_a_drawer_of_devices(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Four profiles: the shared stages run once, and one bundle holds an engine or a plan for each device."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")
    argv = tiny.compress_argv(compressed.workdir, tmp_path, profile=DRAWER, size=0.6)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code == 0, result.err
    document = result.json()
    jsonschema.validate(document, SCHEMA)
    stages = [stage["name"].split(".")[0] for stage in document["stages"]]
    assert [stages.count(name) for name in ("prune", "recover", "quantize", "verify", "build")] == [
        1,
        1,
        1,
        1,
        5,
    ]
    engines = {engine["profile"]: engine for engine in document["engines"]}
    assert {name: (engine["built"], engine["executed"]) for name, engine in engines.items()} == {
        "x86-cpu": (True, True),
        "jetson-agx-xavier": (False, False),
        "jetson-agx-orin": (False, False),
        "rtx-4000-ada": (True, False),
    }
    assert any("int8" in layer["inputs"] for layer in engines["rtx-4000-ada"]["layers"])
    assert {name for name, engine in engines.items() if engine["layers"] is None} == set(engines) - {
        "rtx-4000-ada"
    }
    home = Path(document["bundle"]["path"])
    manifest, _ = read(home)
    assert [(engine.runtime, engine.fingerprint.get("sm")) for engine in manifest.engines] == [
        ("onnxruntime", None), ("tensorrt_rtx", "89"),
    ]  # fmt: skip
    plans = {plan.requires["sm"]: plan for plan in manifest.builds}
    assert set(plans) == {"72", "87", "89"}
    xavier = onnx.load(str(home / plans["72"].graph))
    assert xavier.opset_import[0].version <= 17
    assert not {"LayerNormalization", "QuantizeLinear"} & {node.op_type for node in xavier.graph.node}
    assert read_cache((home / plans["72"].calibration_cache).read_text())
    assert "int8" in json.loads((home / plans["72"].layer_precisions).read_text()).values()


def test_devices_that_cannot_share_a_graph_are_refused(
    tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """A processor that saturates needs other INT8 weights: it is named, with what to do."""
    argv = tiny.compress_argv(tmp_path / "w", tmp_path, profile="x86-cpu,x86-cpu-avx2")
    assert "name x86-cpu-avx2 first" in assert_three_lines(forked.run(*argv, cwd=tiny.home), 2)


# Bad input: exit 2, three lines, nothing written


NO_INT8 = "x86-no-int8.toml"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "missing-directory", "weights": None}, "does not exist"),
        ({"model": "no_such_module:build"}, "no_such_module"),
        ({"model": "tiny_net:bild"}, "did you mean 'build'"),
        ({"weights": "missing.safetensors"}, "do not exist"),
        ({"profile": "x86-cqu"}, "did you mean 'x86-cpu'"),
        ({"profile": NO_INT8}, "cannot run int8"),
        ({"precision": "int4"}, "precision"),
        ({"size": -0.5}, "size"),
        ({"size": 0}, "size"),
        ({"size": 1.5}, "size"),
        ({"size": "nan"}, "size"),
        ({"max_drop": -1}, "max_drop"),
        ({"max_drop": "inf"}, "max_drop"),
        ({"latency": "23"}, "p95:23ms"),
        ({"latency": "p95:0ms"}, "latency"),
        ({"latency": "p95:-1ms"}, "p95:23ms"),
        ({"seed": -1}, "seed"),
        ({"metric": "topl"}, "did you mean 'top1'"),
        ({"metric": "no_such_module:metric"}, "no_such_module"),
        ({"calib": "missing.npz"}, "does not exist"),
        ({"eval": "missing.npz"}, "does not exist"),
        ({"train": "missing.npz"}, "does not exist"),
        ({"recipe": "missing.toml"}, "cannot be read"),
        ({"nonsense": 1}, "--nonsense"),
        ({"model": "model.onnx", "weights": None, "size": 0.5}, "contradicts the model"),
        ({"model": "model.onnx"}, "--weights does not go with"),
        ({"model": "corrupt.onnx", "weights": None}, "not a valid ONNX file"),
        ({"model": "weights.pt", "weights": None}, "--weights"),
    ],
)  # fmt: skip
def test_bad_usage_is_refused_before_anything_is_written(
    options: dict[str, Any],
    words: str,
    compressed: Compressed,
    tiny: TinyModel,
    forked: Forker,
    tmp_path: Path,
) -> None:
    """Wrong paths, names, numbers and contradictions exit 2 with three lines and leave nothing behind."""
    cwd = tmp_path / "here"
    cwd.mkdir()
    shutil.copy(tiny.home / "tiny_net.py", cwd)
    original = compressed.workdir.glob("artifacts/*/data/model.onnx")
    whole = max(original, key=lambda path: path.stat().st_size).read_bytes()
    (cwd / "model.onnx").write_bytes(whole)
    (cwd / "corrupt.onnx").write_bytes(whole[: len(whole) // 3])
    (cwd / "weights.pt").write_bytes(b"")
    profile = (HERE.parents[1] / "edgekit/profiles/x86-cpu.toml").read_text()
    (cwd / NO_INT8).write_text(profile.replace('["fp32", "fp16", "int8"]', '["fp32", "fp16"]'))
    before = set(files_in(cwd))
    result = forked.run(*tiny.compress_argv(tmp_path / "work", tmp_path / "out", **options), cwd=cwd)
    assert words in assert_three_lines(result, 2)
    assert result.out == ""
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()
    assert {name for name in files_in(cwd) if "__pycache__" not in name} == before


class Evil:
    """Unpickling it makes a directory: proof that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_what", ["weights", "calib"])
def test_a_pickle_that_would_execute_code_does_not(
    as_what: str, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Weights or data that would run code when they are unpickled are refused, and the code did not run."""
    marker = tmp_path / "executed"
    if as_what == "weights":
        bad = tmp_path / "evil.pt"
        bad.write_bytes(pickle.dumps({"head.weight": Evil(marker)}))
    else:
        bad = tmp_path / "evil.npz"
        np.savez(bad, image=np.array([Evil(marker)], dtype=object))
    result = forked.run(
        *tiny.compress_argv(tmp_path / "work", tmp_path / "out", **{as_what: bad}), cwd=tiny.home
    )
    assert_three_lines(result, 2)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # where it is let to, it does execute code


def _images(count: int = 20) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(count, 1, 8, 8)).astype(np.float32)


def _with_nan() -> np.ndarray[Any, Any]:
    images = _images()
    images[13, 0, 2, 2] = np.nan
    return images


BAD_DATA = {
    "empty": ({"image": _images(0)}, "is empty"),
    "no inputs": ({"labels": np.arange(20)}, "no inputs"),
    "wrong names": ({"picture": _images()}, "wrong names"),
    "wrong shapes": ({"image": _images()[..., :7]}, "wrong shape"),
    "wrong types": ({"image": _images().astype(np.float64)}, "wrong type"),
    "NaN": ({"image": _with_nan()}, "NaN"),
    "unequal lengths": ({"image": _images(), "labels": np.arange(3)}, "same number of samples"),
    "too few": ({"image": _images(1)}, "too few"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_calibration_data_that_does_not_fit_is_refused(
    case: str, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """Data with the wrong names, shapes, types, lengths or values is named before any work is done."""
    arrays, words = BAD_DATA[case]
    np.savez(tmp_path / "calib.npz", **arrays)
    argv = tiny.compress_argv(tmp_path / "work", tmp_path / "out", calib=tmp_path / "calib.npz", eval=None)
    text = assert_three_lines(forked.run(*argv, cwd=tiny.home), 2)
    assert words in text
    assert "calib.npz" in text
    assert not (tmp_path / "work").exists()


def test_top1_without_labels_is_refused(tiny: TinyModel, forked: Forker, tmp_path: Path) -> None:
    """A metric that needs labels is refused where the held-out data has none."""
    np.savez(tmp_path / "eval.npz", image=_images())
    argv = tiny.compress_argv(tmp_path / "work", tmp_path / "out", eval=tmp_path / "eval.npz", metric="top1")
    assert "needs labels" in assert_three_lines(forked.run(*argv, cwd=tiny.home), 2)


def test_an_output_directory_that_is_a_file_is_refused(
    tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """A file where the output should go is named before any work is done, and is not touched."""
    (tmp_path / "out").write_text("mine")
    argv = tiny.compress_argv(tmp_path / "work", tmp_path / "out")
    assert "--out" in assert_three_lines(forked.run(*argv, cwd=tiny.home), 2)
    assert (tmp_path / "out").read_text() == "mine"
    assert not (tmp_path / "work").exists()


def test_without_eval_a_fifth_is_held_out(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """One calibration sample in five is kept out of calibration and recovery, and the report says so."""
    argv = tiny.compress_argv(compressed.workdir, tmp_path, eval=None, size=1)
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code in (0, 3), result.err
    document = result.json()
    assert document["chosen"]["metric"]["samples"] == 700 // 5
    assert "held out" in document["evaluated_on"]
    assert document["chosen"]["pruning"] is None


def test_training_on_the_calibration_data_leaves_out_what_is_held_out_of_it(tmp_path: Path) -> None:
    """``--train`` that names the file of ``--calib`` does not bring back what is measured on."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    data = str(tmp_path / "data.npz")
    np.savez(data, x=np.arange(50, dtype=np.float32)[:, None])
    request = compress.Request(str(tmp_path / "model.onnx"), ("x86-cpu",), data, train=data)
    sources = compress.prepare(request).sources
    held_out = {float(sample.inputs["x"][0]) for sample in sources.held_out.samples()}
    assert len(held_out) == 10
    assert held_out.isdisjoint(float(sample.inputs["x"][0]) for sample in sources.train.samples())


def test_an_onnx_file_is_quantized_without_pruning(
    compressed: Compressed, tiny: TinyModel, forked: Forker, tmp_path: Path
) -> None:
    """An ONNX graph goes the same road without the stages that need modules."""
    whole = max(compressed.workdir.glob("artifacts/*/data/model.onnx"), key=lambda p: p.stat().st_size)
    shutil.copy(whole, tmp_path / "given.onnx")
    argv = tiny.compress_argv(
        tmp_path / "work", tmp_path / "out", model=tmp_path / "given.onnx", weights=None
    )
    result = forked.run(*argv, cwd=tiny.home)
    assert result.code in (0, 3), result.err
    document = result.json()
    jsonschema.validate(document, SCHEMA)
    assert document["chosen"]["precision"] == "int8"
    assert document["contract"]["size"] is None
    assert [stage["name"] for stage in document["stages"]] == [
        "export.original", "build.original", "quantize.int8", "build.int8", "verify.int8",
    ]  # fmt: skip


def _without_products(path: Path, *, parameters: bool) -> Path:
    """A graph that has nothing to compute in integers."""
    inputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])]
    weight = numpy_helper.from_array(np.linspace(1, 2, 8, dtype=np.float32), "w")
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["row"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["row", "w" if parameters else "row"], ["y"], name="scale"),
    ]
    graph = helper.make_graph(nodes, "maxima", inputs, outputs, [weight] if parameters else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("precision", "parameters", "refused"),
    [
        ("auto", True, ""),
        ("int8", True, "nothing in the model can be quantized"),
        ("auto", False, "has no parameters"),
    ],
)
def test_a_model_without_anything_to_quantize_stays_in_float(
    tiny: TinyModel, forked: Forker, tmp_path: Path, precision: str, parameters: bool, refused: str
) -> None:
    """``--precision auto`` does what is possible and says why INT8 is not; ``int8`` alone is refused."""
    given = _without_products(tmp_path / "given.onnx", parameters=parameters)
    argv = tiny.compress_argv(
        tmp_path / "work", tmp_path / "out", model=given, weights=None, precision=precision
    )
    result = forked.run(*argv, cwd=tiny.home)
    if refused:
        assert result.code == 2
        assert refused in result.err
        return
    assert result.code in (0, 3), result.err
    document = result.json()
    jsonschema.validate(document, SCHEMA)
    assert "nothing in the model can be quantized" in document["why"]["quantize.int8"]
    assert {candidate["precision"] for candidate in document["candidates"]} == {"fp16", "fp32"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No int8: nothing in the model can be quantized" in page
