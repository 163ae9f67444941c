"""ONNX Runtime's CUDA provider through the agent's own engine: what one would serve with without TensorRT.

Beside it, the same session bound to memory on the GPU, which turned out to be slower for tensors that come
from the host and go back there. Then, as ``agent_tensorrt.py`` does, the requests a second that the agent
answers with dynamic batching and without.

    python3 benchmarks/gpu/agent_onnxruntime.py MODELS --json FILE [--only NAME ...]

MODELS comes from ``agent_prepare.py``. Needs onnxruntime-gpu with its CUDA and cuDNN, which the agent
finds by ``LD_LIBRARY_PATH``; any Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

from agent_models import Model, interleaved, unpack, worst_error  # noqa: E402
from agent_process import Agent  # noqa: E402
from device_agent.engines import onnxruntime as runtime  # noqa: E402
from device_agent.engines.base import EngineSettings  # noqa: E402

BATCHES = (1, 8, 32)


def main() -> None:
    """Time every model in float and in half precision, bound and through plain ``run``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("agent-onnxruntime-work"))
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    figures: Dict[str, Any] = {}
    for path in sorted(path for path in options.models.iterdir() if path.is_dir()):
        if options.only and path.name not in options.only:
            continue
        directory = options.work / path.name
        unpack(path, directory)
        model = Model(directory)
        for precision, graph in (("fp32", "model.onnx"), ("fp16", "half.onnx")):
            figures[f"{path.name} {precision}"] = _figures(model, directory / graph, options.rounds)
            print(path.name, precision, figures[f"{path.name} {precision}"], flush=True)
            options.json.write_text(json.dumps(_document(figures, options.rounds), indent=1))
        if path.name == "deep":
            figures["serving"] = _serving(model, options.work.resolve() / "serving")
            options.json.write_text(json.dumps(_document(figures, options.rounds), indent=1))


def _serving(model: Model, work: Path) -> Dict[str, Any]:
    """Dynamic batching over HTTP, of the graph in half precision."""
    from agent_serving import run

    half = (model.directory / "half.onnx").read_bytes()
    (model.directory / "model.onnx").write_bytes(half)  # what a bundle is made of; the reference is float

    def start(root: Path, **changes: Any) -> Agent:
        agent = Agent(root).start()
        agent.install(model.bundle(root / "bundle", "fp16", builds=(), **changes))
        print(agent.status()["engine"], flush=True)
        return agent

    return run(start, model.inputs, work, quick=False)


def _figures(model: Model, graph: Path, rounds: int) -> Dict[str, Any]:
    engine = runtime.open_graph(graph, EngineSettings())
    session = onnxruntime.InferenceSession(str(graph), providers=["CUDAExecutionProvider"])
    bound = BoundRuns(session, list(model.inputs), list(model.references))
    found: Dict[str, Any] = {
        "providers": session.get_providers(),
        **worst_error(engine.run(model.inputs), model.references),
    }
    for rows in BATCHES:
        inputs = model.batch(rows)
        timed = interleaved(rounds, {"agent": (engine.run, inputs), "bound": (bound.run, inputs)})
        found[f"batch {rows}"] = {
            **{name: values["p50_ms"] for name, values in timed.items()},
            "bound_over_agent": timed["bound"]["p50_ms"] / timed["agent"]["p50_ms"],
        }
    engine.close()
    return found


_DEVICE = ("cuda", 0)


class BoundRuns:
    """Runs a session by I/O binding.

    Args:
        session: with the CUDA provider.
        inputs: names, in any order.
        outputs: names.
    """

    def __init__(self, session: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._session = session
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._places: Dict[Tuple[Tuple[int, ...], ...], Dict[str, Any]] = {}

    def run(self, feeds: Dict[str, np.ndarray]) -> List[np.ndarray]:
        """Compute the outputs, in their order."""
        binding = self._session.io_binding()
        for name, value in self._placed(feeds).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, *_DEVICE)
        self._session.run_with_iobinding(binding)
        outputs: List[np.ndarray] = binding.copy_outputs_to_cpu()
        return outputs

    def _placed(self, feeds: Dict[str, np.ndarray]) -> Dict[str, Any]:
        """The inputs on the GPU."""
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self._inputs}
        shapes = tuple(arrays[name].shape for name in self._inputs)
        places = self._places.get(shapes)
        if places is None:
            make = onnxruntime.OrtValue.ortvalue_from_numpy
            places = {name: make(array, *_DEVICE) for name, array in arrays.items()}
            self._places[shapes] = places
        else:
            for name, array in arrays.items():
                places[name].update_inplace(array)
        return places


def _document(figures: Dict[str, Any], rounds: int) -> Dict[str, Any]:
    return {
        "name": "agent_onnxruntime",
        "claim": "ONNX Runtime's CUDA provider, as an alternative to TensorRT",
        "figures": figures,
        "runs": rounds,
        "conditions": {
            "onnxruntime": onnxruntime.__version__,
            "fingerprint": dict(runtime.fingerprint()),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        },
    }


if __name__ == "__main__":
    main()
