"""Calibrating and quantizing a model over 2 GB, more than a protobuf message holds, from its files.

python benchmarks/calibration_large.py [--json] [--quick]

The model is a chain of 4096 x 4096 products with random weights, 2.4 GB in all; with --quick it is
a tenth of that. It is worked on in a process of its own, whose peak memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import document, finish, parse_options

WIDTH = 4096
LAYERS, QUICK_LAYERS = 36, 4
ROWS = 16


def main() -> None:
    """Write the model, and measure one run over it."""
    options = parse_options(__doc__)
    layers = QUICK_LAYERS if options.quick else LAYERS
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        path = Path(temporary) / "model.onnx"
        _write(path, layers)
        command = [sys.executable, __file__, "--child", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights_gib = layers * WIDTH * WIDTH * 4 / 2**30
    figures = {"weights_gib": weights_gib, **json.loads(done.stdout.splitlines()[-1])}
    figures["peak_over_weights"] = figures["peak_gib"] / weights_gib
    claim = "a model over 2 GB is calibrated and quantized like any other"
    targets = {"int8_macs_fraction": ("==", 1.0), "sqnr_db": (">=", 20.0)}
    if not options.quick:
        targets["peak_over_weights"] = ("<=", 3.5)
    finish(document("calibration_large", claim, figures, targets, 1), options.json)


def _write(path: Path, layers: int) -> None:
    """The graph, and its weights in a file beside it."""
    from onnx import TensorProto, helper

    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32) * np.float32(
        (2 / WIDTH) ** 0.5
    )
    nodes, weights = [], []
    with path.with_name("weights.bin").open("wb") as stream:
        for i in range(layers):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=weight.shape)
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": stream.tell(), "length": weight.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            stream.write(np.roll(weight, 37 * i, axis=0).tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"m{i}"]))
            nodes.append(helper.make_node("Relu", [f"m{i}"], [f"h{i + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH])
        for name in ("h0", f"h{layers}")
    ]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def _child(path: Path) -> None:
    """Calibrate and quantize in this process; print what it took and what it gave."""
    import onnxruntime as ort

    from calibration import calibrate, prepare, quantize, save_model, sqnr_db

    feed = {"h0": np.random.default_rng(1).standard_normal((ROWS, WIDTH), dtype=np.float32)}
    start = time.perf_counter()
    prepared = prepare(path)
    int8 = quantize(prepared, calibrate(prepared, [feed], observer="entropy"))
    figures = {"seconds": time.perf_counter() - start, "peak_gib": _peak_gib()}
    del prepared
    save_model(int8.model, path.with_name("int8.onnx"))
    files = (path, path.with_name("int8.onnx"))
    exact, found = (
        ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed) for file in files
    )
    figures["int8_macs_fraction"] = int8.report.int8_macs_fraction or 0.0
    figures["sqnr_db"] = sqnr_db(exact, found)
    print(json.dumps(figures))


def _peak_gib() -> float:
    """Peak resident memory since this program started."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 2**20


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]))
    else:
        main()
