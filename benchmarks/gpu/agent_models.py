"""The models of ``agent_prepare.py`` on the GPU machine: weights drawn again, bundles made. Python 3.8."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import onnxruntime

from device_agent.manifest import (
    MANIFEST_NAME,
    Contract,
    EngineBuild,
    EngineEntry,
    FileEntry,
    Golden,
    Manifest,
    ShapeRange,
    TensorSpec,
    Tolerance,
    dumps,
    read,
)

Array = np.ndarray
Arrays = Dict[str, Array]

MAX_BATCH = 32
ROWS = 8  # of the golden files
#: route -> precision, graph, whether the calibration cache goes with it.
ROUTES = {
    "fp32": ("fp32", "model.onnx", False),
    "fp16": ("fp16", "model.onnx", False),
    "int8_cache": ("int8", "model.onnx", True),
    "int8_qdq": ("int8", "qdq.onnx", False),
}
#: By precision, of an output's largest magnitude: what an engine may be off by.
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 2e-1}
_TYPES = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}


class Model:
    """One prepared model.

    Attributes:
        directory: with its graphs, whole.
        inputs: samples to test with, by name.
        inputs_specs, outputs_specs: as a manifest states them.
        references: ONNX Runtime's float outputs of the samples, by name.
        output, reference: the first of them.
    """

    def __init__(self, directory: Path) -> None:
        self.name = directory.name
        self.directory = directory
        session = _session(directory / "model.onnx")
        self.inputs = _samples(directory)
        self.inputs_specs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs_specs = tuple(_spec(node) for node in session.get_outputs())
        self.references = _run(session, self.inputs)
        self.output = self.outputs_specs[0].name
        self.reference = self.references[self.output]

    def simulated(self) -> Arrays:
        """ONNX Runtime's outputs of the Q/DQ graph: the integers computed on the CPU."""
        return _run(_session(self.directory / "qdq.onnx"), self.inputs)

    def batch(self, rows: int) -> Arrays:
        """That many samples, repeated where there are fewer."""
        return {name: np.take(array, range(rows), axis=0, mode="wrap") for name, array in self.inputs.items()}

    def shapes(self) -> Dict[str, ShapeRange]:
        """Of every input, for batches from 1 to the largest."""
        rows = (1, MAX_BATCH, MAX_BATCH)
        return {
            spec.name: ShapeRange(*((count, *spec.shape[1:]) for count in rows)) for spec in self.inputs_specs
        }

    def build(self, route: str) -> EngineBuild:
        """How an engine is built by a route."""
        precision, graph, with_cache = ROUTES[route]
        return EngineBuild(
            "tensorrt",
            graph,
            precision,
            shapes=self.shapes(),
            workspace_bytes=4 << 30,
            calibration_cache="model.cache" if with_cache else "",
            layer_precisions="precisions.json" if with_cache else "",
        )

    def bundle(self, directory: Path, route: str, **changes: Any) -> Path:
        """An unsigned bundle that lets the device build by a route."""
        shutil.rmtree(directory, ignore_errors=True)  # of an earlier call
        directory.mkdir(parents=True)
        build = self.build(route)
        for path in {"model.onnx", *build.paths}:
            (directory / path).write_bytes((self.directory / path).read_bytes())
        golden: Dict[str, Any] = {n: x[:ROWS] for n, x in self.inputs.items()}
        np.savez(str(directory / "golden_inputs.npz"), **golden)
        expected: Dict[str, Any] = {self.output: self.reference[:ROWS]}
        np.savez(str(directory / "golden_outputs.npz"), **expected)
        allowed = float(TOLERANCE[build.precision] * np.abs(self.reference).max())
        manifest = Manifest(
            schema=4,
            name=self.name,
            version=1,
            profile="gpu",
            architecture="x86_64",
            graph="model.onnx",
            precision="fp32",
            inputs=self.inputs_specs,
            outputs=self.outputs_specs,
            max_batch_size=MAX_BATCH,
            files=tuple(file_entry(path) for path in sorted(directory.iterdir())),
            engines=(),
            golden=Golden("golden_inputs.npz", "golden_outputs.npz", {self.output: Tolerance(allowed, 0.0)}),
            contract=Contract(),
            builds=(build,),
        )
        (directory / MANIFEST_NAME).write_bytes(dumps(replace(manifest, **changes)))
        return directory


def add_engine(bundle: Path, data: bytes, fingerprint: Dict[str, str]) -> Path:
    """Put an fp16 engine that claims this fingerprint into a bundle."""
    (bundle / "prebuilt.engine").write_bytes(data)
    manifest, _ = read(bundle)
    entry = EngineEntry("tensorrt", "prebuilt.engine", "fp16", fingerprint)
    files = (*manifest.files, file_entry(bundle / "prebuilt.engine"))
    (bundle / MANIFEST_NAME).write_bytes(dumps(replace(manifest, engines=(entry,), files=files)))
    return bundle


def unpack(source: Path, target: Path) -> None:
    """Copy a prepared model, with its weights; what an earlier call copied stays."""
    if target.exists():
        return
    target.mkdir(parents=True)
    weights = json.loads((source / "weights.json").read_text())
    for path in source.iterdir():
        data = bytearray(path.read_bytes())
        for at, dims, seed, deviation, kind in weights.get(path.name, []):
            count = int(np.prod(dims))
            drawn = np.random.RandomState(seed).standard_normal(count) * deviation
            raw = drawn.astype(np.float32).astype(kind).tobytes()
            data[at : at + len(raw)] = raw
        (target / path.name).write_bytes(bytes(data))


def error(got: Array, want: Array) -> Dict[str, float]:
    """How far outputs are from others: relative in the 2-norm, and the largest, of the largest magnitude."""
    return {
        "relative": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "largest": float(np.abs(got - want).max() / np.abs(want).max()),
        "top1_agreement": float((got.argmax(1) == want.argmax(1)).mean()),
    }


def worst_error(got: Arrays, want: Arrays) -> Dict[str, float]:
    """The error of the output that is furthest off."""
    return max((error(got[name], want[name]) for name in want), key=lambda found: found["largest"])


def _run(session: Any, inputs: Arrays) -> Arrays:
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


def _samples(directory: Path) -> Arrays:
    path = directory / "samples.npz"
    if not path.exists():  # images of noise, as the weights are
        return {"image": np.random.RandomState(1).standard_normal((32, 3, 224, 224)).astype(np.float32)}
    with np.load(str(path)) as stored:
        return {name: stored[name] for name in stored.files}


def _session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _spec(node: Any) -> TensorSpec:
    return TensorSpec(node.name, _TYPES[node.type], (-1, *(int(size) for size in node.shape[1:])))


def file_entry(path: Path) -> FileEntry:
    """Of a manifest."""
    data = path.read_bytes()
    return FileEntry(path.name, hashlib.sha256(data).hexdigest(), len(data))


def interleaved(rounds: int, runs: Dict[str, Tuple[Any, ...]]) -> Dict[str, Dict[str, float]]:
    """Time functions in turn: each entry is a function and its arguments; milliseconds."""
    import time

    for function, *arguments in runs.values():
        for _ in range(20):
            function(*arguments)
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (function, *arguments) in runs.items():
            begin_s = time.perf_counter()
            function(*arguments)
            times[name].append(1e3 * (time.perf_counter() - begin_s))
    return {
        name: {"p50_ms": float(np.median(values)), "p99_ms": float(np.quantile(values, 0.99))}
        for name, values in times.items()
    }
