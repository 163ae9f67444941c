"""The agent's TensorRT engine on a GPU, with the TensorRT and the Python of JetPack 5.1 (8.5.2, 3.8).

    python3.8 benchmarks/gpu/agent_tensorrt.py MODELS --json FILE [--only SECTION ...] [--quick]
        [--build MODEL.ROUTE ...] [--work DIR]

MODELS comes from ``agent_prepare.py``. Needs the agent's own dependencies, tensorrt 8.5 and pycuda. Engines
are kept in DIR; --build makes some before the sections, so that several GPUs can share the builds. Sections,
each of which writes FILE again when it is done:

    engines    every model by every route: build time, error against ONNX Runtime's float outputs, against
               the simulator for int8, whether it is within the tolerance
    latency    a run of the agent's engine against a bare loop of copies and ``execute_async_v3`` (pycuda)
    serving    requests a second over HTTP at the same p99, with and without dynamic batching
    attacks    engines that do not fit, no memory, a build that is killed: what serves, and what is said
    pruning    ResNet-50: the same, and its time on the GPU against that of its pruned and ragged versions
    normalization   the text encoder with its LayerNormalization, which needs TensorRT 8.6 (and no pycuda),
               beside the same encoder in the operators that 8.5 has; only where it is asked for
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import tensorrt as trt  # noqa: E402

from agent_models import ROUTES, TOLERANCE, Arrays, Model, add_engine, interleaved, unpack, worst_error  # noqa: E402
from device_agent.building import process  # noqa: E402
from device_agent.engines import cuda, open_here  # noqa: E402
from device_agent.engines.base import EngineError, EngineSettings  # noqa: E402
from device_agent.engines.source import EngineSource  # noqa: E402
from device_agent.engines.tensorrt_build import describe_layers  # noqa: E402
from device_agent.errors import AgentError  # noqa: E402

BATCHES = (1, 8, 32)
_SERVED = ("digits", "detector", "encoder")
#: Only these models by these routes: a build of ResNet-50 takes a minute or two.
OF_ROUTE = {
    "fp32": ("digits", "detector", "normalized"),
    "int8_qdq": ("digits", "encoder", "detector", "normalized"),
}


class Bench:
    """What the sections share.

    Attributes:
        models: by name.
        engines: files by (model, route).
        work: a directory for whatever is made.
        quick: fewer rounds.
    """

    def __init__(self, source: Path, work: Path, quick: bool) -> None:
        self.work, self.quick = work, quick
        self.models: Dict[str, Model] = {}
        self.nonzero = source / "nonzero.onnx"
        for path in sorted(path for path in source.iterdir() if path.is_dir()):
            unpack(path, work / "models" / path.name)
            self.models[path.name] = Model(work / "models" / path.name)

    def engine_file(self, name: str, route: str) -> Path:
        """Build as the agent does, in its build process; once."""
        path = self.work / f"{name}.{route}.engine"
        if path.exists():
            return path
        job = self.job(name, route)
        began_s = time.monotonic()
        limits = process.Limits(900.0, lambda: None)
        about = process.run(job, limits, lambda message: None, threading.Event())
        built = {
            "build_s": round(time.monotonic() - began_s, 1),
            "layers": about["layers"],
            "constrained": about["constrained"],
            "engine_mb": round(path.stat().st_size / 1e6, 1),
            "int8_layers": _int8_layers(path),
        }
        path.with_suffix(".json").write_text(json.dumps(built))
        print(name, route, built, flush=True)
        return path

    def built(self, name: str, route: str) -> Dict[str, Any]:
        """How that build went."""
        found: Dict[str, Any] = json.loads(self.engine_file(name, route).with_suffix(".json").read_text())
        return found

    def job(self, name: str, route: str) -> Dict[str, Any]:
        """What the build process is told."""
        model = self.models[name]
        build = model.build(route)
        below = model.directory
        return {
            "runtime": "tensorrt",
            "graph": str(below / build.graph),
            "precision": build.precision,
            "shapes": {key: [s.least, s.usual, s.most] for key, s in build.shapes.items()},
            "workspace_bytes": build.workspace_bytes,
            "calibration_cache": str(below / build.calibration_cache) if build.calibration_cache else "",
            "layer_precisions": str(below / build.layer_precisions) if build.layer_precisions else "",
            "dla_core": None,
            "sm": cuda.device().sm,
            "timing_cache": str(self.work / "timing.cache"),
            "engine": str(self.work / f"{name}.{route}.engine"),
        }

    def open(self, name: str, route: str) -> Any:
        """The agent's engine of a model."""
        wide = tuple(s.name for s in self.models[name].inputs_specs if s.dtype == "INT64")
        source = EngineSource("tensorrt", str(self.engine_file(name, route)), wide=wide)
        return open_here(source, EngineSettings())

    @property
    def rounds(self) -> int:
        """How often a time is measured."""
        return 50 if self.quick else 300


def _int8_layers(path: Path) -> str:
    """How many of an engine's layers take integers, as TensorRT's inspector tells."""
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    layers = json.loads(describe_layers(trt, engine))["Layers"]
    inputs = [json.dumps(layer["Inputs"]) for layer in layers if isinstance(layer, dict)]
    return f"{sum('INT8' in text.upper() for text in inputs)} of {len(layers)}"


def engines(bench: Bench) -> Dict[str, Any]:
    """Every model by every route."""
    figures: Dict[str, Any] = {"data_dependent_output": _nonzero(bench)}
    return {**figures, **_outputs(bench, [name for name in _SERVED if name in bench.models])}


def _outputs(bench: Bench, names: Sequence[str]) -> Dict[str, Any]:
    figures: Dict[str, Any] = {}
    for name in names:
        model = bench.models[name]
        figures[name] = {}
        outputs: Dict[str, Arrays] = {}
        for route in ROUTES:
            if name not in OF_ROUTE.get(route, bench.models):
                continue
            try:
                engine = bench.open(name, route)
                outputs[route] = got = engine.run(model.inputs)
                again = engine.run(model.inputs)
                small = engine.run(model.batch(3))
                once_more = engine.run(model.inputs)
            except Exception as failure:  # the next route may work
                figures[name][route] = {"failed": str(failure)[:2000]}
                print(name, route, figures[name][route], flush=True)
                continue
            found = worst_error(got, model.references)
            figures[name][route] = {
                **bench.built(name, route),
                **found,
                "within_tolerance": found["largest"] <= TOLERANCE[ROUTES[route][0]],
                "graph_equals_plain": all(
                    bool((got[key] == again[key]).all() and (got[key] == once_more[key]).all()) for key in got
                ),
                "batch_3_error": worst_error(small, _first_rows(model.references, 3))["relative"],
            }
            engine.close()
            print(name, route, figures[name][route], flush=True)
        if {"int8_cache", "int8_qdq"} <= set(outputs):
            simulated = model.simulated()
            figures[name]["int8_routes"] = {
                "simulator_against_float": worst_error(simulated, model.references),
                "qdq_against_simulator": worst_error(outputs["int8_qdq"], simulated),
                "cache_against_simulator": worst_error(outputs["int8_cache"], simulated),
                "cache_against_qdq": worst_error(outputs["int8_cache"], outputs["int8_qdq"]),
            }
            print(name, figures[name]["int8_routes"], flush=True)
    return figures


def _first_rows(arrays: Arrays, rows: int) -> Arrays:
    return {name: array[:rows] for name, array in arrays.items()}


def _nonzero(bench: Bench) -> Dict[str, Any]:
    """An output that grows and shrinks with the data."""
    path = bench.work / "nonzero.engine"
    job = {
        **bench.job("digits", "fp32"),
        "graph": str(bench.nonzero),
        "shapes": {"x": [[8]] * 3},
        "engine": str(path),
    }
    try:  # 8.5 builds no output of unknown size without a profile, not even of inputs that never change
        process.run(job, process.Limits(300.0, lambda: None), lambda message: None, threading.Event())
        engine = open_here(EngineSource("tensorrt", str(path), wide=("where",)), EngineSettings())
        rows = ([1, 0, 2, 0, 0, 0, 0, 3], [0] * 8, [1] * 8, [0] * 7 + [1])
        right = []
        for row in rows:
            x = np.array(row, np.float32)
            right.append(engine.run({"x": x})["where"].tolist() == [np.flatnonzero(x).tolist()])
        engine.close()
        return {"right": right}
    except (AgentError, EngineError) as failure:  # what TensorRT does not take is the finding
        return {"failed": f"{type(failure).__name__}: {failure}"[:500]}


def latency(bench: Bench) -> Dict[str, Any]:
    """The agent's engine against a bare loop, in turn."""
    return _latency(
        bench,
        [
            (name, route)
            for name in _SERVED
            if name in bench.models
            for route in ("fp16", "int8_cache", "int8_qdq")
        ],
    )


def _latency(bench: Bench, pairs: Sequence[Tuple[str, str]]) -> Dict[str, Any]:
    from agent_bare import Bare

    figures: Dict[str, Any] = {}
    for name, route in pairs:
        try:
            engine = bench.open(name, route)
        except AgentError as failure:  # the next may build
            figures[f"{name} {route}"] = {"failed": str(failure)[:500]}
            continue
        bare = Bare(bench.engine_file(name, route))
        for rows in BATCHES:
            inputs = bench.models[name].batch(rows)
            timed = interleaved(bench.rounds, {"agent": (engine.run, inputs), "bare": (bare.run, inputs)})
            timed["ratio_p50"] = timed["agent"]["p50_ms"] / timed["bare"]["p50_ms"]  # type: ignore[assignment]
            figures[f"{name} {route} batch {rows}"] = timed
            print(name, route, rows, timed, flush=True)
        bare.close()
        engine.close()
    return figures


def pruning(bench: Bench) -> Dict[str, Any]:
    """ResNet-50: its outputs and latency; then the time on the GPU alone, by events, of all three."""
    from agent_bare import Bare

    figures: Dict[str, Any] = _outputs(bench, ("resnet50",))
    figures["latency"] = _latency(bench, (("resnet50", "fp16"), ("resnet50", "int8_cache")))
    names = [name for name in ("resnet50", "pruned", "ragged") if name in bench.models]
    for route in ("fp16", "int8_cache"):
        bares = {name: Bare(bench.engine_file(name, route)) for name in names}
        for rows in (1, 32):
            for name, bare in bares.items():
                bare.run(bench.models[name].batch(rows))
            times: Dict[str, List[float]] = {name: [] for name in names}
            for _ in range(bench.rounds):
                for name, bare in bares.items():
                    times[name].append(bare.timed())
            p50 = {name: float(np.median(values)) for name, values in times.items()}
            figures[f"{route} batch {rows}"] = {
                "p50_ms": p50,
                "speedup_pruned": p50["resnet50"] / p50["pruned"],
                "speedup_ragged": p50["resnet50"] / p50["ragged"],
            }
            print(route, rows, figures[f"{route} batch {rows}"], flush=True)
        for bare in bares.values():
            bare.close()
    return figures


def normalization(bench: Bench) -> Dict[str, Any]:
    """One operator or many: the outputs, and whole runs of both in turn."""
    figures: Dict[str, Any] = _outputs(bench, ("normalized",))
    pair = {name: bench.open(name, "fp16") for name in ("normalized", "encoder")}
    for rows in BATCHES:
        inputs = bench.models["encoder"].batch(rows)
        timed = interleaved(bench.rounds, {name: (engine.run, inputs) for name, engine in pair.items()})
        figures[f"fp16 batch {rows}"] = timed
        print(rows, timed, flush=True)
    for engine in pair.values():
        engine.close()
    return figures


def attacks(bench: Bench) -> Dict[str, Any]:
    """What does not fit, and what is said of it."""
    from agent_attacks import run

    return run(bench)


def serving(bench: Bench) -> Dict[str, Any]:
    """Dynamic batching over HTTP."""
    from agent_process import Agent
    from agent_serving import run

    model = bench.models["deep"]
    engine = bench.engine_file("deep", "fp16").read_bytes()

    def start(root: Path, **changes: Any) -> Agent:
        bundle = model.bundle(root / "bundle", "fp16", **changes)
        agent = Agent(root).start()
        agent.install(add_engine(bundle, engine, {"sm": cuda.device().sm}))
        if agent.status()["engine"]["runtime"] != "tensorrt":
            raise RuntimeError(f"the engine does not serve: {agent.status()}")
        return agent

    return run(start, model.inputs, bench.work / "serving", bench.quick)


SECTIONS = {f.__name__: f for f in (engines, latency, serving, attacks, pruning, normalization)}


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS)[:-1])
    parser.add_argument("--build", nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path("agent-tensorrt-work"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    gpu = cuda.device()
    document: Dict[str, Any] = {
        "name": "agent_tensorrt",
        "claim": "the agent serves TensorRT engines as fast as a bare loop, and says why where it cannot",
        "figures": {},
        "seconds": {},
        "conditions": {
            "gpu": gpu.name,
            "sm": gpu.sm,
            "driver": gpu.driver,
            "cuda_of_driver": gpu.cuda,
            "tensorrt": trt.__version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
    }
    options.work.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    bench = Bench(options.models, options.work.resolve(), options.quick)
    document["runs"] = bench.rounds
    document["seconds"]["models"] = round(time.monotonic() - began_s, 1)
    for wanted in options.build:
        try:
            bench.engine_file(*wanted.split("."))
        except AgentError as failure:  # the section that wants it says so again
            print(wanted, failure, flush=True)
    for name in options.only:
        began_s = time.monotonic()
        try:
            document["figures"][name] = SECTIONS[name](bench)
        except Exception:
            document["figures"][name] = {"failed": traceback.format_exc()[-2000:]}
            print(document["figures"][name]["failed"], flush=True)
        document["seconds"][name] = round(time.monotonic() - began_s, 1)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document["seconds"]))


if __name__ == "__main__":
    main()
