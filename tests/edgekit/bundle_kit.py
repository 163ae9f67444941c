"""What tests of deployment share: packs a graph of one input ``x`` and one output ``y`` as a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from device_agent.manifest import Contract, Golden, Manifest, TensorSpec, Tolerance
from edgekit import bundle


def graph(
    name: str,
    widths: tuple[int, int],
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    """A model whose ``x`` and ``y`` are FP32 of [n, width]."""
    x, y = (
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["n", width])
        for tensor, width in zip("xy", widths, strict=True)
    )
    made = helper.make_graph(nodes, name, [x], [y], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def pack(
    workdir: Path,
    label: str,
    model: onnx.ModelProto,
    golden: tuple[np.ndarray, np.ndarray],
    *,
    version: int = 1,
    architecture: str = "x86_64",
    contract: Contract | None = None,
    tolerance: float = 1e-4,
) -> bundle.Bundle:
    """Pack a model of :func:`graph`, unsigned.

    Args:
        workdir: where it goes.
        label: tells it from others there.
        model: its name is the bundle's.
        golden: inputs and outputs, [rows, width].
        version: of the bundle.
        architecture: the processor that it is for.
        contract: what it promises; None: nothing.
        tolerance: absolute and relative.
    """
    staging = workdir / f"staging-{label}"
    staging.mkdir(parents=True)
    onnx.save(model, staging / "model.onnx")
    x, y = golden
    np.savez(staging / "in.npz", x=x)
    np.savez(staging / "out.npz", y=y)
    manifest = Manifest(
        schema=1,
        name=model.graph.name,
        version=version,
        profile="x86-cpu",
        architecture=architecture,
        graph="model.onnx",
        precision="fp32",
        inputs=(TensorSpec("x", "FP32", (-1, x.shape[1])),),
        outputs=(TensorSpec("y", "FP32", (-1, y.shape[1])),),
        max_batch_size=4,
        files=(),
        engines=(),
        golden=Golden("in.npz", "out.npz", {"y": Tolerance(tolerance, tolerance)}),
        contract=contract or Contract(),
    )
    return bundle.pack(staging, manifest, workdir / f"out-{label}")
