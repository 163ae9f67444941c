"""Export to ONNX with a free batch axis, proven at two batch sizes.

torch.onnx's dynamo path comes first. It can freeze the batch without an error (pytorch/pytorch#148886), and
it cannot trace everything; the older TorchScript path is then tried, and the artifact records which path
was taken and why.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from edgekit import interrupt, ort, surgery
from edgekit.artifact import disk_is_full
from edgekit.errors import BadInput, EdgekitError
from edgekit.measure import graph as graph_facts
from edgekit.models import Model
from edgekit.modules import forward, parameter_count
from edgekit.profile import Profile
from edgekit.recipe import Export
from edgekit.stages.registry import Inputs
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from torch import nn

GRAPH_FILE = "model.onnx"
#: The newest opset that torch.onnx and ONNX Runtime's fusions both handle well.
PREFERRED_OPSET = 20
#: What ONNX Runtime 1.19 reads, the last for Python 3.8 (docs/profiles.md).
_HIGHEST_IR_VERSION = 10
_TESTED_BATCHES = (1, 3)
_TOLERANCE_FRACTION = 1e-3


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    export: Export


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Write the ONNX graph of the model, or of its pruned form where there is one.

    Raises:
        BadInput: neither path exports the model with a free batch axis and the same outputs.
    """
    model = inputs.sources.model
    path = out / GRAPH_FILE
    if model.kind == "onnx":
        return {"exporter": "given", "why": None, **_take_over(model, config.export.opset, path, profile)}
    module = model.module()
    if "model" in inputs.artifacts:
        module = surgery.load_into(module, inputs.artifacts["model"].path)
    opset = min(config.export.opset or PREFERRED_OPSET, profile.highest_opset)
    exporter, why = export_module(module, model, opset, path)
    facts = graph_facts.read(path, model.example(1))
    return {"exporter": exporter, "why": why, **facts.as_json(), "params": parameter_count(module)}


def portable(model: Model, path: Path) -> None:
    """Write an unchanged torch model as the graph that ``compress`` starts from.

    Raises:
        BadInput: as ``run``.
    """
    export_module(model.module(), model, PREFERRED_OPSET, path)


def _take_over(model: Model, wanted: int | None, path: Path, profile: Profile) -> dict[str, Any]:
    """Use an ONNX model as it is, its external data included, in one file."""
    import onnx

    graph = onnx.load(str(model.path))
    graph_facts.strip(graph)
    graph.ir_version = min(graph.ir_version, _HIGHEST_IR_VERSION)
    opset = graph_facts.opset(graph)
    if opset > profile.highest_opset:
        raise BadInput(
            f"the ONNX model has opset {opset}",
            f"the profile {profile.name} runs at most opset {profile.highest_opset}",
            "export the model again with a lower opset",
        )
    if wanted not in (None, opset):
        raise BadInput(
            f"export.opset {wanted} contradicts the model",
            f"the ONNX model has opset {opset}, and is taken as it is",
            "leave export.opset out, or export the model again",
        )
    onnx.save(graph, str(path))
    facts = graph_facts.read(path, model.example(1))
    if not facts.params:
        raise BadInput(
            f"the ONNX model {model.name} has no parameters",
            "there is nothing in it that could be made smaller",
            "give the model with its weights, not a graph that only prepares data",
        )
    return facts.as_json()


def export_module(module: nn.Module, model: Model, opset: int, path: Path) -> tuple[str, str | None]:
    """Write a module's graph: try the two paths in order; say which one worked, and why not the first.

    Raises:
        BadInput: neither gives a graph that answers as the module does.
    """
    failures = []
    for name, export in (("dynamo", _dynamo), ("torchscript", _torchscript)):
        try:
            with _quiet():
                export(module, model, opset, path)
            _tidy(path, opset)
            _prove(module, model, path)
        except Exception as error:  # exporters raise anything, down to bare AssertionError
            interrupt.check()
            if disk_is_full(error):
                raise
            failures.append(f"{name}: {_first_line(error)}")
            path.unlink(missing_ok=True)
            continue
        return name, failures[0] if failures else None
    raise BadInput(
        f"the model {model.name} cannot be exported to ONNX",
        "; ".join(failures),
        "export it yourself and give the .onnx file, or make its forward traceable",
    )


def _dynamo(module: nn.Module, model: Model, opset: int, path: Path) -> None:
    import torch

    free = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(spec.shape) if size == -1} or None
        for spec in model.inputs
    )
    torch.onnx.export(
        module,
        _tensors(model.example(2)),
        str(path),
        input_names=[spec.name for spec in model.inputs],
        output_names=[spec.name for spec in model.outputs],
        opset_version=opset,
        dynamo=True,
        dynamic_shapes=_by_parameter(module.forward, free),
        external_data=False,
        verbose=False,
    )


def _by_parameter(forward: Callable[..., Any], free: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export asks for one entry a parameter: what ``*inputs`` takes is a tuple of its own."""
    kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return free
    before = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:before], free[before:])


def _torchscript(module: nn.Module, model: Model, opset: int, path: Path) -> None:
    import torch

    free = {
        spec.name: {axis: f"{spec.name}_{axis}" for axis, size in enumerate(spec.shape) if size == -1}
        for spec in (*model.inputs, *model.outputs)
    }
    torch.onnx.export(
        module,
        _tensors(model.example(2)),
        str(path),
        input_names=[spec.name for spec in model.inputs],
        output_names=[spec.name for spec in model.outputs],
        opset_version=opset,
        dynamo=False,
        dynamic_axes=free,
    )


def _tensors(arrays: Arrays) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays.values())


def _tidy(path: Path, opset: int) -> None:
    """Remove what differs from run to run or names files of this machine; check the opset."""
    import onnx

    graph = onnx.load(str(path))
    graph_facts.strip(graph)
    graph.ir_version = min(graph.ir_version, _HIGHEST_IR_VERSION)
    if graph_facts.opset(graph) > opset:
        raise ValueError(f"the exporter wrote opset {graph_facts.opset(graph)}, not {opset}")
    onnx.checker.check_model(graph)
    onnx.save(graph, str(path))


def _prove(module: nn.Module, model: Model, path: Path) -> None:
    """Compare the graph with the module at batch sizes that the export did not see."""
    session = ort.Session(path)
    batches = _TESTED_BATCHES if model.inputs[0].shape[0] == -1 else (model.inputs[0].shape[0],)
    for batch in batches:
        example = model.example(batch)
        got = session.run(example)
        for name, tensor in zip(session.outputs, forward(module, _tensors(example)), strict=True):
            want = tensor.numpy()
            if got[name].shape != want.shape:
                raise ValueError(f"at batch {batch}, {name} has shape {got[name].shape}, not {want.shape}")
            worst, largest = _worst(got[name].astype(np.float64), want), np.abs(want[np.isfinite(want)])
            if not worst <= _TOLERANCE_FRACTION * max(1.0, float(largest.max(initial=0))):  # or it is NaN
                raise ValueError(f"at batch {batch}, {name} differs from the module by {worst:.2g}")


def _worst(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """The largest difference; NaN where only one of them is NaN, or each infinite in its own way."""
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(same, 0.0, got - want)).max(initial=0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter out of the user's terminal; their errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    if isinstance(error, EdgekitError):
        return f"{error.what}: {error.why}"
    cause = error.__cause__ or error  # the exporter's own error says how to report it
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text.splitlines()[0] if text else 'no message'}"
