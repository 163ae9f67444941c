"""Bundles for devices: good ones that can be told apart by their answers, and bad ones of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bundle_kit import graph, pack
from onnx import TensorProto, helper

from device_agent.manifest import Contract
from edgekit import bundle, sign

MODEL = "scale"
WIDTH = 4


class Release:
    """Makes signed bundles of one model.

    Args:
        workdir: where they and the key go.
        architecture: the processor that they are for.
    """

    def __init__(self, workdir: Path, architecture: str = "x86_64") -> None:
        self._workdir = workdir
        self._architecture = architecture
        self._private, self.public = sign.keygen(workdir / "release")
        self._made = 0

    def good(self, factor: float, version: int = 1) -> bundle.Bundle:
        """A bundle whose model multiplies by ``factor``."""
        return self._make(_scale(factor), factor, version)

    def wrong(self, factor: float) -> bundle.Bundle:
        """A bundle whose model does not give its golden outputs."""
        return self._make(_scale(factor + 1.0), factor, 1)

    def slow(self, factor: float, latency_ms: float) -> bundle.Bundle:
        """A bundle that promises ``latency_ms`` and takes much longer, though its answers are right."""
        contract = Contract(latency_quantile="p99", latency_ms=latency_ms, met=True)
        return self._make(_slow_scale(factor), factor, 1, contract)

    def leaking(self, factor: float) -> bundle.Bundle:
        """A bundle whose memory grows with the largest value that it was ever sent, and never shrinks."""
        return self._make(_leaking_scale(factor), factor, 1)

    def _make(
        self, model: onnx.ModelProto, factor: float, version: int, contract: Contract | None = None
    ) -> bundle.Bundle:
        self._made += 1
        x = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
        golden = (x, x * factor)
        made = pack(
            self._workdir,
            str(self._made),
            model,
            golden,
            version=version,
            architecture=self._architecture,
            contract=contract,
        )
        sign.sign(made.archive, self._private)
        return made


def request(value: float = 1.0) -> dict[str, Any]:
    """The body of an inference request with one row of ``value``."""
    return {"inputs": [{"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [value] * WIDTH}]}


def _scale(factor: float) -> onnx.ModelProto:
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    return _model([helper.make_node("Mul", ["x", "k"], ["y"])], [constant])


def _slow_scale(factor: float) -> onnx.ModelProto:
    """The same answers, after a large matrix was multiplied by itself for nothing but its sum of zero."""
    side = 1500
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Mul", ["zeros", "total"], ["matrix"]),
        helper.make_node("MatMul", ["matrix", "matrix"], ["product"]),
        helper.make_node("ReduceSum", ["product"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["x", "k"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    shape = helper.make_tensor("side", TensorProto.INT64, [2], [side, side])
    zeros = helper.make_node("ConstantOfShape", ["side"], ["zeros"])
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    return _model([zeros, *nodes], [constant, shape])


def _leaking_scale(factor: float) -> onnx.ModelProto:
    """The same answers, beside as many zeros as the largest input says; ONNX Runtime keeps their memory."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "one"], ["size"]),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Mul", ["x", "k"], ["scaled"]),
        helper.make_node("Add", ["scaled", "nothing"], ["y"]),
    ]
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    constant = helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])
    return _model(nodes, [constant, one])


def _model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> onnx.ModelProto:
    return graph(MODEL, (WIDTH, WIDTH), nodes, constants)
