"""One model of the zoo from end to end, in a process of its own; prints one line of JSON.

    python -m benchmarks.menagerie.worker NAME

Prune to 0.35, export (two paths, proven at batches 1 and 3), INT8, ONNX Runtime at batches 1 and 3, and a
TensorRT-RTX build of both graphs for SM89, which needs no GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZE = 0.35
ALIGNMENT = 8
MAX_LAYER_RATIO = 0.95
OPSET = 18
CARD = "rtx-4000-ada"
STATISTICS = 64  # samples; with 8, the last layers of 64 x 64 images saw 32 values a channel, and errors grew
CALIBRATION_SAMPLES, JUDGES = 16, 8
BATCHES = (1, 3)
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


class Account:
    """What is known so far; printed at every step, so that a killed process says where it was."""

    def __init__(self, name: str) -> None:
        self.facts: dict[str, Any] = {"model": name, "step": "start", "seconds": {}}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        self.facts["step"] = name
        self.write()
        began = time.perf_counter()
        yield
        self.facts["seconds"][name] = round(time.perf_counter() - began, 2)

    def write(self) -> None:
        """Print the line."""
        print(json.dumps(self.facts), flush=True)


def main() -> None:
    """Run the model that is named on the command line."""
    warnings.simplefilter("ignore")
    account = Account(sys.argv[1])
    try:
        _run(account)
        account.facts["step"] = "done"
    except Exception as error:  # every failure becomes its one-line reason
        text = " ".join(str(error).split())
        account.facts["why"] = f"{type(error).__name__}: {text}"[:400]
    account.write()


def _run(account: Account) -> None:
    import torch

    from benchmarks.menagerie.models import subjects

    torch.set_num_threads(THREADS)
    subject = subjects()[account.facts["model"]]
    account.facts["kind"] = subject.kind
    with account.step("build"):
        torch.manual_seed(0)
        module = subject.build().eval()
        set_statistics(module, subject)
    with account.step("prune"):
        pruned = _prune(account, module, subject)
        set_statistics(pruned, subject)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        with account.step("export"):
            account.facts["exporter"], account.facts["not_dynamo"] = export(pruned, subject, path)
        with account.step("int8"):
            int8 = _quantize(account, subject, path)
        with account.step("tensorrt-rtx fp32"):
            _build_engine(path.read_bytes())
        with account.step("tensorrt-rtx int8"):
            _build_engine(int8)


def set_statistics(module: Any, subject: Any) -> None:
    """BatchNorm statistics of random weights are far from what the network sees: measure them."""
    from host_trainer.batchnorm import recalibrate

    batch = tuple(subject.example(STATISTICS, seed=1).values())
    recalibrate(module, [batch], lambda m, b: m(*b))


def _prune(account: Account, module: Any, subject: Any) -> Any:
    from edgekit import pruning
    from edgekit.modules import parameter_count
    from edgekit.pruning.rewriting import rewrite

    whole = parameter_count(module)
    rewrite(module)
    structure = pruning.examine(module, tuple(subject.example(2).values()))
    scores = pruning.scores_of(module, structure, "magnitude", (), 0)
    least = {group.name: 0 for group in structure.prunable}
    account.facts["prunable"] = round(1 - structure.parameters(least) / structure.parameters({}), 4)
    account.facts["kept_whole"] = Counter(group.why for group in structure.groups if group.why)
    widths, _ = pruning.globally(
        structure, scores, SIZE, max_layer_ratio=MAX_LAYER_RATIO, alignment=ALIGNMENT
    )
    pruned = pruning.cut(module, structure, widths, scores)
    account.facts["params"] = whole
    account.facts["ratio"] = round(parameter_count(pruned) / whole, 4)
    return pruned


def export(module: Any, subject: Any, path: Path) -> tuple[str, str | None]:
    """Write the graph, proven at several batch sizes; returns what ``export_module`` does."""
    import torch

    from device_agent.manifest import TensorSpec
    from edgekit.models import Model
    from edgekit.stages.export import export_module
    from edgekit.tensors import protocol_dtype

    def example(batch: int, _length: int) -> dict[str, Any]:
        return _arrays(subject, batch)

    with torch.no_grad():
        answer = module(*subject.example(2).values())
    outputs = [answer] if isinstance(answer, torch.Tensor) else list(answer)
    model = Model(
        kind="torch",
        name=subject.name,
        digest="",
        inputs=tuple(
            TensorSpec(name, protocol_dtype(array.dtype), (-1, *array.shape[1:]))
            for name, array in example(1, 0).items()
        ),
        outputs=tuple(
            TensorSpec(f"output_{i}", protocol_dtype(t.numpy().dtype), (-1, *t.shape[1:]))
            for i, t in enumerate(outputs)
        ),
        path=None,
        preprocess=None,
        _examples=example,
    )
    return export_module(module, model, OPSET, path)


def _quantize(account: Account, subject: Any, path: Path) -> bytes:
    """Make and compare the INT8 graph; the answer is its form for TensorRT."""
    import onnx

    from benchmarks.menagerie.int8 import make

    def feeds(count: int, seed: int) -> list[dict[str, Any]]:
        return [_arrays(subject, 1, seed + i) for i in range(count)]

    unseen = [_arrays(subject, batch, 99) for batch in BATCHES]
    made = make(onnx.load(str(path)), feeds(CALIBRATION_SAMPLES, 10), feeds(JUDGES, 50), unseen, THREADS)
    account.facts |= made.facts
    graph: bytes = made.tensorrt.SerializeToString()
    return graph


def _arrays(subject: Any, batch: int, seed: int = 0) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in subject.example(batch, seed).items()}


def _build_engine(graph: bytes) -> None:
    """As ``compress`` does it for this card: lowered where its parser asks for that, for batches up to 8."""
    import onnx
    import tensorrt_rtx as trt

    from device_agent.engines.tensorrt_build import build_engine
    from device_agent.engines.tensorrt_settings import BuildSettings
    from device_agent.manifest import ShapeRange
    from edgekit import profile
    from edgekit.lowering.lower import lower
    from edgekit.lowering.tables import for_profile

    table = for_profile(profile.load(CARD))
    lowered = lower(onnx.load_from_string(graph), table)
    if lowered.refused:
        raise ValueError(f"{lowered.refused[0].op_type} is refused: {lowered.refused[0].why}")
    sizes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in lowered.model.graph.input
    }
    ranges = {name: ShapeRange(*((rows, *shape[1:]) for rows in (1, 3, 8))) for name, shape in sizes.items()}
    settings = BuildSettings(profiles=(ranges,), compute_capabilities=("SM89",))
    build_engine(trt, lowered.model.SerializeToString(), settings)


if __name__ == "__main__":
    main()
