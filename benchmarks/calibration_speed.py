"""Calibrating ResNet-50 at 224 pixels: memory and time beside onnxruntime's own calibrators.

python benchmarks/calibration_speed.py [--json] [--quick]

Each measurement is a process of its own, so that its peak memory is its own. Both tools calibrate the
same prepared graph on the same images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import document, finish, parse_options

PIXELS = 224
ROUNDS = 3


def main() -> None:
    """Measure both tools in turn, then ours alone on more images than the other has memory for."""
    options = parse_options(__doc__)
    few, many, rounds = (4, 16, 1) if options.quick else (16, 64, ROUNDS)
    flat_from, flat_to = (8, 48) if options.quick else (32, 2048)
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        graph = Path(temporary) / "resnet50.onnx"
        _export(graph)
        runs = [_round(graph, few, many) for _ in range(rounds)]
        flat = [_measure(graph, "ours", "entropy", count) for count in (flat_from, flat_to)]
    figures: dict[str, Any] = {"images": many}
    for observer in ("minmax", "entropy"):
        figures.update(_compared(runs, observer, few, many))
    figures[f"entropy_growth_{flat_from}_to_{flat_to}_mib"] = flat[1]["peak_mib"] - flat[0]["peak_mib"]
    figures[f"entropy_ms_an_image_at_{flat_to}"] = 1000 * flat[1]["seconds"] / flat_to
    claim = (
        f"memory stays flat from {flat_from} to {flat_to} images; entropy is at least 5 times "
        f"as fast as onnxruntime's at {many}, and min-max no slower"
    )
    targets = {
        f"entropy_growth_{flat_from}_to_{flat_to}_mib": ("<=", 64.0),
        "minmax_ours_growth_mib": ("<=", 64.0),
        "minmax_speedup": (">=", 1.0),
        "entropy_speedup": (">=", 5.0),
    }
    finish(document("calibration", claim, figures, targets, rounds), options.json)


def _round(graph: Path, few: int, many: int) -> dict[tuple[str, str, int], dict[str, float]]:
    """Each tool with each observer on few and many images, in turn."""
    return {
        (tool, observer, count): _measure(graph, tool, observer, count)
        for observer in ("minmax", "entropy")
        for count in (few, many)
        for tool in ("ours", "onnxruntime")
    }


def _compared(
    runs: list[dict[tuple[str, str, int], dict[str, float]]], observer: str, few: int, many: int
) -> dict[str, float]:
    """Medians over the rounds: seconds, growth of the peak memory, and how many times as fast ours is."""
    figures = {}
    for tool in ("ours", "onnxruntime"):
        seconds = [run[tool, observer, many]["seconds"] for run in runs]
        growth = [
            run[tool, observer, many]["peak_mib"] - run[tool, observer, few]["peak_mib"] for run in runs
        ]
        figures[f"{observer}_{tool}_seconds"] = median(seconds)
        figures[f"{observer}_{tool}_growth_mib"] = median(growth)
    figures[f"{observer}_speedup"] = median(
        run["onnxruntime", observer, many]["seconds"] / run["ours", observer, many]["seconds"] for run in runs
    )
    return figures


def _export(path: Path) -> None:
    """ResNet-50 with random weights, its BatchNormalization settled on one batch."""
    import onnx
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification

    from calibration import prepare

    torch.manual_seed(0)
    config = ResNetConfig()
    config.num_labels = 1000
    model = ResNetForImageClassification(config)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average, so that one batch settles it
    example = torch.randn(4, 3, PIXELS, PIXELS)
    with torch.no_grad():
        model.train()(example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.train(False), (example[:2],), dynamo=True, verbose=False, input_names=["image"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), opset_version=18,
        )  # fmt: skip
    assert program is not None
    onnx.save(prepare(program.model_proto), str(path))


def _measure(graph: Path, tool: str, observer: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(graph), tool, observer, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(graph: Path, tool: str, observer: str, count: int) -> None:
    """Calibrate in this process, and print how long it took and how much memory it had at most."""
    calibrate = {"ours": _ours, "onnxruntime": _onnxruntime}[tool]
    start = time.perf_counter()
    calibrate(graph, observer, count)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mib": _peak_mib()}))


def _peak_mib() -> float:
    """Peak resident memory since this program started (getrusage would count the parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def _images(count: int) -> Iterator[dict[str, np.ndarray]]:
    for i in range(count):
        noise = np.random.default_rng(i).standard_normal((1, 3, PIXELS, PIXELS), dtype=np.float32)
        yield {"image": noise}


def _ours(graph: Path, observer: str, count: int) -> None:
    import onnx

    from calibration import calibrate

    calibrate(onnx.load(str(graph)), _images(count), observer=observer)


def _onnxruntime(graph: Path, observer: str, count: int) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # of a library without types
        def __init__(self) -> None:
            self.images = _images(count)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    method = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[observer]
    with tempfile.TemporaryDirectory() as temporary:
        calibrator = create_calibrator(
            str(graph), ["Conv", "Gemm"], str(Path(temporary) / "augmented.onnx"), method
        )
        calibrator.set_execution_providers(["CPUExecutionProvider"])
        calibrator.collect_data(Reader())
        calibrator.compute_data()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
