"""The three models that every server serves, as ONNX files of opset 17.

``tiny`` costs almost nothing, so a server's own cost is all there is. ``cnn`` takes about 2.5 ms with one
thread, and a batch of sixteen nearly sixteen times as long. ``mlp`` reads 50 MB of weights for each run,
however many rows it has, so that batching pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MAX_BATCH_SIZE = 16
_OPSET = 17
_IR_VERSION = 8
_TINY_WIDTH = 16
_MLP_WIDTH = 2048
_IMAGE_PIXELS = 64
_CNN_CHANNELS = (24, 48, 96, 128)
_CLASSES = 10


@dataclass(frozen=True)
class Model:
    """A model and the one row that all requests carry.

    Attributes:
        name: ``tiny``, ``cnn`` or ``mlp``.
        path: its ONNX file; input ``x``, output ``y``, both FP32 with a free batch axis.
        row: the input of one request, shape ``(1, ...)``.
        answer: what ONNX Runtime makes of ``row``.
    """

    name: str
    path: Path
    row: Array
    answer: Array


def write_models(directory: Path) -> dict[str, Model]:
    """Write the ONNX files into ``directory``; the same bytes every time."""
    return {name: _write(name, directory / f"{name}.onnx") for name in ("tiny", "cnn", "mlp")}


def write_variant(directory: Path, seed: int) -> Model:
    """Write ``tiny`` with other constants, to be told apart by its answers: another version to swap to."""
    rng = np.random.default_rng(seed)
    return _save("tiny", directory / f"tiny_{seed}.onnx", _tiny(rng), (_TINY_WIDTH,), (_TINY_WIDTH,))


def open_session(path: Path) -> Any:
    """ONNX Runtime with one thread, as in every server."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])


def _write(name: str, path: Path) -> Model:
    rng = np.random.default_rng(0)
    if name == "tiny":
        return _save(name, path, _tiny(rng), (_TINY_WIDTH,), (_TINY_WIDTH,))
    if name == "cnn":
        image = (3, _IMAGE_PIXELS, _IMAGE_PIXELS)
        return _save(name, path, _cnn(rng), image, (_CLASSES,))
    return _save(name, path, _mlp(rng), (_MLP_WIDTH,), (_MLP_WIDTH,))


class _Graph:
    """Nodes in a chain from ``x`` to ``y``."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._last = "x"

    def add(self, kind: str, weights: Sequence[Array] = (), **attributes: Any) -> None:
        """Append a node that takes what came last, and these constants."""
        from onnx import helper, numpy_helper

        number = len(self.nodes)
        names = [f"w{number}_{i}" for i in range(len(weights))]
        self.weights += [numpy_helper.from_array(w, n) for w, n in zip(weights, names, strict=True)]
        output = f"h{number}"
        self.nodes.append(helper.make_node(kind, [self._last, *names], [output], **attributes))
        self._last = output

    def end(self) -> None:
        """Name what came last ``y``."""
        self.nodes[-1].output[0] = "y"


def _tiny(rng: np.random.Generator) -> _Graph:
    graph = _Graph()
    graph.add("Mul", [rng.uniform(0.5, 2.0, _TINY_WIDTH).astype(np.float32)])
    graph.add("Add", [rng.standard_normal(_TINY_WIDTH).astype(np.float32)])
    return graph


def _mlp(rng: np.random.Generator) -> _Graph:
    graph = _Graph()
    for _ in range(3):
        weights = rng.standard_normal((_MLP_WIDTH, _MLP_WIDTH)) * math.sqrt(2 / _MLP_WIDTH)
        graph.add("Gemm", [weights.astype(np.float32), np.zeros(_MLP_WIDTH, np.float32)])
        graph.add("Relu")
    return graph


def _cnn(rng: np.random.Generator) -> _Graph:
    graph = _Graph()
    before = 3
    for block, channels in enumerate(_CNN_CHANNELS):
        for stride in (1 if block == 0 else 2, 1):
            _conv(graph, rng, before, channels, stride)
            before = channels
    graph.add("GlobalAveragePool")
    graph.add("Flatten")
    head = rng.standard_normal((before, _CLASSES)) * math.sqrt(1 / before)
    graph.add("Gemm", [head.astype(np.float32), np.zeros(_CLASSES, np.float32)])
    return graph


def _conv(graph: _Graph, rng: np.random.Generator, before: int, channels: int, stride: int) -> None:
    weights = rng.standard_normal((channels, before, 3, 3)) * math.sqrt(2 / (9 * before))
    graph.add(
        "Conv", [weights.astype(np.float32), np.zeros(channels, np.float32)],
        pads=[1, 1, 1, 1], strides=[stride, stride],
    )  # fmt: skip
    graph.add("Relu")


def _save(name: str, path: Path, graph: _Graph, taken: tuple[int, ...], given: tuple[int, ...]) -> Model:
    import onnx
    from onnx import TensorProto, helper

    graph.end()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *taken])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *given])
    whole = helper.make_graph(graph.nodes, name, [x], [y], graph.weights)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    row = np.random.default_rng(1).standard_normal((1, *taken)).astype(np.float32)
    return Model(name, path, row, open_session(path).run(["y"], {"x": row})[0])
