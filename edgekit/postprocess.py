"""What a device computes behind the model, such as boxes from a detector's raw heads: a graph of its own.

It takes some of the model's outputs by name, keeps the batch axis, and is neither pruned nor quantized: the
model is compressed and compared at its own outputs, and the graph is put behind the one that ships.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit import ort
from edgekit.errors import BadInput
from edgekit.objects import is_object_spec, load_callable
from edgekit.tensors import numpy_dtype, spec_of

if TYPE_CHECKING:
    from onnx import ModelProto

_ROWS, _LENGTH = 2, 16


@dataclass(frozen=True)
class Postprocess:
    """A graph behind the model.

    Attributes:
        graph: a serialized ONNX model.
        inputs, outputs: its signature, batch axis first.
        digest: SHA-256 of the graph.
    """

    graph: bytes = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    digest: str


def load(spec: str, base: Path, model_outputs: Sequence[TensorSpec]) -> Postprocess:
    """Read the graph and run it once.

    Args:
        spec: an ONNX file relative to ``base``, or ``package.module:fn`` that returns an ONNX model.
        base: the recipe's directory.
        model_outputs: the signature of what it is fed.

    Raises:
        BadInput: it cannot be read, takes what the model does not give, or loses the batch axis.
    """
    model = _from_function(spec) if is_object_spec(spec) else _from_file(base / spec)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(spec_of(info) for info in model.graph.input if info.name not in constants)
    outputs = tuple(spec_of(info) for info in model.graph.output)
    _check_names(spec, inputs, outputs, model_outputs)
    graph = model.SerializeToString(deterministic=True)
    _try(spec, graph, model_outputs)
    return Postprocess(graph, inputs, outputs, hashlib.sha256(graph).hexdigest())


def _from_function(spec: str) -> ModelProto:
    import onnx

    try:
        model = load_callable(spec)()
    except BadInput:
        raise
    except Exception as error:  # whatever a user's function raises
        raise _unfit(f"{spec} failed", f"{type(error).__name__}: {error}") from error
    if not isinstance(model, onnx.ModelProto):
        raise _unfit(
            f"{spec} gives no graph", f"it returned a {type(model).__name__}, not an onnx.ModelProto"
        )
    return model


def _from_file(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(path)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise _unfit(f"the post-processing {path} cannot be read", str(error)) from error


def _check_names(
    what: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    model_outputs: Sequence[TensorSpec],
) -> None:
    given = {output.name: output.dtype for output in model_outputs}
    listed = ", ".join(f"'{name}'" for name in given)
    for tensor in inputs:
        if given.get(tensor.name) != tensor.dtype:
            raise _unfit(
                f"the post-processing {what} does not fit the model",
                f"it takes '{tensor.name}' {tensor.dtype}; the model gives {listed}",
            )
    taken = sorted({tensor.name for tensor in outputs} & set(given))
    if taken:
        raise _unfit(
            f"the post-processing {what} does not fit the model",
            f"both have an output named '{taken[0]}'",
        )


def _try(what: str, graph: bytes, model_outputs: Sequence[TensorSpec]) -> None:
    """Run it on zeros: of two rows where the model's batch is free."""
    zeros = {}
    for tensor in model_outputs:
        rows, *sizes = tensor.shape
        shape = (_ROWS if rows == -1 else rows, *(_LENGTH if size == -1 else size for size in sizes))
        zeros[tensor.name] = np.zeros(shape, numpy_dtype(tensor.dtype))
    rows = len(next(iter(zeros.values())))
    try:
        made = ort.Session(graph).run(zeros)
    except BadInput:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        reason = str(error).strip().splitlines()[0]
        raise _unfit(f"the post-processing {what} does not run on the model's outputs", reason) from error
    for name, value in made.items():
        if value.ndim == 0 or len(value) != rows:
            raise _unfit(
                f"the post-processing {what} loses the batch axis",
                f"{rows} rows went in; '{name}' has the shape {list(value.shape)}",
            )


def _unfit(what: str, why: str) -> BadInput:
    return BadInput(what, why, "docs/detection.md says what postprocessing.graph has to be")
