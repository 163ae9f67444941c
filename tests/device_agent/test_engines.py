from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_testing import identity, linear, linear_bundle, session_of, write_bundle
from device_agent import engines, selftest
from device_agent.engines import onnxruntime as ort_engine
from device_agent.engines.base import EngineError, EngineSettings, InputError
from device_agent.engines.cuda import CudaError
from device_agent.errors import Missing, Refused
from device_agent.manifest import EngineEntry, Manifest
from device_agent.tensors import NUMPY_DTYPES, object_array

SETTINGS = EngineSettings(threads=1)


def _save(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("dtype", sorted(NUMPY_DTYPES))
def test_every_dtype_goes_through_the_engine_unchanged(tmp_path: Path, dtype: str) -> None:
    """What a client sends in any of the protocol's types reaches the graph and comes back bit for bit."""
    path = _save(tmp_path / "m.onnx", identity(dtype))
    if dtype == "BF16" and not ort_engine.CARRIES_BFLOAT16:
        with pytest.raises(Refused, match="BF16"):
            ort_engine.open_graph(path, SETTINGS)
        return
    engine = ort_engine.open_graph(path, SETTINGS)
    if dtype == "BYTES":
        x = object_array([b"", b"a", "gr\u00fc\u00df".encode(), b"b'a'", b"x\0", b"\0"], (2, 3))
    elif dtype == "BOOL":
        x = np.array([[True, False, True], [False, False, True]])
    else:
        x = np.arange(6).reshape(2, 3).astype(NUMPY_DTYPES[dtype])
    assert [spec.dtype for spec in engine.inputs + engine.outputs] == [dtype, dtype]
    y = engine.run({"x": x})["y"]
    assert y.dtype == x.dtype
    assert y.tolist() == x.tolist()
    engine.close()


def test_bytes_that_are_not_utf8_are_refused_not_garbled(tmp_path: Path) -> None:
    """The runtime cannot carry such strings, and the client is told so."""
    engine = ort_engine.open_graph(_save(tmp_path / "m.onnx", identity("BYTES")), SETTINGS)
    with pytest.raises(InputError, match="UTF-8"):
        engine.run({"x": object_array([b"\xff", b"", b""], (1, 3))})


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    """An engine's failure arrives as one line with the runtime's own reason."""
    engine = ort_engine.open_graph(_save(tmp_path / "m.onnx", linear()), SETTINGS)
    with pytest.raises(EngineError, match="x") as caught:
        engine.run({"x": np.zeros((1, 9), np.float32)})
    assert "\n" not in str(caught.value)


def test_the_gpu_is_used_where_package_and_driver_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CUDA provider and a driver: the GPU first, the CPU second; without either, the CPU alone.

    On the GPU kernels are chosen quickly when a batch of a new size comes.
    """
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    on_gpu = [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]
    for available, driver, expected in (
        (both, True, on_gpu),
        (both, False, both[1:]),
        (both[1:], True, both[1:]),
    ):
        monkeypatch.setattr(ort_engine.onnxruntime, "get_available_providers", lambda a=available: a)
        monkeypatch.setattr(ort_engine.cuda, "device", lambda d=driver: d or _no_driver())
        assert ort_engine._providers() == expected
        assert ort_engine.fingerprint()["provider"] == ("cuda" if expected == on_gpu else "cpu")


def _no_driver() -> None:
    raise CudaError("there is no CUDA driver")


def test_a_corrupt_graph_is_refused(tmp_path: Path) -> None:
    """A file that the runtime does not take is refused with its reason."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(Refused, match=r"does not load m\.onnx"):
        ort_engine.open_graph(path, SETTINGS)


# Choosing


def _with_engine(manifest: Manifest, runtime: str, **fingerprint: str) -> Manifest:
    return replace(manifest, engines=(EngineEntry(runtime, "model.onnx", "fp32", fingerprint),))


def test_the_portable_graph_serves_where_no_engine_fits(tmp_path: Path) -> None:
    """An engine for another runtime or another device is passed over, not an error."""
    bundle = linear_bundle(tmp_path / "b")
    for manifest in (
        _with_engine(bundle.manifest, "tensorrt", sm="72"),
        _with_engine(bundle.manifest, "onnxruntime", version="0.0.1"),
        _with_engine(bundle.manifest, "onnxruntime", unknown="key"),
    ):
        engine = engines.open_engine(bundle.directory, manifest, SETTINGS)
        assert engine.runtime == "onnxruntime"


def test_the_first_engine_that_fits_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are tried in the manifest's order, and an empty fingerprint fits everywhere."""
    bundle = linear_bundle(tmp_path / "b")
    opened = []
    real = ort_engine.open_graph
    monkeypatch.setattr(ort_engine, "open_graph", lambda p, s: opened.append(p.name) or real(p, s))
    (bundle.directory / "fast.onnx").write_bytes((bundle.directory / "model.onnx").read_bytes())
    entries = (
        EngineEntry("tensorrt", "t.plan", "fp16", {}),
        EngineEntry("onnxruntime", "fast.onnx", "fp32", {}),
        EngineEntry("onnxruntime", "model.onnx", "fp32", {}),
    )
    engines.open_engine(bundle.directory, replace(bundle.manifest, engines=entries), SETTINGS)
    assert opened == ["fast.onnx"]


def test_a_graph_that_is_not_its_manifests_is_refused(tmp_path: Path) -> None:
    """Names and types of the loaded model must be those that the manifest promises."""
    bundle = linear_bundle(tmp_path / "b")
    wrong = replace(bundle.manifest, inputs=(replace(bundle.manifest.inputs[0], name="image"),))
    with pytest.raises(Refused, match="not the model of its manifest"):
        engines.open_engine(bundle.directory, wrong, SETTINGS)


def test_a_runtime_that_is_absent_differs_from_one_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'Not installed' says what to install; 'installed but does not load' shows the loader's message."""
    (tmp_path / "absent_runtime.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "broken_runtime.py").write_text("raise ImportError('libcudart.so.11: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(engines.RUNTIMES, "absent", "absent_runtime")
    monkeypatch.setitem(engines.RUNTIMES, "broken", "broken_runtime")
    with pytest.raises(Missing, match="a_library_that_is_not_there"):
        engines.load_runtime("absent")
    with pytest.raises(Refused, match=r"libcudart\.so\.11"):
        engines.load_runtime("broken")
    with pytest.raises(Missing, match="cannot run magic engines"):
        engines.load_runtime("magic")
    sys.modules.pop("absent_runtime", None)


# The self-test


def _check(bundle: Any) -> selftest.SelfTest:
    engine = engines.open_engine(bundle.directory, bundle.manifest, SETTINGS)
    return selftest.check(engine, bundle.directory, bundle.manifest)


def test_the_selftest_passes_on_the_hosts_own_outputs(tmp_path: Path) -> None:
    """A bundle whose golden outputs are reproduced may serve; the worst error is reported."""
    result = _check(linear_bundle(tmp_path / "b"))
    assert result.worst_error == {"scores": 0.0}


def test_the_selftest_measures_the_error_within_tolerance(tmp_path: Path) -> None:
    """Differences below the tolerance pass and are stated."""
    x = np.ones((1, 8), np.float32)
    golden = session_of(linear()).run(None, {"x": x})[0] + np.float32(0.005)
    result = _check(write_bundle(tmp_path / "b", linear(), {"x": x}, {"scores": golden}, tolerance=0.01))
    assert 0.004 < result.worst_error["scores"] < 0.006


@pytest.mark.parametrize("wrong", [0.5, np.nan, np.inf])
def test_an_engine_that_computes_something_else_is_refused(tmp_path: Path, wrong: float) -> None:
    """One element beyond the tolerance, or not a number, is enough."""
    x = np.ones((2, 8), np.float32)
    golden = session_of(linear()).run(None, {"x": x})[0]
    golden[1, 2] += wrong
    bundle = write_bundle(tmp_path / "b", linear(), {"x": x}, {"scores": golden})
    with pytest.raises(Refused, match="differs in 1 of 8 elements"):
        _check(bundle)


def test_golden_sets_may_be_larger_than_a_batch(tmp_path: Path) -> None:
    """More golden rows than max_batch_size run in slices."""
    x = np.random.default_rng(0).standard_normal((7, 8)).astype(np.float32)
    result = _check(write_bundle(tmp_path / "b", linear(), {"x": x}, max_batch_size=3))
    assert result.worst_error["scores"] < 1e-5


def test_golden_strings_are_compared_exactly(tmp_path: Path) -> None:
    """BYTES have a form in the golden files that is no pickle."""
    text = {"x": np.array([["a", "gr\u00fc\u00df", ""]])}
    bundle = write_bundle(tmp_path / "s", identity("BYTES"), text, {"y": text["x"]})
    assert _check(bundle).worst_error == {"y": 0.0}
    wrong = write_bundle(tmp_path / "w", identity("BYTES"), text, {"y": np.array([["a", "b", ""]])})
    with pytest.raises(Refused, match="differs in 1 of 3"):
        _check(wrong)


@pytest.mark.skipif(not ort_engine.CARRIES_BFLOAT16, reason="this ONNX Runtime cannot take BF16")
def test_golden_bfloat16_is_compared_by_value(tmp_path: Path) -> None:
    """BF16 is stored as its bit patterns, and the tolerance applies to the numbers that they mean."""
    x = np.array([[0x3F80, 0x4000, 0xC000]], np.uint16)  # 1, 2, -2
    near = np.array([[0x3F81, 0x4000, 0xC000]], np.uint16)  # 1.0078125 in place of 1
    bundle = write_bundle(tmp_path / "f", identity("BF16"), {"x": x}, {"y": near}, tolerance=0.01)
    assert _check(bundle).worst_error == {"y": 0.0078125}


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        ({"other": np.zeros((2, 4), np.float32)}, "scores"),
        ({"scores": np.zeros((2, 4), np.float64)}, "float64"),
        ({"scores": np.zeros((2, 5), np.float32)}, "shape"),
        ({"scores": np.array([[{"a": 1}]], dtype=object)}, "allow_pickle"),
    ],
)
def test_golden_files_must_hold_what_the_manifest_says(tmp_path: Path, outputs: Any, why: str) -> None:
    """A missing array, another type or shape, or a pickle is refused with its reason."""
    bundle = write_bundle(tmp_path / "b", linear(), {"x": np.ones((2, 8), np.float32)}, outputs)
    with pytest.raises(Refused) as caught:
        _check(bundle)
    assert why in caught.value.why


def test_golden_files_cannot_exhaust_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that unpacks to more than the limit is refused before it is unpacked."""
    bundle = linear_bundle(tmp_path / "b")
    np.savez_compressed(bundle.directory / "golden_outputs.npz", scores=np.zeros((2**20, 4), np.float32))
    monkeypatch.setattr(selftest, "MAX_GOLDEN_BYTES", 2**20)
    with pytest.raises(Refused, match="the limit is 1048576"):
        _check(bundle)


def test_a_damaged_golden_file_is_refused(tmp_path: Path) -> None:
    """A file that is no archive gives a reason, not a traceback."""
    bundle = linear_bundle(tmp_path / "b")
    (bundle.directory / "golden_inputs.npz").write_bytes(b"PK\3\4 not really")
    with pytest.raises(Refused, match="cannot be used"):
        _check(bundle)
