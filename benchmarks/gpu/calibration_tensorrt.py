"""INT8 on a GPU by three routes, with TensorRT 8.5: its own calibrator, our cache, our Q/DQ graph.

    python3.8 benchmarks/gpu/calibration_tensorrt.py DIR [--json FILE]

DIR comes from ``calibration_prepare.py``. Needs tensorrt 8.5, pycuda and numpy only. All engines of a model
share one optimization profile and are timed in turn, by events on the stream; the error is against ONNX
Runtime's float outputs of the test samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pycuda.driver as cuda
import tensorrt as trt

BATCHES = (1, 8, 32)
ROUNDS = 200
WARM_UP = 30
CALIBRATION_BATCH = 8
ROUTES = ("fp16", "int8_tensorrt", "int8_cache", "int8_qdq")
LOGGER = trt.Logger(trt.Logger.WARNING)


class OwnCalibrator(trt.IInt8EntropyCalibrator2):
    """TensorRT's entropy calibration over the samples."""

    def __init__(self, samples: np.ndarray) -> None:
        super().__init__()
        self._samples = np.ascontiguousarray(samples)
        self._next = 0
        self._buffer = cuda.mem_alloc(self._samples[:CALIBRATION_BATCH].nbytes)

    def get_batch_size(self) -> int:
        return CALIBRATION_BATCH

    def get_batch(self, _names: List[str]) -> Any:
        if self._next + CALIBRATION_BATCH > len(self._samples):
            return None
        cuda.memcpy_htod(self._buffer, self._samples[self._next : self._next + CALIBRATION_BATCH])
        self._next += CALIBRATION_BATCH
        return [int(self._buffer)]

    def read_calibration_cache(self) -> None:
        return None

    def write_calibration_cache(self, _cache: Any) -> None:
        return None


class CacheCalibrator(trt.IInt8EntropyCalibrator2):
    """Hands over a cache that was written elsewhere; no sample is ever read."""

    def __init__(self, cache: bytes) -> None:
        super().__init__()
        self._cache = cache

    def get_batch_size(self) -> int:
        return CALIBRATION_BATCH

    def get_batch(self, _names: List[str]) -> Any:
        return None

    def read_calibration_cache(self) -> bytes:
        return self._cache

    def write_calibration_cache(self, _cache: Any) -> None:
        return None


class Runner:
    """An engine with device buffers for the largest batch."""

    def __init__(self, serialized: Any, image_shape: Tuple[int, ...], stream: Any) -> None:
        self._engine = trt.Runtime(LOGGER).deserialize_cuda_engine(serialized)
        self._context = self._engine.create_execution_context()
        self._image_shape = image_shape
        self._stream = stream
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        self._input = next(name for name in names if self._engine.get_tensor_mode(name) == mode)
        self._output = next(name for name in names if self._engine.get_tensor_mode(name) != mode)
        self._classes = self._engine.get_tensor_shape(self._output)[-1]
        self._device_input = cuda.mem_alloc(4 * max(BATCHES) * int(np.prod(image_shape)))
        self._device_output = cuda.mem_alloc(4 * max(BATCHES) * self._classes)
        self._context.set_tensor_address(self._input, int(self._device_input))
        self._context.set_tensor_address(self._output, int(self._device_output))

    def set_input(self, images: np.ndarray) -> None:
        cuda.memcpy_htod_async(self._device_input, np.ascontiguousarray(images), self._stream)
        self._context.set_input_shape(self._input, images.shape)

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError("execute_async_v3 failed")

    def outputs(self, rows: int) -> np.ndarray:
        result = np.full((rows, self._classes), np.nan, np.float32)
        cuda.memcpy_dtoh_async(result, self._device_output, self._stream)
        self._stream.synchronize()
        return result


def build(directory: Path, name: str, route: str, data: Dict[str, np.ndarray]) -> Any:
    """Build one engine; the profile is the same for all routes."""
    builder = trt.Builder(LOGGER)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
    parser = trt.OnnxParser(network, LOGGER)
    path = directory / (name + (".qdq.onnx" if route == "int8_qdq" else ".onnx"))
    if not parser.parse(path.read_bytes()):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 4 << 30)
    # cuDNN and cuBLAS are not installed; TensorRT's own kernels do without them.
    sources = trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    shape = tuple(data["tests"].shape[1:])
    config.add_optimization_profile(_profile(builder, network, shape, min(BATCHES), 8, max(BATCHES)))
    config.set_flag(trt.BuilderFlag.FP16)
    if route != "fp16":
        config.set_flag(trt.BuilderFlag.INT8)
    if route == "int8_tensorrt":
        config.int8_calibrator = OwnCalibrator(data["samples"])
    if route == "int8_cache":
        config.int8_calibrator = CacheCalibrator((directory / (name + ".cache")).read_bytes())
    if route in ("int8_tensorrt", "int8_cache"):
        size = CALIBRATION_BATCH
        config.set_calibration_profile(_profile(builder, network, shape, size, size, size))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RuntimeError("the build failed: " + route)
    return serialized


def _profile(builder: Any, network: Any, shape: Tuple[int, ...], least: int, usual: int, most: int) -> Any:
    profile = builder.create_optimization_profile()
    name = network.get_input(0).name
    profile.set_shape(name, (least, *shape), (usual, *shape), (most, *shape))
    return profile


def measure(directory: Path, name: str, stream: Any) -> Dict[str, Any]:
    """Build all routes of a model, check them, and time them in turn."""
    with np.load(str(directory / (name + ".npz"))) as stored:
        data = {key: stored[key] for key in stored.files}
    runners, figures = {}, {}  # type: Dict[str, Runner], Dict[str, Any]
    for route in ROUTES:
        begin = time.time()
        runners[route] = Runner(build(directory, name, route, data), data["tests"].shape[1:], stream)
        runners[route].set_input(data["tests"])
        runners[route].enqueue()
        got, want = runners[route].outputs(len(data["tests"])), data["reference"]
        figures[route] = {
            "build_s": round(time.time() - begin, 1),
            "relative_error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
            "top1_agreement": float((got.argmax(1) == want.argmax(1)).mean()),
            "p50_ms": {},
        }
        print(name, route, figures[route], flush=True)
    for batch in BATCHES:
        for route, milliseconds in _time(runners, data["tests"][:batch], stream).items():
            figures[route]["p50_ms"][str(batch)] = milliseconds
    return figures


def _time(runners: Dict[str, Runner], images: np.ndarray, stream: Any) -> Dict[str, float]:
    for runner in runners.values():
        runner.set_input(images)
        for _ in range(WARM_UP):
            runner.enqueue()
    stream.synchronize()
    times = {route: [] for route in runners}  # type: Dict[str, List[float]]
    begin, end = cuda.Event(), cuda.Event()
    for _ in range(ROUNDS):
        for route, runner in runners.items():
            begin.record(stream)
            runner.enqueue()
            end.record(stream)
            end.synchronize()
            times[route].append(end.time_since(begin))
    return {route: float(np.median(values)) for route, values in times.items()}


def main() -> None:
    """Measure every model in the directory and print one document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    try:
        stream = cuda.Stream()
        names = sorted(path.stem for path in options.directory.glob("*.npz"))
        figures = {name: measure(options.directory, name, stream) for name in names}
    finally:
        context.pop()
    document = {
        "name": "calibration_tensorrt",
        "figures": figures,
        "ratios": _ratios(figures),
        "runs": ROUNDS,
    }
    document["conditions"] = {
        "gpu": cuda.Device(0).name(),
        "tensorrt": trt.__version__,
        "python": platform.python_version(),
        "profile": [min(BATCHES), 8, max(BATCHES)],
    }
    text = json.dumps(document, indent=1)
    if options.json is not None:
        options.json.write_text(text)
    print(text)


def _ratios(figures: Dict[str, Any]) -> Dict[str, Any]:
    """Errors against TensorRT's own calibrator; the Q/DQ engine's time against the implicit engine's."""
    ratios = {}
    for name, routes in figures.items():
        implicit, qdq = routes["int8_cache"]["p50_ms"], routes["int8_qdq"]["p50_ms"]
        own = routes["int8_tensorrt"]["relative_error"]
        ratios[name] = {
            "error_cache_over_tensorrt": routes["int8_cache"]["relative_error"] / own,
            "error_qdq_over_tensorrt": routes["int8_qdq"]["relative_error"] / own,
            "time_qdq_over_implicit": {batch: qdq[batch] / implicit[batch] for batch in implicit},
            "time_qdq_over_fp16": {batch: qdq[batch] / routes["fp16"]["p50_ms"][batch] for batch in qdq},
            "time_implicit_over_fp16": {
                batch: implicit[batch] / routes["fp16"]["p50_ms"][batch] for batch in qdq
            },
        }
    return ratios


if __name__ == "__main__":
    main()
