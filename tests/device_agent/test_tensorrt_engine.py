"""The TensorRT engine against a recording double of TensorRT and CUDA; on a GPU, see benchmarks/gpu."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
from onnx import helper

from agent_testing import linear, make_model, session_of
from device_agent import engines
from device_agent.engines import cuda, tensorrt_libraries
from device_agent.engines.base import EngineError, EngineSettings, InputError
from device_agent.engines.source import EngineSource
from device_agent.engines.tensorrt_build import build_engine, describe_layers
from device_agent.engines.tensorrt_config import constrain
from device_agent.engines.tensorrt_settings import BuildError, BuildSettings
from device_agent.errors import Refused
from device_agent.manifest import TensorSpec

RECORDING = Path(__file__).parent / "recording"

Load = Callable[..., Any]


@pytest.fixture
def load_double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import the recording double as ``tensorrt``, behaving as the words say."""
    monkeypatch.syspath_prepend(str(RECORDING))
    monkeypatch.setattr(cuda, "device", cuda.device)  # which the double replaces

    def load(words: str = "") -> Any:
        monkeypatch.setenv("RECORDING_TENSORRT", words)
        for name in ("tensorrt", "device_agent.engines.tensorrt"):
            sys.modules.pop(name, None)
        return importlib.import_module("tensorrt")

    yield load
    for name in ("tensorrt", "device_agent.engines.tensorrt"):
        sys.modules.pop(name, None)


def _engine_file(trt: Any, path: Path, model: Any) -> Path:
    network = trt.Network()
    network.graph = model.SerializeToString()
    path.write_bytes(trt.Builder(trt.ILogger()).build_serialized_network(network, None))
    return path


def _open(trt: Any, path: Path, model: Any, **source: Any) -> Any:
    file = _engine_file(trt, path / "m.engine", model)
    return engines.open_here(EngineSource("tensorrt", str(file), **source), EngineSettings())


@pytest.mark.parametrize(
    ("version", "network", "flags"),
    [
        ("8.5.2.2", 1, {"FP16", "GPU_FALLBACK"}),
        ("10.3.0", 1, {"FP16", "GPU_FALLBACK"}),
        ("11.4.1", 2, {"GPU_FALLBACK"}),
    ],
)
def test_a_dla_is_asked_for_and_what_the_gpu_keeps_is_listed(
    load_double: Load, version: str, network: int, flags: set
) -> None:
    """Up to 10 flags give the DLA its precision, from 11 the graph's types; what it cannot run is named."""
    trt = load_double(f"version={version}")
    built = build_engine(trt, linear().SerializeToString(), BuildSettings("fp16", dla_core=1))
    assert built.not_on_dla == ("layer",)
    assert f"create_network({network})" in trt.calls
    assert {call for call in trt.calls if "set_flag" in call} == {
        f"config.set_flag({flag})" for flag in flags
    }
    assert "config.DLA_core = 1" in trt.calls
    assert trt.calls.index("config.default_device_type") < trt.calls.index("config.DLA_core = 1")


def test_a_dla_that_is_not_there_ends_the_build(load_double: Load) -> None:
    """TensorRT would take the GPU for all of it and say nothing."""
    with pytest.raises(BuildError, match="there is no DLA 2"):
        build_engine(load_double(), linear().SerializeToString(), BuildSettings("fp16", dla_core=2))


class _Layer:
    """A layer of one float output, which remembers what it is held to."""

    num_outputs = 1
    precision: Any = None

    def __init__(self, trt: Any, name: str, kind: Any) -> None:
        self.name, self.type, self.held = name, kind, []
        self._output = type("Tensor", (), {"dtype": trt.float32})()

    def get_output(self, number: int) -> Any:
        return self._output

    def set_output_type(self, number: int, kind: Any) -> None:
        self.held.append(kind)


@pytest.mark.parametrize("version", ["8.5.2.2", "8.6.1"])
def test_a_cast_is_not_held_to_a_precision(load_double: Load, version: str) -> None:
    """8.6 has casts as layers of their own, and builds no engine where one is held to another type."""
    trt = load_double(f"version={version}")
    kinds = {"product": trt.LayerType.OTHER, "shape": trt.LayerType.CONSTANT}
    if hasattr(trt.LayerType, "CAST"):
        kinds["cast"] = trt.LayerType.CAST
    layers = [_Layer(trt, name, kind) for name, kind in kinds.items()]
    network = type("Network", (), {"num_layers": len(layers), "get_layer": lambda self, i: layers[i]})()
    constrained = constrain(trt, network, trt.Config("config"), dict.fromkeys(kinds, "fp16"))
    assert constrained == 1
    assert {layer.name: layer.held for layer in layers if layer.held} == {"product": [trt.float16]}


def test_the_inspector_tells_types_of_an_engine_for_several_shapes(load_double: Load, tmp_path: Path) -> None:
    """It knows none before it is given shapes; without them an INT8 engine looks like any other."""
    trt = load_double()
    file = _engine_file(trt, tmp_path / "m.engine", linear())
    engine = trt.Runtime(trt.ILogger()).deserialize_cuda_engine(file.read_bytes())
    assert "FP32" in describe_layers(trt, engine)


@pytest.mark.parametrize(
    ("version", "sources", "alone"),
    [
        ("8.5.2.2", ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"), True),
        ("8.5.2.2", ("JIT_CONVOLUTIONS", "CUBLAS"), False),
        ("8.5.2.2", None, False),
        ("10.3.0", ("JIT_CONVOLUTIONS",), False),
    ],
)
def test_where_cublas_and_cudnn_are_missing_nothing_asks_for_them(
    load_double: Load, version: str, sources: Any, alone: bool
) -> None:
    """Kernels of theirs are not tried, and 8.5's core is told to do without; where one is, it is used."""
    trt = load_double(f"version={version}")
    build_engine(trt, linear().SerializeToString(), BuildSettings(tactic_sources=sources))
    said = " ".join(trt.calls)
    assert ("DISABLE_EXTERNAL_TACTIC_SOURCES" in said) == alone
    assert ("set_tactic_sources" in said) == (sources is not None)


@pytest.mark.parametrize("cuda_major", ["11", "12"])
def test_cublas_is_found_by_its_name_in_either_cuda(
    load_double: Load, monkeypatch: pytest.MonkeyPatch, cuda_major: str
) -> None:
    """JetPack 5 has cuBLAS 11, JetPack 6.0's TensorRT 8.6 cuBLAS 12: its kernels are tried on both."""
    version = type("Version", (), {"__call__": lambda self: 120_000})
    library = type("Library", (), {"cublasGetCudartVersion": version(), "cublasLtGetVersion": version()})

    def load(name: str) -> Any:
        if name not in (f"libcublas.so.{cuda_major}", f"libcublasLt.so.{cuda_major}"):
            raise OSError(f"{name}: cannot open shared object file")
        return library()

    trt = load_double("version=8.6.2")
    monkeypatch.setattr(tensorrt_libraries.ctypes, "CDLL", load)
    own = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
    assert tensorrt_libraries.tactic_sources(trt) == (*own, "CUBLAS", "CUBLAS_LT")


@pytest.mark.parametrize("words", ["", "no-graphs", "integrated"])
def test_outputs_are_those_of_the_graph_whatever_shapes_alternate(
    load_double: Load, tmp_path: Path, words: str
) -> None:
    """Batches of changing size are computed right: without CUDA graphs, with them, and without copies."""
    trt = load_double(words)
    engine, reference = _open(trt, tmp_path, linear()), session_of(linear())
    rng = np.random.default_rng(0)
    for rows in (1, 8, 1, 3, 8, 3, 1, 8, 8):
        x = rng.standard_normal((rows, 8)).astype(np.float32)
        np.testing.assert_allclose(
            engine.run({"x": x})["scores"], reference.run(None, {"x": x})[0], rtol=1e-6, atol=1e-6
        )
    assert ("launch" in trt.calls) == (words != "no-graphs")
    assert ("copy_in" in trt.calls) == (words != "integrated")
    engine.close()
    assert trt.DEVICE.held == {}


def test_a_shape_that_comes_again_is_one_launch(load_double: Load, tmp_path: Path) -> None:
    """From the second run of a shape on, the copies and the layers go to the GPU in a single call."""
    trt = load_double()
    engine = _open(trt, tmp_path, linear())
    x = np.zeros((2, 8), np.float32)
    for _ in range(2):
        engine.run({"x": x})
    trt.calls.clear()
    engine.run({"x": x})
    assert trt.calls == ["launch", "synchronize"]
    engine.close()


def test_outputs_do_not_change_with_the_next_run(load_double: Load, tmp_path: Path) -> None:
    """What a run returned stays as it is while the buffers are used again."""
    engine = _open(load_double(), tmp_path, linear())
    first = engine.run({"x": np.ones((2, 8), np.float32)})["scores"]
    before = first.copy()
    engine.run({"x": np.full((2, 8), -9, np.float32)})
    assert (first == before).all()
    engine.close()


def test_a_batch_that_the_engine_was_not_built_for_is_an_error_of_that_run(
    load_double: Load, tmp_path: Path
) -> None:
    """The next run of a shape that fits works."""
    engine = _open(load_double(), tmp_path, linear())
    with pytest.raises(EngineError, match=r"\[9, 8\]"):
        engine.run({"x": np.zeros((9, 8), np.float32)})
    assert engine.run({"x": np.zeros((8, 8), np.float32)})["scores"].shape == (8, 4)
    engine.close()


def test_an_output_whose_size_the_data_decides(load_double: Load, tmp_path: Path) -> None:
    """Such an output comes back in its own size, run after run."""
    model = make_model(
        [
            helper.make_node("Sub", ["x", "x"], ["zero"]),
            helper.make_node("Greater", ["x", "zero"], ["positive"]),
            helper.make_node("Compress", ["x", "positive"], ["y"], axis=0),
        ],
        [TensorSpec("x", "FP32", (8,))],
        [TensorSpec("y", "FP32", (-1,))],
    )
    model.graph.name = "data-dependent"
    trt = load_double()
    engine = _open(trt, tmp_path, model)
    for x in ([1, -1, 2, -2, 3, -3, 4, -4], [-1] * 8, list(range(1, 9))):
        y = engine.run({"x": np.array(x, np.float32)})["y"]
        assert y.tolist() == [value for value in x if value > 0]
    engine.close()
    assert trt.DEVICE.held == {}


def test_clients_keep_their_int64(load_double: Load, tmp_path: Path) -> None:
    """TensorRT 8 computes in 32 bits: clients see 64, and a value that does not fit is refused."""
    model = make_model(
        [helper.make_node("Add", ["ids", "ids"], ["twice"])],
        [TensorSpec("ids", "INT64", (-1, 4))],
        [TensorSpec("twice", "INT64", (-1, 4))],
    )
    engine = _open(load_double(), tmp_path, model, wide=("ids", "twice"))
    assert [spec.dtype for spec in engine.inputs + engine.outputs] == ["INT64", "INT64"]
    twice = engine.run({"ids": np.array([[1, -2, 3, 0]])})["twice"]
    assert twice.dtype == np.int64
    assert twice.tolist() == [[2, -4, 6, 0]]
    with pytest.raises(InputError, match="32 bits"):
        engine.run({"ids": np.array([[2**31, 0, 0, 0]])})
    engine.close()


@pytest.mark.parametrize(
    ("built", "here", "reason"),
    [
        ("sm=87", "sm=72", "sm is 87, expected 72"),
        ("version=8.6.1", "version=8.5.2.2", r"tensorrt is 8\.6\.1"),
        ("", "no-memory", "out of memory"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_in_one_line(
    load_double: Load, tmp_path: Path, built: str, here: str, reason: str
) -> None:
    """Another GPU, another TensorRT, too little memory: the reason is TensorRT's or CUDA's own."""
    file = _engine_file(load_double(built), tmp_path / "m.engine", linear())
    load_double(here)
    with pytest.raises(Refused, match=reason) as refused:
        engines.open_here(EngineSource("tensorrt", str(file)), EngineSettings())
    assert "\n" not in refused.value.why


def test_a_truncated_engine_is_refused(load_double: Load, tmp_path: Path) -> None:
    """Half an engine does not load, and neither does an empty one."""
    file = _engine_file(load_double(), tmp_path / "m.engine", linear())
    data = file.read_bytes()
    for size in (0, 10, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(Refused, match="does not load"):
            engines.open_here(EngineSource("tensorrt", str(file)), EngineSettings())


def test_a_fingerprint_is_held_against_the_device(load_double: Load, tmp_path: Path) -> None:
    """An engine for another architecture is refused before TensorRT sees it."""
    trt = load_double("sm=72")
    trt.calls.clear()
    with pytest.raises(Refused, match="sm 87, this device has 72"):
        _open(trt, tmp_path, linear(), fingerprint={"sm": "87"})
    assert engines.load_runtime("tensorrt").fingerprint() == {
        "sm": "72",
        "tensorrt": "8.5.2.2",
        "cuda": "11.4",
        "driver": "R35.4.1",
    }


def test_without_a_gpu_the_runtime_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real driver interface, on a machine that has no driver."""
    monkeypatch.setattr("ctypes.CDLL", _no_library)
    cuda.device.cache_clear()
    with pytest.raises(cuda.CudaError, match="no CUDA driver"):
        cuda.device()


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")
