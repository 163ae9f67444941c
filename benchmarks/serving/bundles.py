"""Unsigned bundles of the benchmark's models, as the host would pack them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from device_agent.manifest import Contract, Golden, Manifest, TensorSpec, Tolerance
from edgekit.bundle import Bundle, pack
from serving.models import MAX_BATCH_SIZE, Array, Model, open_session

_GOLDEN_ROWS = 2
_TOLERANCE = Tolerance(absolute=1e-4, relative=1e-3)


def write_bundle(
    work: Path,
    model: Model,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int = MAX_BATCH_SIZE,
) -> Bundle:
    """Pack ``model`` below ``work``.

    Args:
        work: where staging and bundle go.
        model: the model.
        name: on the device; None: the model's own.
        version: of the bundle.
        max_batch_size: 1 turns batching off.
    """
    name = name or model.name
    staging = work / "staging" / f"{name}-{version}"
    staging.mkdir(parents=True)
    shutil.copyfile(model.path, staging / "model.onnx")
    rows = np.repeat(model.row, _GOLDEN_ROWS, axis=0)
    np.savez(staging / "golden_inputs.npz", x=rows)
    np.savez(staging / "golden_outputs.npz", y=open_session(model.path).run(["y"], {"x": rows})[0])
    manifest = Manifest(
        schema=1, name=name, version=version, profile="x86-cpu", architecture="x86_64",
        graph="model.onnx", precision="fp32",
        inputs=(_spec("x", model.row),), outputs=(_spec("y", model.answer),),
        max_batch_size=max_batch_size, files=(), engines=(),
        golden=Golden("golden_inputs.npz", "golden_outputs.npz", {"y": _TOLERANCE}), contract=Contract(),
    )  # fmt: skip
    return pack(staging, manifest, work / "bundles" / str(version))


def _spec(name: str, row: Array) -> TensorSpec:
    return TensorSpec(name, "FP32", (-1, *row.shape[1:]))
